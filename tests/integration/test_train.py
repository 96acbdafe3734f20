"""What training changes, that it can be continued anywhere, and that however it is started it is the same training."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.checkpoint.checkpointer import Checkpoints
from himix_megatron.checkpoint.manifest import complete_checkpoints, find_checkpoint
from himix_megatron.config import Config
from himix_megatron.data.loading.token_counts import text_lengths
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.runtime.process import free_port
from tests.support.datasets import make_mixed_dataset
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, small_config, train

LANGUAGE = ("language", "vision_kv")


def with_steps(config: Config, steps: int, **checkpoint: Any) -> Config:
    return replace(config, train=replace(config.train, steps=steps), checkpoint=replace(config.checkpoint, **checkpoint))


def weights_of(config: Config, runs: list[Path]) -> list[dict[str, torch.Tensor]]:
    """All weights of finished runs, the tower's too, by name; on one rank."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model
    from himix_megatron.model.towers import build_tower

    topology = init_distributed(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    model_chunks = build_model_chunks(config, detect(), topology, tower, trains=False)
    found = []
    for run in runs:
        Checkpoints(config, model_chunks, None, tower).load_weights(find_checkpoint(str(run)))
        weights = {n: p.detach().clone() for n, p in unwrap_model(model_chunks[0]).named_parameters()}
        found.append(weights | {f"tower.{n}": p.detach().clone() for n, p in tower.named_parameters()})
    shutdown_distributed()
    return found


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("layout", "ranks"), [({}, 1), ({"tensor": 2, "pipeline": 2}, 4)], ids=["one rank", "tensor 2, pipeline 2"]
)
def test_each_stage_changes_its_parts_and_nothing_else(
    mixed_dataset: Path, tmp_path: Path, layout: dict[str, Any], ranks: int
) -> None:
    def run(name: str, parts: Any, initial: Path | None) -> None:
        config = small_config(mixed_dataset, tmp_path / name, parts=parts, initial=initial, steps=3, **layout)
        run_ranks(train, ranks, config, start_gloo=False)

    run("start", LANGUAGE, None)
    run("align", ("vision_kv",), tmp_path / "start")
    run("instruct", LANGUAGE, tmp_path / "align")
    run("tower", ("tower",), tmp_path / "instruct")
    runs = [tmp_path / name for name in ("start", "align", "instruct", "tower")]
    one_rank = small_config(mixed_dataset, tmp_path / "look", parts=("vision_kv",))
    (start, align, instruct, tower) = run_ranks(weights_of, 1, one_rank, runs, start_gloo=False)[0]

    per_layer = ("vision_norm.weight", "linear_vision_kv.weight", "linear_vision_kv.bias")
    vision_kv = {f"decoder.layers.{layer}.self_attention.{part}" for layer in range(4) for part in per_layer}
    of_tower = {name for name in start if name.startswith("tower.")}
    assert len(of_tower) > 10
    assert changed(start, align) == vision_kv
    assert changed(align, instruct) == start.keys() - of_tower
    assert changed(instruct, tower) == of_tower


