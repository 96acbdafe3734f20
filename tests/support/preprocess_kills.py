"""Preprocessing in a process of its own, killed at a random moment, run again, and compared byte for byte.

Whom: the driver, or one worker, while shards are made or once a shard is half written. A killed driver must take its workers
along; under Ray a killed worker must cost nothing, not even a second run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from himix_megatron.runtime.durable_files import file_digest
from tests.support import ROOT

RUN_SECONDS = 300
MAX_TRIES = 10
ORPHAN_SECONDS = 30
"""So long may a worker outlive its driver."""


@dataclass(frozen=True)
class Source:
    """What is preprocessed again and again."""

    name: str
    annotations: Path
    images: Path
    samples_per_shard: int

    def command(self, out: Path, engine: str) -> list[str]:
        words = [sys.executable, "-m", "pipelines.preprocess", "--annotations", self.annotations, "--images", self.images]
        words += ["--out", out, "--engine", engine, "--num-workers", 2, "--samples-per-shard", self.samples_per_shard]
        return [*map(str, words), "--name", "set", "--tokenizer", "bytes", "--template", "tiny"]


@dataclass
class Undisturbed:
    """What a run that nobody disturbs leaves, and how long it takes."""

    digests: dict[str, str]
    num_shards: int
    seconds: dict[str, float] = field(default_factory=dict)
    """By engine: from the first shard begun to the end."""


@dataclass(frozen=True)
class Outcome:
    """One killed run."""

    engine: str
    victim: str
    moment: str
    shards_before: int
    """Shards that had a receipt when the next run began."""
    orphan_seconds: float
    """How long the last worker outlived a killed driver."""
    error: str = ""


def start(source: Source, out: Path, engine: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        source.command(out, engine), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def run(source: Source, out: Path, engine: str = "local") -> None:
    process = start(source, out, engine)
    _, errors = process.communicate(timeout=RUN_SECONDS)
    assert process.returncode == 0, errors.decode()[-2000:]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path).sha256 for path in files}


def undisturbed(source: Source, folder: Path, engines: tuple[str, ...] = ("local", "ray")) -> Undisturbed:
    """Run once with each engine. All must leave the same."""
    found = None
    for engine in engines:
        out = folder / f"undisturbed-{engine}"
        process = start(source, out, engine)
        wait_for_attempt(process, out)
        begun = time.monotonic()
        _, errors = process.communicate(timeout=RUN_SECONDS)
        assert process.returncode == 0, errors.decode()[-2000:]
        seconds = time.monotonic() - begun
        left = digests(out)
        found = found or Undisturbed(left, len(list((out / "receipts").iterdir())))
        assert left == found.digests
        found.seconds[engine] = seconds
        shutil.rmtree(out)
    assert found is not None
    return found


def wait_for_attempt(process: subprocess.Popen[bytes], out: Path) -> Path | None:
    """Wait until shards are being made. Returns: the attempt's folder; None: the run ended before it was seen."""
    deadline = time.monotonic() + RUN_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        for attempt in out.glob(".partial-*"):
            return attempt
        time.sleep(0.002)
    return None


def trial(source: Source, wanted: Undisturbed, folder: Path, draw: random.Random, engine: str) -> Outcome:
    """Kill one run, run again, compare."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    victim = draw.choice(("driver", "driver", "worker"))
    moment = draw.choice(("while shards are made", "in the middle of a file"))
    share, pick = draw.random(), draw.random()
    for tries in range(MAX_TRIES):
        process = start(source, out, engine)
        family = _wait_and_kill(process, out, wanted, victim, moment, share * wanted.seconds[engine], pick)
        _, errors = process.communicate(timeout=RUN_SECONDS)
        if family is not None:
            break
        # The run was quicker this time; or it failed by itself, e.g. Ray did not start on a machine that is overloaded.
        assert tries < MAX_TRIES - 1, errors.decode()[-2000:]
        share *= 0.7
        shutil.rmtree(out, ignore_errors=True)
    orphan_seconds = _wait_for_end(family)
    before = len(list((out / "receipts").glob("*.json")))
    outcome: dict[str, Any] = {"engine": engine, "victim": victim, "moment": moment, "shards_before": before}
    if victim == "worker" and engine == "ray":
        if process.returncode != 0:
            return Outcome(**outcome, orphan_seconds=0, error=f"the driver did not survive: {errors.decode()[-1000:]}")
        if digests(out) != wanted.digests:
            return Outcome(**outcome, orphan_seconds=0, error="the run that lost a worker left other bytes")
    if victim == "worker" and engine == "local" and process.returncode not in (0, 1):
        return Outcome(**outcome, orphan_seconds=0, error=f"exit code {process.returncode}")
    if orphan_seconds > ORPHAN_SECONDS:
        return Outcome(**outcome, orphan_seconds=orphan_seconds, error="a worker outlived its driver")
    run(source, out)
    error = "" if digests(out) == wanted.digests else "the next run left other bytes"
    return Outcome(**outcome, orphan_seconds=round(orphan_seconds, 2), error=error)


def _wait_and_kill(
    process: subprocess.Popen[bytes], out: Path, wanted: Undisturbed, victim: str, moment: str, seconds: float, pick: float
) -> list[psutil.Process] | None:
    """Kill at the moment. Returns: the processes that the driver had; None: the run ended first."""
    attempt = wait_for_attempt(process, out)
    if attempt is None:
        return None
    if moment == "while shards are made":
        time.sleep(seconds)
    else:
        time.sleep(seconds * 0.8)
        while process.poll() is None and not any(path.stat().st_size > 0 for path in _written(attempt)):
            time.sleep(0.001)
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        target = process.pid
        if victim == "worker":
            workers = [item.pid for item in family if _is_worker(item)]
            if not workers:
                return None
            target = workers[int(pick * len(workers))]
        if process.poll() is not None:
            return None
        os.kill(target, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
    return family if victim == "driver" else []


def _written(attempt: Path) -> list[Path]:
    """The tars that are being written; without those that were renamed while we looked."""
    return [path for path in attempt.glob("*.tar") if path.exists()]


def _is_worker(process: psutil.Process, names: tuple[str, ...] = ("ray::make_shard",)) -> bool:
    """Of this machine's pool, or of Ray and at work."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "spawn_main" in line or line.startswith(names)


def _wait_for_end(family: list[psutil.Process]) -> float:
    """Seconds until all workers are gone. Ray's agents, which write nothing, stay for minutes: they are ended here."""
    begun = time.monotonic()
    workers = [process for process in family if _is_worker(process, ("ray::make_shard", "ray::IDLE"))]
    _, alive = psutil.wait_procs(workers, timeout=ORPHAN_SECONDS)
    seconds = time.monotonic() - begun
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return seconds if not alive else ORPHAN_SECONDS + 1


def as_line(outcome: Outcome) -> dict[str, Any]:
    """For a report."""
    return asdict(outcome)
