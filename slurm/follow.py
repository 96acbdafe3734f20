"""Follow a chain of jobs: their states from the controller, progress from RUN/status.json.

Flows in: stages and their job ids; out: a line for each stage, rewritten in place on a terminal, and the chain's exit code.
No accounting database is needed, and nothing waits for a result that a killed job never writes.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

from himix_megatron.monitoring.run_status import followed_status
from himix_megatron.runtime.log import clock
from himix_megatron.runtime.untrusted_files import escaped, printable
from slurm import scheduler
from slurm.job import Stage
from slurm.scheduler import Job

PLAIN_SECONDS = 30.0
"""Interval of progress lines away from a terminal; a new state is printed at once."""
_GONE = "GONE"


class StageWatch:
    """One stage of the chain while it is followed."""

    def __init__(self, stage: Stage, job_id: str):
        self.stage, self.job_id = stage, job_id
        self.job: Job | None = None
        self.has_ended = self.is_silent = False

    def look(self) -> None:
        """Ask the controller. An end state counts when seen twice: a job that is being requeued passes through some."""
        before = self.job
        try:
            found = scheduler.show(self.job_id)
        except scheduler.NoAnswerError:
            self.is_silent = True
            return
        self.is_silent = False
        self.job = found[0] if found else Job(self.job_id, _GONE, "None", 0, 0, "")
        self.has_ended = self.job.has_ended and before is not None and before.state == self.job.state

    @property
    def state(self) -> str:
        """The state in words."""
        if self.job is None or self.is_silent:
            return "unknown (Slurm does not answer)" if self.is_silent else "?"
        waits = f" ({self.job.reason})" if self.job.state == "PENDING" and self.job.reason != "None" else ""
        again = f", requeued {self.job.restarts} times" if self.job.restarts > 1 else ", requeued once"
        return f"{self.job.state.lower()}{waits}{again if self.job.restarts else ''}"

    def line(self) -> str:
        """State, step, loss and remaining time."""
        status = followed_status(self.stage.run_dir)
        words = [f"{self.stage.name:<8}  job {self.job_id}  {self.state}"]
        if status is not None and status.step:
            words.append(f"step {status.step}/{status.planned_steps}")
            words += [] if status.loss is None else [f"loss {status.loss:.6f}"]
            if self.job is not None and self.job.state == "RUNNING" and status.seconds_left is not None:
                words.append(f"remaining {clock(status.seconds_left)}")
        return escaped("  ".join(words))

    def exit_code(self) -> int:
        """0 if it ended well; else the job's own code, or 1 where it has none."""
        assert self.job is not None
        if self.job.state == _GONE:
            status = followed_status(self.stage.run_dir)
            return 0 if status is not None and status.state == "finished" else 1
        return 0 if self.job.is_good else self.job.exit_code or 1

    def outcome(self) -> str:
        """How it ended, and where to read why."""
        assert self.job is not None
        stop = self.stage.run_dir / "STOP"
        if self.exit_code() == 0:
            return f"{self.stage.name} has finished: {self.stage.run_dir}"
        if stop.is_file():
            return f"{self.stage.name} stopped on purpose: {printable(stop.read_text(errors='replace'))}"
        if self.job.state == "CANCELLED":
            why = "the stage before it failed" if "Dependency" in self.job.reason else "by hand"
            return f"{self.stage.name} was cancelled ({why})"
        what = "Slurm has forgotten the job before its end" if self.job.state == _GONE else self.job.state.lower()
        return f"{self.stage.name} failed: {what}, exit code {self.exit_code()}; see {self.stage.output(self.job_id)}"


def watch(chain: Sequence[tuple[Stage, str]]) -> int:
    """Follow the jobs of a chain until all have ended. Returns: the first failing stage's exit code, or 0."""
    stages = [StageWatch(stage, job_id) for stage, job_id in chain]
    screen = _Screen()
    changed = time.monotonic()
    while not all(one.has_ended for one in stages):
        states = [one.state for one in stages]
        for one in stages:
            if not one.has_ended:
                one.look()
        screen.show([(one.state, one.line()) for one in stages])
        if [one.state for one in stages] != states:
            changed = time.monotonic()
        # Ask less often in a run of days: the controller serves the whole cluster.
        time.sleep(min(10.0, 1.0 + 0.05 * (time.monotonic() - changed)))
    for one in stages:
        print(one.outcome(), flush=True)
    return next((code for one in stages if (code := one.exit_code())), 0)


class _Screen:
    """Prints the lines: in place on a terminal, else one after the other as they change."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._shown: list[str] = []
        self._printed: dict[int, tuple[tuple[str, bool], float]] = {}

    def show(self, lines: list[tuple[str, str]]) -> None:
        """`lines`: (state, whole line) of each stage."""
        if self.is_terminal:
            back = f"\x1b[{len(self._shown)}F" if self._shown else ""
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be found again
            self._shown = [line[:width] for _, line in lines]
            print(back + "\n".join(f"\x1b[2K{line}" for line in self._shown), flush=True)
            return
        for number, (state, line) in enumerate(lines):
            kind, now = (state, " step " in line), time.monotonic()
            before, at = self._printed.get(number, (None, 0.0))
            if kind != before or (now - at > PLAIN_SECONDS and state.startswith("running")):
                self._printed[number] = (kind, now)
                print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)