@pytest.fixture(scope="module")
def ten_steps(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of 10 steps without a break on one rank."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_ranks(train, 1, small_config(mixed_dataset, folder, parts=LANGUAGE), start_gloo=False)
    return history(folder)["train/loss"]


@pytest.mark.parametrize(
    ("first", "then", "options"),
    [
        ((4, {"tensor": 2, "pipeline": 2}), (1, {}), {"precision": "bf16"}),
        ((2, {"pipeline": 2}), (2, {"tensor": 2}), {"parts": ("vision_kv", "language", "tower")}),
        ((2, {"distributed_optimizer": True}), (1, {"distributed_optimizer": True}), {"precision": "bf16"}),
    ],
    ids=["bf16, to fewer ranks", "trainable tower, pipeline to tensor", "bf16, distributed optimizer"],
)
def test_what_was_saved_comes_back(mixed_dataset: Path, tmp_path: Path, first: Any, then: Any, options: dict[str, Any]) -> None:
    """Saved at one layout and continued at another, a run goes on as one that was never stopped."""
    options = {"parts": LANGUAGE} | options
    for name, second in (("unbroken", first), ("moved", then)):
        for steps, (ranks, layout) in ((3, first), (6, second)):
            config = with_steps(small_config(mixed_dataset, tmp_path / name, **options, **layout), steps)
            run_ranks(train, ranks, config, start_gloo=False)
    close = 1e-5 if options.get("precision", "fp32") == "fp32" else 2e-2
    losses = [history(tmp_path / name)["train/loss"] for name in ("moved", "unbroken")]
    assert losses[0] == pytest.approx(losses[1], abs=close)


def test_settings_changed_between_starts_hold(mixed_dataset: Path, tmp_path: Path) -> None:
    config = with_steps(small_config(mixed_dataset, tmp_path, parts=LANGUAGE), 2)
    run_ranks(train, 1, config, start_gloo=False)
    slower = replace(with_steps(config, 4), optimizer=replace(config.optimizer, learning_rate=1e-5))
    run_ranks(train, 1, slower, start_gloo=False)
    assert history(tmp_path)["train/learning_rate"] == pytest.approx([1e-3, 1e-3, 1e-5, 1e-5])


def test_learning_rate_warms_up_and_falls_as_a_cosine(mixed_dataset: Path, tmp_path: Path) -> None:
    config = small_config(mixed_dataset, tmp_path, parts=("vision_kv",))
    config = replace(
        config, optimizer=replace(config.optimizer, schedule="cosine", warmup_fraction=0.2, min_learning_rate=1e-4)
    )
    run_ranks(train, 1, config, start_gloo=False)
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert history(tmp_path)["train/learning_rate"] == pytest.approx([0.0, 5e-4, *cosine], rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "layout", "distributed", "tolerance"),
    [
        (1, {}, False, 0.0),
        (2, {"tensor": 2, "sequence": True}, False, 1e-5),
        (2, {"pipeline": 2, "virtual_pipeline": 2}, False, 1e-5),
        (2, {}, True, 1e-5),
        (4, {"tensor": 2}, True, 1e-5),
    ],
    ids=["same", "tensor 2", "pipeline 2 interleaved", "data 2, distributed", "tensor 2, data 2, distributed"],
)
def test_run_continues_at_any_layout(
    mixed_dataset: Path,
    tmp_path: Path,
    ten_steps: list[float],
    ranks: int,
    layout: dict[str, Any],
    distributed: bool,
    tolerance: float,
) -> None:
    first = with_steps(small_config(mixed_dataset, tmp_path, parts=LANGUAGE, distributed_optimizer=distributed), 5)
    run_ranks(train, 1, first, start_gloo=False)
    second = small_config(mixed_dataset, tmp_path, parts=LANGUAGE, distributed_optimizer=distributed, **layout)
    run_ranks(train, ranks, second, start_gloo=False)
    losses = history(tmp_path)["train/loss"]
    assert losses == pytest.approx(ten_steps, abs=tolerance)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


def test_steps_after_the_last_checkpoint_are_told_once(mixed_dataset: Path, tmp_path: Path, ten_steps: list[float]) -> None:
    """As after a kill at step 10 of which the checkpoint of step 5 is what is left."""
    config = with_steps(small_config(mixed_dataset, tmp_path, parts=LANGUAGE), 10, interval_steps=5)
    run_ranks(train, 1, config, start_gloo=False)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010")
    run_ranks(train, 1, config, start_gloo=False)
    assert history(tmp_path)["train/loss"] == ten_steps


def test_old_checkpoints_go_and_the_best_stays(mixed_dataset: Path, tmp_path: Path) -> None:
    config = with_steps(small_config(mixed_dataset, tmp_path, parts=LANGUAGE), 6, interval_steps=1, keep_last=2)
    config = replace(
        config,
        data=replace(config.data, validation_path=str(mixed_dataset)),
        log=replace(config.log, validation_interval_steps=1, validation_samples=16),
        # A rate that harms after the first steps: the best validation loss is not the newest.
        optimizer=replace(config.optimizer, learning_rate=0.3),
    )
    run_ranks(train, 1, config, start_gloo=False)
    losses = history(tmp_path)["validation/loss"]
    best = losses.index(min(losses)) + 1
    assert best < 5, losses
    kept = {int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(tmp_path)}
    assert kept == {best, 5, 6}


def test_data_order_of_a_run_cannot_change(mixed_dataset: Path, tmp_path: Path) -> None:
    config = with_steps(small_config(mixed_dataset, tmp_path, parts=LANGUAGE), 2)
    run_ranks(train, 1, config, start_gloo=False)
    kept = (tmp_path / "config.json").read_text()
    changed = {
        "train.seed changed from 1234 to 99": replace(config, train=replace(config.train, seed=99)),
        "train.global_batch_samples changed from 8 to 16": replace(
            config, train=replace(config.train, global_batch_samples=16)
        ),
        "data.max_text_tokens changed from 96 to 95": replace(config, data=replace(config.data, max_text_tokens=95)),
        "data.template changed from tiny to plain": replace(config, data=replace(config.data, template="plain")),
        r"data.weights changed from \[\] to \[1.0\]": replace(config, data=replace(config.data, weights=(1.0,))),
        "data.shuffle changed from samples to shards": replace(config, data=replace(config.data, shuffle="shards")),
    }
    for said, other in changed.items():
        with pytest.raises(
            RuntimeError, match=rf"ValueError: cannot resume .* \(step 2\): {said}, which changes the data order"
        ):
            run_ranks(train, 1, with_steps(other, 4), start_gloo=False)
    assert (tmp_path / "config.json").read_text() == kept


