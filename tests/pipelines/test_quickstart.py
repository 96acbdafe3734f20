"""The quickstart fits itself to the machine, hands flags on, and says what does not fit before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from himix_megatron.config import Config
from pipelines.cli import parse
from pipelines.quickstart import Job, arguments, evaluate, plan, preprocess, pretrain


def planned(*words: str, num_gpus: int = 0, has_ray: bool = True) -> Job:
    return plan(*arguments(words), num_gpus=num_gpus, has_ray=has_ray)


def trained(job: Job, stage: str = "instruct") -> tuple[int, Config]:
    """Ranks, and the settings that a training is given."""
    command = pretrain(job, stage, "--checkpoint.init-from", "somewhere")
    return int(command[command.index("--nproc-per-node") + 1]), parse(command[command.index("pipelines.pretrain") + 1 :])


def layout_of(command: list[str]) -> tuple[str, ...]:
    return tuple(command[command.index("--parallel.tensor") :])


@pytest.mark.parametrize(("num_gpus", "ranks", "precision"), [(0, 2, "fp32"), (1, 1, "bf16"), (2, 2, "bf16"), (8, 2, "bf16")])
def test_ranks_and_precision_fit_the_machine(num_gpus: int, ranks: int, precision: str) -> None:
    job = planned(num_gpus=num_gpus)
    for stage, steps in (("align", 120), ("instruct", 330)):
        found, config = trained(job, stage)
        assert (found, config.parallel.tensor, config.train.precision) == (ranks, ranks, precision)
        assert (config.train.steps, config.global_batch, config.micro_batch) == (steps, 64, 64)
    assert layout_of(evaluate(job)) == ("--parallel.tensor", str(ranks), "--parallel.pipeline", "1")


def test_flags_with_a_section_reach_both_trainings_and_win() -> None:
    words = ("--train.precision", "fp32", "--tensor", "1", "--model.layer-spec=torch", "--parallel.pipeline", "2")
    job = planned(*words, "--align-steps", "3", num_gpus=4)
    for stage in ("align", "instruct"):
        ranks, config = trained(job, stage)
        assert (ranks, config.parallel.tensor, config.parallel.pipeline) == (2, 1, 2)
        assert (config.train.precision, config.model.layer_spec) == ("fp32", "torch")
    assert trained(job, "align")[1].train.steps == 3
    assert layout_of(evaluate(job)) == ("--parallel.tensor", "1", "--parallel.pipeline", "2")
    assert trained(planned("--train.global-batch-samples", "128"))[1].global_batch == 128


def test_without_ray_its_own_workers_preprocess() -> None:
    for has_ray, words, wanted in ((True, (), "ray"), (False, (), "local"), (True, ("--engine", "local"), "local")):
        command = preprocess(planned(*words, has_ray=has_ray), "align")
        assert command[-2:] == ["--engine", wanted]


@pytest.mark.parametrize(
    ("words", "machine", "told"),
    [
        (("--train.precisoin", "bf16"), {}, r"unknown setting --train\.precisoin: did you mean --train\.precision\?"),
        (("--train.precision", "fp8"), {}, r"--train\.precision is 'fp8': wanted one of bf16, fp32"),
        (("--run.dir", "x"), {}, r"--run\.dir is the quickstart's own: give --out"),
        (("--train.steps=5",), {}, r"--train\.steps is the quickstart's own: give --align-steps and --instruct-steps"),
        (("--tensor", "2"), {"num_gpus": 1}, r"is more than the 1 GPU of this machine: use --tensor 1"),
        (("--engine", "ray"), {"has_ray": False}, "cannot be imported here: install it, or use --engine local"),
        (("--train.micro-batch-samples", "60"), {}, "use a multiple of 60"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words: tuple[str, ...], machine: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        planned(*words, **machine)


def test_everything_lies_in_out() -> None:
    job = planned("--out", "runs/other")
    assert trained(job)[1].run_dir == Path("runs/other/instruct")
    assert evaluate(job)[3] == "runs/other/instruct"
