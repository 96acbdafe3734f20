"""A series of growing size runs through, reports what was killed, goes on, and continues where it stopped."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines import scaling
from pipelines.cli import run_main
from pipelines.scaling import Settings, nodes_of
from tools.scaling_report import __main__ as scaling_report

STEPS = 14
SMALL = [
    *("--model.num-layers", "2", "--model.hidden-size", "64", "--model.ffn-hidden-size", "96"),
    *("--train.micro-batch-samples", "1", "--train.global-batch-samples", "6"),
]


def words(data: Path, runs: Path, *extra: str) -> list[str]:
    """A weak series of 1, 2 and 4 ranks."""
    return ["tiny_align", "--world-sizes", "1", "2", "4", "--runs", str(runs), "--data.datasets", str(data),
            "--train.steps", str(STEPS), *SMALL, *extra]  # fmt: skip


def start(data: Path, runs: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.scaling", *words(data, runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(series: subprocess.Popen[str]) -> None:
    """With its ranks, where a test failed."""
    if series.poll() is None:
        for process in (*psutil.Process(series.pid).children(), series):
            process.kill()
        series.communicate()


def wait_for_step(log: Path, step: int, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not (log.is_file() and f"step {step}/" in log.read_text()):
        assert time.monotonic() < deadline, f"{log} has no step {step}"
        time.sleep(0.05)


def kill_rank(series: int, rank: int, number: signal.Signals) -> None:
    """Of the run that the series' process has just under way."""
    for process in psutil.Process(series).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.environ().get("RANK") == str(rank):
                process.send_signal(number)
                return
    raise AssertionError(f"no rank {rank} runs")


