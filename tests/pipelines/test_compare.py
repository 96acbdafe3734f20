"""Arms train alike and go on where they were killed, and the report calls significant what was planted and nothing else."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from himix_megatron.checkpoint.manifest import complete_checkpoints
from pipelines import compare, scaling
from pipelines.cli import parse
from pipelines.comparison.records import Arm, Measured, Point, read, write
from pipelines.comparison.report import answers_at, differences, write_report
from pipelines.flags import parse_settings
from tests.support.small_runs import history

from .test_mistakes import message
from .test_scaling import end, wait_for_step

STEPS, QUESTIONS = 24, 300

# ---- planted arms --------------------------------------------------------------------------------------------------


def arm(method: str, seed: int, shares: Sequence[float], *, flops: float = 1.0, draw: int = 0, **other: Any) -> Arm:
    """An arm with so large a share of right answers after each 10 steps; `flops`: of a step; `draw`: which are right."""
    order = random.Random(f"{seed} {draw}").sample(range(QUESTIONS), QUESTIONS)
    curve = []
    for number, share in enumerate(shares, 1):
        right = set(order[: round(share * QUESTIONS)])
        marks = "".join(str(int(question in right)) for question in range(QUESTIONS))
        spent = 10 * number * flops
        curve.append(Point(step=10 * number, decoder_flops=spent, total_flops=2 * spent, seconds=10.0 * number, loss=1.0,
                           heldout_loss=1 / spent, correct={"colour": marks[:100], "shape": marks[100:]}))  # fmt: skip
    facts = {"samples": f"order {seed}", "heldout": "set", "device": "CPU, 1 threads", "lost_points": 0, "size": 128} | other
    size = facts.pop("size")
    measured = Measured(code="abc", parameters=7, step_seconds=1.0, samples_per_second=64.0, memory_gib=0.5,
                        first_token_seconds=0.01, tokens_per_second=100.0, shuffled_accuracy=0.1, curve=tuple(curve),
                        **facts)  # fmt: skip
    return Arm(method=method, world="text", size=size, seed=seed, settings="tiny_instruct", measured=measured)


def found(arms: Sequence[Arm]) -> dict[tuple[str, str], dict[str, Any]]:
    """The differences to tokens by method and axis."""
    methods: dict[str, dict[int, Arm]] = {}
    for one in arms:
        methods.setdefault(one.method, {})[one.seed] = one
    return {(one["method"], one["axis"]): one for one in differences(methods, "tokens")}


def test_planted_differences_are_significant_and_chance_is_not() -> None:
    arms = []
    for seed in range(3):
        arms.append(arm("tokens", seed, [0.3, 0.6]))
        arms.append(arm("better", seed, [0.3, 0.72]))
        arms.append(arm("worse", seed, [0.3, 0.5]))
        arms.append(arm("alike", seed, [0.3, 0.6], draw=1))  # as many, but other questions
        arms.append(arm("lucky", seed, [0.3, (0.8, 0.59, 0.58)[seed]]))  # one seed alone makes the mean 0.657
    verdicts = {method: one["verdict"] for (method, axis), one in found(arms).items() if axis == "step"}
    assert verdicts == {
        "better": "better", "worse": "worse", "alike": "not significant", "lucky": "not significant",
    }  # fmt: skip
    of_better = found(arms)["better", "step"]["difference"]
    assert of_better["value"] == pytest.approx(0.12, abs=0.002)
    assert 0.05 < of_better["low"] < of_better["value"] < of_better["high"] < 0.19


def test_equal_flops_are_those_that_the_cheaper_one_has_spent() -> None:
    """tokens needs four times the FLOPs: better after as many steps, worse after as many FLOPs."""
    arms = [one for seed in range(3) for one in (arm("himix", seed, [0.3, 0.5, 0.6, 0.7]),
                                                 arm("tokens", seed, [0.4, 0.7, 0.85, 0.9], flops=4.0))]  # fmt: skip
    at = found(arms)
    assert at["himix", "step"]["verdict"] == at["himix", "seconds"]["verdict"] == "worse"
    assert at["himix", "decoder_flops"]["verdict"] == at["himix", "total_flops"]["verdict"] == "better"
    assert at["himix", "decoder_flops"]["amount"] == 40
    assert at["himix", "decoder_flops"]["difference"]["value"] == pytest.approx(0.7 - 0.4, abs=0.002)
    halfway = answers_at([arms[1]], "decoder_flops", 60.0)
    assert halfway.mean() == pytest.approx((0.4 + 0.7) / 2, abs=0.002)
    assert answers_at([arms[1]], "decoder_flops", 20.0).mean() == pytest.approx(0.2, abs=0.002), "from none at the start"


def test_the_report_says_what_is_significant_what_it_costs_and_what_is_not_alike(tmp_path: Path) -> None:
    arms = [
        arm(method, seed, [0.3, share], flops=flops, size=size)
        for seed in range(2)
        for size in (128, 256)
        for method, share, flops in (("himix", 0.5 + size / 1024, 1.0), ("tokens", 0.5, 2.0))
    ]
    arms.append(arm("casa", 0, [0.3, 0.5], flops=2.0, samples="another order", device="a GPU", lost_points=2))
    shown = write_report(arms, tmp_path, "tokens", ["methods", "--seeds", "2"]).read_text()
    assert "python -m pipelines.compare methods --seeds 2" in shown
    assert re.search(r"\| himix \| \*\*\+0\.12\d \[\+0\.\d+, \+0\.\d+\]\*\* at 20 \|", shown), shown
    assert "- **better**, against tokens at equal ...: himix (steps, decoder FLOPs, total FLOPs, seconds)" in shown
    assert "- **not significant**, against tokens at equal ...: casa (steps, decoder FLOPs, total FLOPs, seconds)" in shown
    for note in ("different samples with seed 0", "kills took the numbers of 2 steps", "different devices", "different seeds"):
        assert shown.count(f"- {note}") == 1, note
    content = json.loads((tmp_path / "report.json").read_text())
    assert [(group["size"], list(group["methods"])) for group in content] == [(128, ["himix", "tokens", "casa"]),
                                                                              (256, ["himix", "tokens"])]  # fmt: skip
    assert content[0]["methods"]["himix"]["accuracy_by_kind"].keys() == {"colour", "shape"}
    for name in ("text-128", "text-256", "text-loss"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in shown
    with pytest.raises(ValueError, match="arms of text were asked different held-out questions"):
        write_report([*arms, arm("vica", 0, [0.3, 0.5], heldout="another")], tmp_path, "tokens", [])


def test_an_arm_is_what_was_written(tmp_path: Path) -> None:
    written = arm("himix", 1, [0.3, 0.5])
    write(tmp_path / "arm.json", written)
    assert read(Arm, tmp_path / "arm.json") == written
    (tmp_path / "arm.json").write_text((tmp_path / "arm.json").read_text().replace('"seed": 1', '"seed": "one"'))
    with pytest.raises(ValueError, match=r"arm\.json: .*seed"):
        read(Arm, tmp_path / "arm.json")


# ---- what is planned -----------------------------------------------------------------------------------------------


def planned(*words: str) -> list[compare.Planned]:
    settings, flags = compare.arguments(words)
    return compare.plan(settings, flags)


def test_arms_differ_in_their_method_alone_and_a_seed_is_complete_before_the_next_begins() -> None:
    methods = ("himix", "himix:position=rotary,visibility=earlier", "latest_window:local_text=False", "tokens")
    arms = planned("trial", "--methods", *methods, "--worlds", "shapes", "text", "--seeds", "2", "--optimizer.learning-rate",
                   "5e-4")  # fmt: skip
    assert [one.file.stem for one in arms[:5]] == [
        "shapes-himix-128-1234", "shapes-himix-position-rotary-visibility-earlier-128-1234",
        "shapes-latest_window-local_text-False-128-1234", "shapes-tokens-128-1234", "text-himix-128-1234",
    ]  # fmt: skip
    assert [one.facts["seed"] for one in arms] == [1234] * 8 + [1235] * 8
    assert str(arms[0].file) == "docs/results/trial/arms/shapes-himix-128-1234.json"
    assert {one.facts["settings"] for one in arms[:4]} == {arms[0].facts["settings"]}
    rotary, separate, text = (parse(arms[number].words) for number in (1, 2, 4))
    assert (rotary.injection.position, rotary.injection.visibility) == ("rotary", "earlier")
    assert (separate.injection.local_text, separate.injection.fusion) == (False, "separate")
    assert (rotary.vision.image_size, text.vision.image_size) == (48, 64)
    assert text.data.datasets == ("data/scenes-text/align", "data/scenes-text/instruct")
    for config in (rotary, separate, text):
        assert (config.train.initialization, config.optimizer.schedule, config.optimizer.learning_rate) == (
            "by_name", "constant", 5e-4,
        )  # fmt: skip
        assert config.data.validation_path == config.data.datasets[1].replace("instruct", "heldout")


def test_a_size_is_a_width_with_heads_as_wide_as_before() -> None:
    arms = planned("trial", "--sizes", "64", "128", "256", "--methods", "himix", "--worlds", "shapes", "--seeds", "1")
    small, recipes, large = (parse(one.words).model for one in arms)
    assert [(m.hidden_size, m.ffn_hidden_size, m.num_attention_heads, m.num_query_groups) for m in (small, recipes, large)] == [
        (64, 192, 2, 1), (128, 384, 4, 2), (256, 768, 8, 4),
    ]  # fmt: skip


def test_scaling_series_of_two_methods_have_folders_of_their_own() -> None:
    settings = parse_settings(scaling.Settings, ["--world-sizes", "1"], "scaling")
    names = [scaling.plan(settings, "tiny_align", flags)[0].config.run_dir.name
             for flags in ([], ["--method", "saisa"], ["--method=tokens"])]  # fmt: skip
    assert names == ["tiny_align-weak-001", "tiny_align-saisa-weak-001", "tiny_align-tokens-weak-001"]


MISTAKES = {
    "no experiment": ([], "EXPERIMENT must be given"),
    "experiment": (["a/b"], "EXPERIMENT is 'a/b': it names folders"),
    "method": (["x", "--methods", "himx"], "--methods is himx: wanted one of himix, "),
    "field": (["x", "--methods", "himix:positions=rotary"], "wanted NAME:field=value,..., with field one of fusion, "),
    "contradiction": (["x", "--methods", "tokens:gate=tanh"], r"shapes-tokens-gate-tanh-128: injection.gate is tanh"),
    "world": (["x", "--worlds", "shape"], "--worlds is shape: wanted one of shapes, "),
    "twice": (["x", "--methods", "himix", "himix"], "--methods is himix himix: wanted different ones"),
    "size": (["x", "--sizes", "100"], "--sizes is 100: wanted multiples of 64"),
    "own": (["x", "--train.seed", "3"], "--train.seed is the comparison's own: give --seeds"),
    "a method for all": (["x", "--method", "saisa"], "--method is the comparison's own: give --methods"),
    "half of the data": (["x", "--data.datasets", "d"], "--data.datasets is given alone: give .* --data.validation-path"),
    "no data": (["x", "--data.datasets", "d", "--data.validation-path", "d"], "d is not a shard dataset"),
    "ranks": (["x", "--parallel.tensor", "2"], r"1 rank cannot hold parallel.tensor \(2\)"),
    "epochs": (
        ["x", "--recipe", "vicuna_7b_align", "--data.datasets", "d", "--data.validation-path", "d"],
        "give --train.steps",
    ),
    "nothing to report": (["x", "--report"], "has no finished arms: leave --report out to run them"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, wanted = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    assert re.search(wanted, message(compare.main, words, monkeypatch, capsys))
    assert not list(tmp_path.iterdir())


# ---- real arms -----------------------------------------------------------------------------------------------------


def words_of(data: Path, folder: Path, *more: str) -> list[str]:
    """Two arms of 24 steps, measured twice."""
    return [
        "small", "--methods", "himix", "himix:position=learned", "--baseline", "himix", "--seeds", "1", "--sizes", "64",
        "--points", "2", "--runs", str(folder / "runs"), "--results", str(folder / "results"), "--data.datasets", str(data),
        "--data.validation-path", str(data), "--train.steps", str(STEPS), "--train.global-batch-samples", "4",
        "--train.micro-batch-samples", "4", "--model.num-layers", "2", "--vision.image-size", "16", "--vision.hidden-size",
        "32", "--vision.num-layers", "1", *more,
    ]  # fmt: skip


def started(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.compare", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_arm(command: int) -> None:
    """The process of the arm that trains."""
    for process in psutil.Process(command).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)


def test_arms_that_are_killed_and_stopped_go_on_from_their_checkpoints(
    mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, runs = words_of(mixed_dataset, tmp_path), tmp_path / "runs" / "small"
    first, second = runs / "given-himix-64-1234", runs / "given-himix-position-learned-64-1234"
    comparison = started(words)
    try:
        wait_for_step(first / "log" / "rank-000.log", STEPS // 2 + 1)
        kill_arm(comparison.pid)
        wait_for_step(second / "log" / "rank-000.log", 3)
        comparison.send_signal(signal.SIGINT)
        shown, _ = comparison.communicate(timeout=300)
    finally:
        end(comparison)
    assert comparison.returncode == 85, shown
    assert "[1/2] given-himix-64-1234: killed: rank 0 got SIGKILL" in shown
    assert "stop requested (SIGINT): the same command continues the comparison" in shown
    assert not (tmp_path / "results").exists()

    again = started(words)
    shown, _ = again.communicate(timeout=300)
    assert again.returncode == 0, shown
    assert "report over 2 arms" in shown
    assert f"restored {first}/checkpoints/step-{STEPS // 2:08d}" in first.with_suffix(".txt").read_text()
    assert f"restored {second}/checkpoints/step-" in second.with_suffix(".txt").read_text()
    check_arms([read(Arm, file) for file in sorted((tmp_path / "results" / "small" / "arms").glob("*.json"))], runs)
    assert (tmp_path / "results" / "small" / "report.md").read_text().count("| himix ") == 2

    def said(*more: str) -> str:
        return message(compare.main, words_of(mixed_dataset, tmp_path, *more), monkeypatch, capsys)

    assert "was made with other settings (... 1, now ... 1 --train.steps 30): use the same" in said("--train.steps", "30")
    monkeypatch.setattr(sys, "argv", ["compare", *words, "--arm", "1"])
    assert compare.main() == 0
    assert "2 arms, 0 to run" in capsys.readouterr().out


def check_arms(arms: Sequence[Arm], runs: Path) -> None:
    """Both arms are complete, and saw the same."""
    plain, learned = (each.measured for each in arms)
    assert [each.method for each in arms] == ["himix", "himix:position=learned"]
    assert (plain.samples, plain.heldout) == (learned.samples, learned.heldout)
    assert learned.parameters > plain.parameters
    # A kill may take all points of the steps since the last flush, a stop takes none.
    assert 0 <= plain.lost_points <= STEPS // 2
    assert learned.lost_points == 0
    for each in arms:
        middle, last = each.measured.curve
        assert (middle.step, last.step) == (STEPS // 2, STEPS)
        assert 0 < middle.decoder_flops < middle.total_flops < last.total_flops
        assert {len(marks) for marks in last.correct.values()} == {1, 30}, "11 kinds of question: colours, and ten texts"
        assert last.heldout_loss is not None
        assert last.heldout_loss < (middle.heldout_loss or 9)
        assert min(each.measured.first_token_seconds, each.measured.tokens_per_second, each.measured.memory_gib) > 0
    for run in runs.iterdir():
        if run.is_dir():
            assert [folder.name for folder in complete_checkpoints(run)] == [f"step-{STEPS:08d}"], "the others were removed"
            assert len(history(run)["evaluation/heldout/answer_accuracy"]) == 2
