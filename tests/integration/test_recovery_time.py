"""From a rank's death to the first new step of the run's next start: real processes, started by torchrun."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.traces import lines_of

LIMIT_SECONDS = 20.0


def test_a_killed_run_does_a_new_step_within_20_seconds(mixed_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipelines.pretrain",
        "tiny_instruct", "--data.datasets", str(mixed_dataset), "--run.dir", str(run), "--train.steps", "100000",
        "--train.global-batch-samples", "8", "--train.micro-batch-samples", "2", "--checkpoint.interval-steps", "10",
        "--data.num-workers", "1", "--log.ledger",
    ]  # fmt: skip
    with subprocess.Popen(command) as first:
        try:
            wait_until(lambda: steps_done(run) > 12, 120)
            ranks = [p for p in psutil.Process(first.pid).children() if "pipelines.pretrain" in " ".join(p.cmdline())]
            assert len(ranks) == 2
            ranks[1].kill()
            died = time.monotonic()
            assert first.wait(60) != 0
        finally:
            first.kill()
    known, before = time.monotonic() - died, steps_done(run)
    with subprocess.Popen(command) as second:
        try:
            wait_until(lambda: steps_done(run) > before, 120)
            seconds = time.monotonic() - died
        finally:
            second.terminate()
            second.wait(60)
    print(f"death known after {known:.1f} s, first new step after {seconds:.1f} s")
    assert seconds <= LIMIT_SECONDS


def steps_done(run: Path) -> int:
    """The newest step in the ledger."""
    file = run / "ledger" / "steps.jsonl"
    return max((line["step"] for line in lines_of(file)), default=0) if file.is_file() else 0


def wait_until(is_so: Callable[[], bool], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)