def test_a_step_tells_what_it_did(mixed_dataset: Path, tmp_path: Path) -> None:
    """TensorBoard's counts are those of the ledger, which every data rank writes for itself."""
    config = small_config(mixed_dataset, tmp_path, parts=LANGUAGE, steps=4)
    config = replace(config, log=replace(config.log, ledger=True))
    run_ranks(train, 2, config, start_gloo=False)
    lines = [json.loads(line) for file in (tmp_path / "ledger").glob("rank-*") for line in file.read_text().splitlines()]
    points = history(tmp_path)
    assert len(lines) == 4 * 8
    assert len({(line["shard"], line["key"]) for line in lines}) == 32  # less than an epoch: nobody comes twice
    for step in range(4):
        own = [line for line in lines if line["step"] == step + 1]
        seconds = points["time/step_seconds"][step]
        for tag, counted in (
            ("throughput/text_tokens_per_second", sum(line["text_tokens"] for line in own)),
            ("throughput/vision_tokens_per_second", sum(line["vision_tokens"] for line in own)),
            ("throughput/images_per_second", sum(line["vision_tokens"] for line in own) / 4),
        ):
            assert points[tag][step] == pytest.approx(counted / seconds, rel=1e-3), tag
    wanted = {"train/loss", "train/learning_rate", "train/grad_norm", "time/step_seconds", "time/data_wait_seconds"}
    assert wanted | {"memory/peak_gib", "data/bad_samples", "data/truncated_samples"} <= points.keys()


def test_too_many_unreadable_samples_stop_the_run(tmp_path: Path) -> None:
    data = make_mixed_dataset(tmp_path / "data")
    text_lengths(ShardDataset(data), "bytes", "tiny")  # counted when it was whole
    for tar in (data / "shards").glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[600:] = bytes(len(content) - 600)  # as a disk might: the size stays, the content is gone
        tar.write_bytes(content)
    config = small_config(data, tmp_path / "run", parts=LANGUAGE, steps=40)
    assert run_ranks(code_of, 1, config, start_gloo=False) == [3]
    reason = (tmp_path / "run" / "STOP").read_text()
    assert "samples could not be read, more than data.max_bad_fraction 0.01" in reason
    assert not complete_checkpoints(tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"STOP says: .* --run.ignore-stop-file"):
        run_ranks(code_of, 1, config, start_gloo=False)


def code_of(config: Config) -> int:
    from himix_megatron.training.loop import pretrain

    return pretrain(config)


def test_validation_without_answers_is_no_loss(mixed_dataset: Path, tmp_path: Path) -> None:
    config = small_config(mixed_dataset, tmp_path, parts=LANGUAGE, steps=1)
    config = replace(
        config, data=replace(config.data, validation_path=str(mixed_dataset), max_text_tokens=3), log=replace(config.log)
    )
    run_ranks(train, 1, config, start_gloo=False)
    assert "validation/loss" not in history(tmp_path)
    assert json.loads((complete_checkpoints(tmp_path)[-1] / "himix.json").read_text())["validation_loss"] is None


