"""The ranks of a run on this machine, started and waited for as a scheduler does it; and chains of runs.

Flows in: a command and the number of ranks; out: how the run ended. As with torchrun (RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT), but the exit code of the rank that ended the run is kept: torchrun makes 1 of every code.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from himix_megatron.runtime.process import free_port
from himix_megatron.runtime.stop_signals import EXIT_REQUEUE, EXIT_STOPPED, STOP_SIGNALS, StopRequest

GRACE_SECONDS = 60.0
"""Time to save and exit for ranks that are stopped, or whose peer has failed: they get TERM, and KILL so much later."""
POLL_SECONDS = 0.2

_AGAIN = (EXIT_REQUEUE, *(-number for number in STOP_SIGNALS))
"""Saved; or hit by a signal before Python could listen, with nothing to save."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    code: int
    """0: all ranks ended with 0; 85: none failed, and the run is to be continued; otherwise the exit code of a rank that
    failed, negative for a signal (as in subprocess)."""
    rank: int
    """Which rank that was."""

    def __str__(self) -> str:
        if self.code < 0:
            return f"killed: rank {self.rank} got {signal.Signals(-self.code).name}"
        meaning = {0: "done", EXIT_REQUEUE: "stop requested: saved, to be continued", EXIT_STOPPED: "stopped on purpose"}
        return meaning.get(self.code, f"failed: rank {self.rank} left with exit code {self.code}")


def run_chain(stages: Sequence[tuple[str, Path, Sequence[str]]], world_size: int, request: StopRequest) -> int:
    """Run stages (name, run folder, command) one after the other, up to the first that does not finish.

    A stage that saves and asks for it is started again; a stop request lets the running stage save first.
    Returns: the exit code of the last stage, 128 + N for signal N.
    """
    for number, (name, run_dir, command) in enumerate(stages):
        code = EXIT_REQUEUE
        while code == EXIT_REQUEUE and not request.stop_requested:
            print(f"{name}: {world_size} rank{'s' if world_size > 1 else ''}, {run_dir}", flush=True)
            code = run_ranks(command, world_size, lambda: request.stop_requested).code
            if code == EXIT_REQUEUE and not request.stop_requested:
                print(f"{name} saved and is started again", flush=True)
        code = 128 - code if code < 0 else code
        if code:
            left = " and ".join(name for name, *_ in stages[number + 1 :])
            what = "saved: the same command goes on from here" if code == EXIT_REQUEUE else f"failed with exit code {code}"
            print(f"{name} {what}{f'; {left} not started' if left else ''}", flush=True)
            return code
        print(f"{name} has finished: {run_dir}", flush=True)
    return 0


def run_ranks(
    command: Sequence[str], world_size: int, stop_requested: Callable[[], bool], output: Path | None = None
) -> Ending:
    """Run a command on `world_size` ranks of this machine.

    Args: `stop_requested`: is asked 5 times a second; once it says True, the ranks are to save and exit; `output`: a file to
    which all they print is appended. Whatever ends this function early ends the ranks too.
    """
    with contextlib.ExitStack() as stack:
        file = None
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(output.open("ab"))
        ranks = []
        for env in _environments(world_size):
            # In their own session: the terminal's Ctrl-C reaches this process alone, which then lets the ranks save.
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
            ranks.append(process)
            stack.callback(process.wait)
            stack.callback(process.kill)
        return _wait(ranks, stop_requested)


def _environments(world_size: int) -> list[dict[str, str]]:
    """Each rank's environment: torchrun's variables, with a port that is free now; without them for one rank alone."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("SLURM_")}
    if world_size == 1:
        return [env]
    meeting = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # One thread per rank unless the user says otherwise: ranks that each use every core slow each other down many times over.
    shared = {"OMP_NUM_THREADS": "1", **env, **meeting}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def _wait(ranks: list[subprocess.Popen[bytes]], stop_requested: Callable[[], bool]) -> Ending:
    """Until all ranks have ended; after the first that fails the others are stopped too."""
    first, deadline = Ending(0, 0), math.inf
    while any(code is None for code in [process.poll() for process in ranks]):
        first = first if first.code else _ending(ranks)
        if (stop_requested() or first.code) and deadline == math.inf:
            deadline = time.monotonic() + GRACE_SECONDS
            for process in ranks:
                process.terminate()
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(POLL_SECONDS)
    return first if first.code not in (0, EXIT_REQUEUE) else _ending(ranks)


def _ending(ranks: list[subprocess.Popen[bytes]]) -> Ending:
    """Of the ranks that have ended so far, the one to blame: one that failed before one that saved, a killed one first."""
    codes = [(process.returncode, rank) for rank, process in enumerate(ranks) if process.returncode]
    failed = [Ending(code, rank) for code, rank in codes if code not in _AGAIN]
    saved = Ending(EXIT_REQUEUE, codes[0][1]) if codes else Ending(0, 0)
    return min(failed, key=lambda one: (one.code > 0, one.rank), default=saved)
