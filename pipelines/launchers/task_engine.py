"""Many independent tasks, a bounded number at a time: by Ray, by processes of this machine, or in this process.

Tasks are functions of what they are given, so it does not matter which of these runs them, or that one runs twice.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, Protocol

from himix_megatron.runtime.process import die_with_parent

MAX_RETRIES = 3
"""Times that Ray starts a task again when its worker died."""


class Engine(Protocol):
    """Runs a function on many arguments."""

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Generator[Any, None, None]:
        """Results, as they come. Raises: what the function raises."""


@contextlib.contextmanager
def engine_started(kind: Literal["ray", "local"], num_workers: int | None) -> Iterator[Engine]:
    """An engine for as long as the block lasts."""
    if kind == "ray":
        with ray_started(num_workers) as workers:
            yield _Ray(workers)
    elif (workers := num_workers or os.cpu_count() or 1) == 1:
        yield _Here()
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent)
        try:
            yield _Processes(pool, workers)
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def ray_started(num_workers: int | None = None, *, object_store_bytes: int = 256 << 20) -> Iterator[int]:
    """Ray for as long as the block lasts; one that already runs in this process is used and left alone.

    Args: `object_store_bytes`: the default holds the texts of our own tasks under way, and nothing else.
    Yields: the number of tasks that fit at the same time. Several datasets made within one block start Ray once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about this run is sent anywhere
    import ray  # only this engine needs it

    was_running = ray.is_initialized()
    if not was_running:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {
                "address": "local",
                "num_cpus": num_workers or os.cpu_count(),
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "object_store_memory": object_store_bytes,
            }
        ray.init(**options)
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield num_workers or int(resources.get("CPU", 1))
    finally:
        if not was_running:
            ray.shutdown()


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise what a task of Ray's raised; Ray's copy of it has the worker's traceback for a message, and no errno."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        error.cause.add_note(str(error))
        raise error.cause from None


class _Ray:
    """One Ray task each, at most two per worker under way."""

    def __init__(self, workers: int) -> None:
        self._limit = 2 * workers

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Generator[Any, None, None]:
        """As Engine says."""
        import ray

        remote = ray.remote(function).options(num_cpus=1, max_retries=MAX_RETRIES)

        def finish(running: list[Any]) -> tuple[list[Any], list[Any]]:
            done, rest = ray.wait(running)
            with own_errors():
                return ray.get(done), rest

        yield from _bounded(tasks, lambda task: remote.remote(*task), finish, self._limit)


class _Processes:
    """The same in processes of this machine."""

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool, self._limit = pool, 2 * workers

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Generator[Any, None, None]:
        """As Engine says. Raises also: RuntimeError when a process died."""

        def finish(running: list[Future[Any]]) -> tuple[list[Any], list[Future[Any]]]:
            done, rest = wait(running, return_when=FIRST_COMPLETED)
            return [future.result() for future in done], list(rest)

        try:
            yield from _bounded(tasks, lambda task: self._pool.submit(function, *task), finish, self._limit)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (killed, or out of memory): the same command continues where this run stopped"
            ) from None


class _Here:
    """One after the other in this process."""

    def run(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Generator[Any, None, None]:
        """As Engine says."""
        yield from (function(*task) for task in tasks)


def _bounded(
    tasks: Iterable[tuple[Any, ...]],
    start: Callable[[tuple[Any, ...]], Any],
    finish: Callable[[list[Any]], tuple[list[Any], list[Any]]],
    limit: int,
) -> Iterator[Any]:
    """Keep `limit` tasks under way; results come as they are done."""
    running: list[Any] = []
    for task in tasks:
        running.append(start(task))
        if len(running) == limit:
            done, running = finish(running)
            yield from done
    while running:
        done, running = finish(running)
        yield from done