def report(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, list[str]], str]:
    """The table's cells by number of ranks, and all that was printed."""
    monkeypatch.setattr(sys, "argv", ["scaling_report", str(runs / "tiny_align-weak")])
    scaling_report.main()
    lines = (runs / "tiny_align-weak" / "report.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)]
    return {row[0]: row for row in cells}, capsys.readouterr().out


def test_a_series_with_a_killed_run_goes_on_says_which_and_continues(
    mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    series = start(mixed_dataset, tmp_path)
    try:
        wait_for_step(tmp_path / "tiny_align-weak-002" / "log" / "rank-000.log", 5)
        kill_rank(series.pid, 1, signal.SIGKILL)
        shown, _ = series.communicate(timeout=400)
    finally:
        end(series)
    assert series.returncode == 1, shown
    assert "[2/3] 2 ranks, 12 samples a step: killed: rank 1 got SIGKILL" in shown
    assert "[3/3] 4 ranks, 24 samples a step: finished" in shown
    table, told = report(tmp_path, monkeypatch, capsys)
    assert [row[-1] for row in (table["1"], table["4"])] == ["finished", "finished"]
    killed = re.search(r"tiny_align-weak-002 has not finished: killed: rank 1 got SIGKILL at step (\d+) of 14", told)
    assert killed is not None, told
    assert 5 <= int(killed[1]) < STEPS
    assert table["1"][8] == "1.000"
    assert all(0 < float(row[8]) < 2 for row in table.values()), "efficiency"
    assert table["1"][2] == table["4"][2] == str(STEPS - 3), "steps measured"

    again = start(mixed_dataset, tmp_path)
    shown, _ = again.communicate(timeout=400)
    assert again.returncode == 0, shown
    assert shown.count("has finished before") == 2
    assert "[2/3] 2 ranks, 12 samples a step: finished" in shown
    table, told = report(tmp_path, monkeypatch, capsys)
    assert [row[-1] for row in table.values()] == ["finished"] * 3
    assert table["2"][2] == str(STEPS - 3), "the killed start's steps are not counted beside those that repeated them"
    events = EventAccumulator(str(tmp_path / "tiny_align-weak" / "tensorboard"))
    events.Reload()
    for tag in ("scaling/efficiency", "scaling/text_tokens_per_second_per_rank"):
        assert [point.step for point in events.Scalars(tag)] == [1, 2, 4]
    for name in ("throughput", "efficiency", "step_time"):
        assert (tmp_path / "tiny_align-weak" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    known = json.loads((tmp_path / "tiny_align-weak" / "series.json").read_text())
    assert {size: run["state"] for size, run in known["runs"].items()} == dict.fromkeys("124", "finished")

    changed = mistake(words(mixed_dataset, tmp_path, "--model.num-layers", "3"), monkeypatch, capsys)
    assert "is a series with another flag" in changed


def test_a_series_that_is_asked_to_stop_saves_and_leaves_with_85(mixed_dataset: Path, tmp_path: Path) -> None:
    series = start(mixed_dataset, tmp_path)
    try:
        wait_for_step(tmp_path / "tiny_align-weak-001" / "log" / "rank-000.log", 2)
        series.send_signal(signal.SIGINT)
        shown, _ = series.communicate(timeout=300)
    finally:
        end(series)
    assert series.returncode == 85, shown
    assert "1 rank, 6 samples a step: stop requested: saved, to be continued" in shown
    assert "stop requested (SIGINT): the same command continues the series" in shown
    assert not (tmp_path / "tiny_align-weak-002").exists()
    assert list((tmp_path / "tiny_align-weak-001" / "checkpoints").glob("step-*"))


def mistake(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["scaling", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_main(scaling.main)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert shown.count("\n") == 1, shown
    return shown


MISTAKES = {
    "a field": (["--train.step", "3"], "unknown setting --train.step: did you mean --train.steps"),
    "an own flag": (["--world-size", "3"], "unknown setting --world-size: did you mean --world-sizes"),
    "ranks": (["--parallel.tensor", "2"], r"with 1 rank: 1 rank cannot hold parallel.tensor \(2\)"),
    "strong batch": (
        ["--mode", "strong", "--train.global-batch-samples", "2"],
        r"with 4 ranks: .*\(2\) is not a multiple of 4",
    ),
    "weak batch": (
        ["--world-sizes", "2", "3", "--train.global-batch-samples", "5"],
        r"\(5\) of 2 ranks is no whole number on 3",
    ),
    "no data": (["--data.datasets", "nowhere"], "with 1 rank: nowhere is not a shard dataset"),
    "run.dir": (["--run.dir", "x"], "names its run folders itself: give --runs and --name"),
    "sizes": (["--world-sizes", "1", "1"], "--world-sizes is 1 1: wanted different numbers"),
    "nodes": (["--submit", "--gpus-per-node", "3"], "with 4 ranks: 4 GPUs are no whole number of nodes of 3"),
    "name": (["--name", "a/b"], "--name is 'a/b': it names folders"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_starts(
    name: str, mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, wanted = MISTAKES[name]
    assert re.search(wanted, mistake([*words(mixed_dataset, tmp_path), *more], monkeypatch, capsys))
    assert not list(tmp_path.iterdir())


def test_epochs_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["qwen2_0_5b_align", "--world-sizes", "8", "16"]
    assert "every size of the series would: give --train.steps" in mistake(argv, monkeypatch, capsys)


def test_weak_grows_the_batch_with_the_ranks_and_strong_keeps_it() -> None:
    for mode, wanted in (("weak", [128, 256, 1024]), ("strong", [128, 128, 128])):
        settings = Settings(world_sizes=(16, 2, 4), mode=mode)  # type: ignore[arg-type]
        flags = ["--train.steps", "5", "--train.global-batch-samples", "128"]
        members = scaling.plan(settings, "qwen2_0_5b_align", flags)
        assert [member.world_size for member in members] == [2, 4, 16]
        assert [member.config.global_batch for member in members] == wanted
        assert str(members[0].config.run_dir) == f"runs/qwen2_0_5b_align-{mode}-002"
        assert all(member.config.log.interval_steps == 1 for member in members)


def test_nodes_are_filled() -> None:
    assert [nodes_of(size, 8) for size in (1, 4, 8, 16, 64)] == [(1, 1), (1, 4), (1, 8), (2, 8), (8, 8)]
