"""A run's ranks as processes that can be signalled, stopped and killed, and that call a test's hook at failpoints."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from himix_megatron.config import Config
from himix_megatron.runtime.process import free_port

from .small_runs import small_config

PointHook = Callable[[int, str, int], None]
"""Called at every failpoint with the rank, the point, and how often the rank has reached it; a module-level function."""


def resilience_config(dataset: Path, run: Path, /, *, steps: int = 6, timeout_seconds: float = 60, **changes: Any) -> Config:
    """A run of 6 steps that trains all but the tower. `changes`: sections with fields to change, or a layout."""
    sections = {name: changes.pop(name) for name in ("checkpoint", "health", "log", "data", "train") if name in changes}
    config = small_config(dataset, run, parts=("language", "vision_kv"), steps=steps, **changes)
    config = replace(config, parallel=replace(config.parallel, timeout_seconds=timeout_seconds))
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in sections.items()})


class Ranks:
    """`with Ranks(config, 2) as ranks`: they run; what is left at the end is killed."""

    def __init__(self, config: Config, world_size: int, plan: PointHook | None = None, *, only: list[int] | None = None):
        self.config = config
        context = multiprocessing.get_context("forkserver")
        self.port = free_port()
        self.processes = {
            rank: context.Process(target=_rank, args=(config, rank, world_size, self.port, plan))
            for rank in only or range(world_size)
        }
        self.ended_at: dict[int, float] = {}

    def __enter__(self) -> Self:
        for process in self.processes.values():
            process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        if kind is not None:
            for file in sorted((self.config.run_dir / "log").glob("*.log")):
                print(f"---- {file.name}\n{file.read_text()}", file=sys.stderr)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def log(self, rank: int) -> str:
        file = self.config.run_dir / "log" / f"rank-{rank:03d}.log"
        return file.read_text() if file.is_file() else ""

    def wait_for(self, name: str, timeout_seconds: float = 60) -> None:
        """Until a rank has called `reached(config, name)`."""
        deadline = time.monotonic() + timeout_seconds
        while not (self.config.run_dir / f"reached-{name}").exists():
            assert time.monotonic() < deadline, f"nobody came to {name}"
            time.sleep(0.05)

    def codes(self, timeout_seconds: float = 60, *, but: int | None = None) -> list[int | None]:
        """Exit codes in the order of ranks, once all (`but` one) have ended; None: it runs on."""
        running = {process.sentinel: rank for rank, process in self.processes.items() if rank not in (but, *self.ended_at)}
        deadline = time.monotonic() + timeout_seconds
        while running and (ended := wait(list(running), timeout=max(0.0, deadline - time.monotonic()))):
            for sentinel in ended:
                assert isinstance(sentinel, int)
                self.ended_at[running.pop(sentinel)] = time.monotonic()
        return [process.exitcode for process in self.processes.values()]


def reached(name: str) -> None:
    """Tell the test, from within a hook."""
    Path(os.environ["RUN_DIR"], f"reached-{name}").touch()


def _rank(config: Config, rank: int, world_size: int, port: int, plan: PointHook | None) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1", RUN_DIR=str(config.run_dir),
    )  # fmt: skip
    config.run_dir.mkdir(parents=True, exist_ok=True)
    import torch

    from himix_megatron.runtime import failpoints
    from himix_megatron.training.loop import pretrain

    torch.set_num_threads(1)
    if plan is not None:
        failpoints.listeners.append(_counting(plan, rank))
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(pretrain(config))


def _counting(plan: PointHook, rank: int) -> Callable[[str, bool], None]:
    counts: Counter[str] = Counter()

    def act(point: str, _: bool) -> None:
        counts[point] += 1
        plan(rank, point, counts[point])

    return act