def test_a_mistake_under_torchrun_is_told_once(mixed_dataset: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pipelines.pretrain",
    ]
    done = subprocess.run([*command, "tiny_align", "--train.step", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: ") == 1
    assert "exitcode  : 2" in done.stderr


def test_a_failure_in_training_is_in_the_log_of_its_rank(mixed_dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(mixed_dataset, data)
    config = small_config(data, tmp_path / "run", parts=LANGUAGE, steps=3)
    with pytest.raises(RuntimeError, match="failed while training"):
        run_ranks(lose_the_data, 1, config, start_gloo=False)
    assert "FileNotFoundError" in (tmp_path / "run" / "log" / "rank-000.log").read_text()


def lose_the_data(config: Config) -> None:
    """Train on shards that vanish once the run has begun."""
    from himix_megatron.training import loop as training

    train_with_rollbacks = training.train_with_rollbacks

    def after_they_are_gone(*arguments: Any) -> int:
        shutil.rmtree(Path(config.data.datasets[0]) / "shards")
        return train_with_rollbacks(*arguments)

    training.train_with_rollbacks = after_they_are_gone
    training.pretrain(config)


def test_bf16_ends_where_fp32_does(mixed_dataset: Path, tmp_path: Path) -> None:
    """50 steps of tiny_align on two tensor ranks."""
    from pipelines.recipes import RECIPES

    last = {}
    for precision in ("fp32", "bf16"):
        config = RECIPES["tiny_align"]()
        config = replace(
            config,
            data=replace(config.data, datasets=(str(mixed_dataset),), num_workers=0),
            train=replace(config.train, steps=50, precision=precision, global_batch_samples=16, micro_batch_samples=16),
            parallel=replace(config.parallel, tensor=2),
            run=replace(config.run, dir=str(tmp_path / precision)),
            log=replace(config.log, interval_steps=10),
        )
        run_ranks(train, 2, config, start_gloo=False)
        last[precision] = history(tmp_path / precision)["train/loss"][-1]
    assert last["bf16"] == pytest.approx(last["fp32"], rel=0.02)


# ---- started by hand, by torchrun, and as srun starts --------------------------------------------------------------


def environments(ranks: int, **extra: str) -> Iterator[dict[str, str]]:
    """The variables that srun sets for each task, and nothing of torchrun's."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        clean.pop(name, None)
    for rank in range(ranks):
        slurm = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": ranks, "SLURM_JOB_ID": 4711}
        yield clean | {name: str(value) for name, value in slurm.items()} | extra


def test_every_way_to_start_gives_the_same_losses(mixed_dataset: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return [
            "tiny_instruct", "--data.datasets", str(mixed_dataset), "--run.dir", str(tmp_path / name), "--train.steps", "3",
            "--train.global-batch-samples", "8", "--train.micro-batch-samples", "2", "--data.num-workers", "0",
            "--log.interval-steps", "1",
        ]  # fmt: skip

    program = [sys.executable, "-m", "pipelines.pretrain"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    subprocess.run([*program, *arguments("hand")], check=True)
    subprocess.run([*torchrun, "1", *program[1:], *arguments("torchrun")], check=True)
    subprocess.run([*torchrun, "2", *program[1:], *arguments("torchrun 2")], check=True)
    slurm = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_STEP_NODELIST": socket.gethostname()}
    tasks = [subprocess.Popen([*program, *arguments("srun 2")], env=env) for env in environments(2, **slurm)]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]

    losses = {name: history(tmp_path / name)["train/loss"] for name in ("hand", "torchrun", "torchrun 2", "srun 2")}
    assert len(losses["hand"]) == 3
    assert losses["torchrun"] == losses["hand"]
    assert losses["srun 2"] == losses["torchrun 2"]
    assert losses["torchrun 2"] == pytest.approx(losses["hand"], abs=1e-5)


def test_asked_to_stop_it_saves_and_goes_on_later(mixed_dataset: Path, tmp_path: Path, ten_steps: list[float]) -> None:
    """Two ranks, one of which gets the signal."""
    launcher = [sys.executable, "-c", STOP_AND_GO, str(mixed_dataset), str(tmp_path)]
    slurm = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [subprocess.Popen(launcher, env=env) for env in environments(2, **slurm)]
    try:
        wait_for(tmp_path / "log" / "rank-000.log", "step 3/")
        tasks[1].send_signal(signal.SIGUSR1)
        assert [task.wait(timeout=60) for task in tasks] == [85, 85]
    finally:
        for task in tasks:
            task.kill()
    done = int(complete_checkpoints(tmp_path)[-1].name.removeprefix("step-"))
    assert 3 <= done < 1000
    losses = history(tmp_path)["train/loss"]
    assert len(losses) == done  # nothing was lost, and nothing was done after the save
    assert losses[:10] == pytest.approx(ten_steps[: len(losses[:10])], abs=1e-5)


STOP_AND_GO = """
import sys
from pathlib import Path
from himix_megatron.training.loop import pretrain
from tests.support.small_runs import small_config
config = small_config(Path(sys.argv[1]), Path(sys.argv[2]), parts=("language", "vision_kv"), steps=1000)
sys.exit(pretrain(config))
"""


def wait_for(file: Path, text: str, timeout_seconds: float = 60) -> None:
    """Until a file contains a text."""
    deadline = time.monotonic() + timeout_seconds
    while not (file.is_file() and text in file.read_text()):
        assert time.monotonic() < deadline, f"{text!r} did not appear in {file}"
        time.sleep(0.05)
