"""Ranks of one run on this machine, started and waited for as a scheduler does it.

Flows in: a command and the number of ranks; out: how the run ended. Like torchrun (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), except that the exit code of the rank that ended the run comes back as it was: torchrun makes 1 of everything.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from himix_megatron.runtime.stop_signals import EXIT_REQUEUE, EXIT_STOPPED

GRACE_SECONDS = 60.0
"""Ranks that are asked to stop, or that miss one that failed, get TERM, and so much later KILL."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    code: int
    """Exit code of the first rank that did not end with 0, negative for a signal (as subprocess does it); 0: all did."""
    rank: int
    """Which rank that was."""

    def __str__(self) -> str:
        if self.code < 0:
            return f"killed: rank {self.rank} got {signal.Signals(-self.code).name}"
        meaning = {0: "done", EXIT_REQUEUE: "stop requested: saved, to be continued", EXIT_STOPPED: "stopped on purpose"}
        return meaning.get(self.code, f"failed: rank {self.rank} left with exit code {self.code}")


def run_ranks(command: Sequence[str], world_size: int, output: Path, watch: Callable[[], bool]) -> Ending:
    """Run a command on `world_size` ranks of this machine; all they print is appended to `output`.

    `watch` is called 5 times a second; once it returns True, the ranks are asked to save and stop. Whatever ends this function
    early ends the ranks too.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        ranks = [_start(command, rank, world_size, port, file) for port in (_free_port(),) for rank in range(world_size)]
        try:
            return _wait(ranks, watch)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _start(command: Sequence[str], rank: int, world_size: int, port: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # One thread a rank, as torchrun does it, and for one rank too: sizes are to be compared.
    env = {"OMP_NUM_THREADS": "1", **os.environ, **{name: str(value) for name, value in place.items()}}
    # In a group of its own: Ctrl-C reaches the series alone, which then asks the ranks to save.
    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
    )


def _wait(ranks: list[subprocess.Popen[bytes]], watch: Callable[[], bool]) -> Ending:
    """Until all have ended; the first that fails takes the others along."""
    ending, deadline = Ending(0, 0), math.inf
    while any(code is None for code in [process.poll() for process in ranks]):
        ending = ending if ending.code else _first(ranks)
        if (watch() or ending.code) and deadline == math.inf:
            deadline = time.monotonic() + GRACE_SECONDS
            for process in ranks:
                process.terminate()
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(POLL_SECONDS)
    return ending if ending.code else _first(ranks)


def _first(ranks: list[subprocess.Popen[bytes]]) -> Ending:
    """Of the ranks that did not end with 0 so far, the one to blame: a killed one before those that missed it."""
    failed = [Ending(process.returncode, rank) for rank, process in enumerate(ranks) if process.returncode]
    return min(failed, key=lambda one: (one.code > 0, one.rank), default=Ending(0, 0))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
