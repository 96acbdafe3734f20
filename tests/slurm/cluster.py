"""A real Slurm for tests: submit a job, ask for its state, wait for what it says or leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support import ROOT

PRETRAIN = "slurm/pretrain_himix.sh"
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


@dataclass(frozen=True, slots=True)
class Slurm:
    """The private cluster of a test session."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands and for jobs; of the tests' own environment what programs need, and nothing of a job's."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "HIMIX_"))}
        return clean | {"SLURM_CONF": str(self.folder / "slurm.conf"), "HIMIX_VENV": sys.prefix}

    def run(self, *command: str | Path, check: bool = True, **extra: str) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, in the repository's root."""
        return subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment | extra,
            capture_output=True,
            text=True,
            timeout=60,
            check=check,
        )

    def dev(self, command: str) -> str:
        """tools/dev_slurm.py on this cluster."""
        return self.run(sys.executable, "-m", "tools.dev_slurm", command, "--dir", self.folder).stdout

    def submit(self, output: Path, *words: str | Path, **extra: str) -> Job:
        """`sbatch --output OUTPUT WORDS`: options, a script and its arguments. `extra`: further environment."""
        done = self.run("sbatch", "--parsable", "--output", output, *words, **extra)
        return Job(self, done.stdout.strip(), output)


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job, through all its attempts."""

    slurm: Slurm
    id: str
    output: Path

    def field(self, name: str) -> str:
        """A field of `scontrol show job`, e.g. JobState, ExitCode, Restarts."""
        shown = self.slurm.run("scontrol", "show", "job", "-o", self.id).stdout
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, f"no {name} in {shown}"
        return found[1]

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.is_file() else ""

    @property
    def code(self) -> int:
        """Its exit code."""
        return int(self.field("ExitCode").split(":")[0])

    def wait(self, *, timeout_seconds: float = 120) -> str:
        """Until it has ended. Returns: its state."""
        wait_until(lambda: self.state in FINAL, lambda: f"job {self.id} is {self.state}:\n{self.text[-3000:]}", timeout_seconds)
        return self.state

    def wait_for(self, text: str, *, times: int = 1, timeout_seconds: float = 120) -> None:
        """Until it has printed a text so many times."""

        def printed() -> bool:
            if self.text.count(text) >= times:
                return True
            assert self.state not in FINAL, f"job {self.id} ended before it said {text!r}:\n{self.text[-3000:]}"
            return False

        wait_until(
            printed, lambda: f"job {self.id} ({self.state}) has not said {text!r}:\n{self.text[-3000:]}", timeout_seconds
        )

    def cancel(self, *options: str) -> None:
        """`scancel`, e.g. with --signal=USR1, which goes to the ranks and leaves the batch script alone."""
        self.slurm.run("scancel", *options, self.id, check=False)


def wait_until(ready: Callable[[], bool], told: Callable[[], str], timeout_seconds: float) -> None:
    """Poll, a few times a second. Raises: AssertionError with what is `told`."""
    deadline = time.monotonic() + timeout_seconds
    while not ready():
        assert time.monotonic() < deadline, told()
        time.sleep(0.3)


def step_now(run: Path) -> int:
    """The last step in the ledger of rank 0; 0 before the first."""
    file = run / "ledger" / "rank-000.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return max((int(json.loads(line)["step"]) for line in lines if line.endswith("}")), default=0)


def steps_taken(run: Path) -> list[int]:
    """Every step that the ledger of rank 0 has, in the order in which they were taken: one that was lost is there twice."""
    steps: list[int] = []
    for line in (run / "ledger" / "rank-000.jsonl").read_text().splitlines():
        step = int(json.loads(line)["step"])
        if not steps or steps[-1] != step:
            steps.append(step)
    return steps


def processes_of(job: Job) -> list[psutil.Process]:
    """What runs of a job on any node: its shells and ranks, and what those started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if (
                environment.get("SLURM_JOB_ID") == job.id
                and environment.get("SLURM_CONF") == job.slurm.environment["SLURM_CONF"]
            ):
                found.append(process)
    return found


def rank_process(job: Job, rank: int) -> psutil.Process:
    """The Python process of a rank."""
    found = [
        process
        for process in processes_of(job)
        if process.environ().get("SLURM_PROCID") == str(rank) and "pipelines.pretrain" in process.cmdline()[1:4]
    ]
    assert found, job.text
    return min(found, key=lambda process: process.create_time())
