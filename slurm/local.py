"""A chain of stages on this machine, without Slurm, in its manners: one process per rank, one stage after the other.

Flows in: stages; out: their exit code. A stage that saves and asks to be started again (exit code 85) is started again; one
that fails ends the chain; a rank that dies ends the others. Ctrl-C and TERM let the running stage save first.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

from himix_megatron.runtime.stop_signals import EXIT_REQUEUE
from slurm.job import Stage, training_command

KILL_SECONDS = 30.0
"""What ranks get to save and leave once they are told to, as Slurm's KillWait."""

_AGAIN = (EXIT_REQUEUE, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2)
"""Saved; or met by a signal before Python could listen, with nothing to save."""


class Local:
    """Runs a chain; watches for signals from its creation on."""

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.stop_requested = False
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._ask)

    def _ask(self, _: int, __: FrameType | None) -> None:
        self.stop_requested = True
        self._tell(signal.SIGTERM)

    def run(self, stages: Sequence[Stage]) -> int:
        """All stages, up to the first that does not end well. Returns: its exit code, or 0."""
        for stage in stages:
            code = EXIT_REQUEUE if self.stop_requested else self._run_stage(stage)
            if code:
                left = stages[list(stages).index(stage) + 1 :]
                instead = f"; {' and '.join(one.name for one in left)} not started" if left else ""
                what = "saved: the same command goes on from here" if code == EXIT_REQUEUE else f"failed with exit code {code}"
                print(f"{stage.name} {what}{instead}", flush=True)
                return code
            print(f"{stage.name} has finished: {stage.run_dir}", flush=True)
        return 0

    def _run_stage(self, stage: Stage) -> int:
        while True:
            print(f"{stage.name}: {self.ranks} rank{'s' if self.ranks > 1 else ''}, {stage.run_dir}", flush=True)
            code = self._attempt(stage)
            if code != EXIT_REQUEUE or self.stop_requested:
                return code
            print(f"{stage.name} saved and is started again", flush=True)

    def _attempt(self, stage: Stage) -> int:
        """Start the ranks once. Returns: the code of the first that failed; 85 if none did and one left with that; or 0."""
        # Their own session: the terminal's Ctrl-C comes to us alone, and the ranks are told in the way they understand.
        command = training_command(stage.words)
        self._processes = [subprocess.Popen(command, env=env, start_new_session=True) for env in _environments(self.ranks)]
        if self.stop_requested:  # while they were being started
            self._tell(signal.SIGTERM)
        codes, deadline = [], float("inf")
        while any(process.poll() is None for process in self._processes):
            codes = codes or [process.returncode for process in self._processes if process.returncode]
            if codes and deadline == float("inf"):
                deadline = time.monotonic() + KILL_SECONDS
                self._tell(signal.SIGTERM)
            if time.monotonic() > deadline:
                self._tell(signal.SIGKILL)
            time.sleep(0.2)
        codes += [process.returncode for process in self._processes if process.returncode]
        self._processes = []
        failed = [code for code in codes if code not in _AGAIN]
        code = failed[0] if failed else EXIT_REQUEUE if codes else 0
        return 128 - code if code < 0 else code

    def _tell(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def _environments(ranks: int) -> list[dict[str, str]]:
    """Each rank's environment: torchrun's variables, on a port that is free now; none of them for one rank alone."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") and not name.startswith("SLURM_")
    }
    if ranks == 1:
        return [inherited]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # One thread a rank unless the user says otherwise: ranks that each take every core slow each other down many times over.
    shared = {
        "OMP_NUM_THREADS": "1",
        **inherited,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
