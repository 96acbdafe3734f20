"""The part of a cluster's scheduler that recovery needs: start the ranks of a run, wait for them, start the same run again.

Ranks are forked from a server that has everything imported, in a process group of their own, and run what
`python -m pipelines.pretrain` runs. Flows in: a Config and a number of ranks; out: how each attempt ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from himix_megatron.config import Config
from himix_megatron.runtime.process import free_port
from himix_megatron.runtime.stop_signals import EXIT_REQUEUE

GRACE_SECONDS = 10.0
"""For the other ranks to leave by themselves when one is dead; then they are killed, as `srun --kill-on-bad-exit` does."""


@dataclass(frozen=True, slots=True)
class Ended:
    """One attempt."""

    codes: tuple[int, ...]
    """Exit codes by rank; negative: the signal that killed it."""
    seconds: float
    killed: tuple[int, ...]
    """Ranks that did not leave by themselves."""
    leaving_seconds: float
    """From the first death to the last exit."""

    @property
    def done(self) -> bool:
        """The run has come to its last step."""
        return not any(self.codes)

    @property
    def again(self) -> bool:
        """A scheduler starts the same command again: some rank asked for it or died, and none said that it would be in vain."""
        return any(self.codes) and all(code in (0, 1, EXIT_REQUEUE) or code not in (2, 3) for code in self.codes)


class Attempt:
    """The ranks of one start of a run."""

    def __init__(self, config: Config, ranks: int, out: Path, restarts: int = 0) -> None:
        """`out`: a folder for what the ranks print; `restarts`: of the job that this is, so far."""
        out.mkdir(parents=True, exist_ok=True)
        self.began, self.out = time.monotonic(), out
        context, port = multiprocessing.get_context("forkserver"), free_port()
        self.processes: list[BaseProcess] = []
        self.group = 0
        for rank in range(ranks):
            process = context.Process(target=_rank, args=(config, rank, ranks, port, self.group, out, restarts))
            process.start()
            self.processes.append(process)
            if rank == 0:
                assert process.pid is not None
                self.group = process.pid
                while process.is_alive() and not _leads(self.group):
                    time.sleep(0.01)

    def wait(self, timeout_seconds: float) -> Ended:
        """Until all ranks have ended. Raises: TimeoutError if none dies in that time; the ranks are killed then."""
        alive = dict(enumerate(self.processes))
        deadline, first = self.began + timeout_seconds, None
        killed: tuple[int, ...] = ()
        try:
            while alive:
                left = max(0.0, deadline - time.monotonic())
                # After a death, ranks that stand still are looked for: they cannot leave by themselves.
                wait([process.sentinel for process in alive.values()], timeout=left if first is None else min(left, 0.5))
                over = [rank for rank, process in alive.items() if not process.is_alive()]
                if not over and left > 0 and first is not None and not all(map(_stands_still, alive.values())):
                    continue
                if not over:
                    if first is None:
                        raise TimeoutError(f"ranks {sorted(alive)} still run after {timeout_seconds:.0f} s: {self.out}")
                    killed = tuple(alive)
                    self.kill()
                    deadline = time.monotonic() + GRACE_SECONDS
                for rank in over:
                    del alive[rank]
                if over and first is None:
                    first = time.monotonic()
                    deadline = first + GRACE_SECONDS
        finally:
            self.kill()
        now = time.monotonic()
        codes = tuple(process.exitcode if process.exitcode is not None else 1 for process in self.processes)
        return Ended(codes, now - self.began, killed, now - (first or now))

    def freezes(self, timeout_seconds: float) -> bool:
        """Wait until all ranks stand still, as on a node that nobody hears of any more. False: one has ended instead, or that
        took too long."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and all(process.is_alive() for process in self.processes):
            if all(map(_stands_still, self.processes)):
                return True
            time.sleep(0.1)
        return False

    def thaw(self) -> None:
        """The node is back, and goes on where it was."""
        os.killpg(self.group, signal.SIGCONT)

    def kill(self) -> None:
        """Every rank, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        for process in self.processes:
            process.join()


def _stands_still(process: BaseProcess) -> bool:
    try:
        return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def _leads(pid: int) -> bool:
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def _rank(config: Config, rank: int, ranks: int, port: int, group: int, out: Path, restarts: int) -> None:
    os.setpgid(0, group)
    with (out / f"rank-{rank}.txt").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.update(SLURM_JOB_ID="4711", SLURM_RESTART_COUNT=str(restarts))
    import torch

    from himix_megatron.training.loop import pretrain
    from pipelines.cli import run_main

    torch.set_num_threads(1)
    run_main(lambda: pretrain(config))
