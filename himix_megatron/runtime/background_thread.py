"""Work on a thread that nobody has to wait for: calls go in, futures come out, and a wait for one can be broken off.

Reading a step may take as long as a disk or a peer likes. Whoever waits for it must stay able to hear that the run is asked to
stop, and the process must be able to end while the read is still stuck.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from typing import Any, TypeVar

SLICE_SECONDS = 0.1
"""How long a wait lasts before it looks up."""

Result = TypeVar("Result")


class WaitInterruptedError(Exception):
    """A wait was broken off, since the run is asked to stop."""


class BackgroundThread:
    """A thread that makes calls one after the other. It ends with the process, also in the middle of a call."""

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
        """Wait until nothing is under way. Returns: whether that came true in time."""
        return self._thread is None or bool(wait_futures([self.start(int)], seconds).done)

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call  # else what was read last is kept until the next call


def wait_or_interrupt(future: Future[Result], stop_requested: Callable[[], bool]) -> Result:
    """The result of a call. Raises: what the call raised; WaitInterruptedError as soon as `stop_requested` says so."""
    while not wait_futures([future], SLICE_SECONDS).done:
        if stop_requested():
            raise WaitInterruptedError
    return future.result()
