"""A thread that makes calls one after the other: calls go in, futures come out. The process can end during a call.

Reading a step may take as long as a disk or a peer needs, and must not keep the process from ending.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundThread:
    """Makes calls in the order in which they were asked for. The thread starts with the first and is a daemon."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._name = name
        self._thread: threading.Thread | None = None

    def start(self, call: Callable[[], Result]) -> Future[Result]:
        """Ask for a call. Returns: its future."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        future: Future[Result] = Future()
        self._calls.put((future, call))
        return future

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until no call is under way. Returns: whether that came true in time."""
        return self._thread is None or bool(wait_futures([self.start(int)], seconds).done)

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # otherwise the last result is kept until the next call
