"""How a process is stopped and saves first: the signals, the waits they interrupt, what the ranks agree on, and exit codes.

Slurm sends TERM, USR1 or USR2 before a time limit or a preemption; people send them by hand. A `StopRequest` records a signal.
Ranks agree on it at the next step boundary (`StopConsensus`), save, and exit with code 85, which the batch script answers with
a requeue. The handlers themselves do nothing more: a thread, which a signal wakes even while the main thread is inside native
code (the rendezvous, a collective, a read), passes it on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 85
"""Exit code: saved, please start this command again."""

EXIT_STOPPED = 3
"""Exit code: stopped on purpose, for the reason in RUN/STOP; starting again would not help by itself."""

FAILED = 1
"""Exit code: an error; the log has it."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler sends to a rank."""
COMMAND_STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGINT)
"""What stops a command that starts ranks itself: also Ctrl-C."""

_SLICE_SECONDS = 0.1
"""Time between two checks for a stop request in an interruptible wait."""

Result = TypeVar("Result")


# ---- the request ---------------------------------------------------------------------------------------------------


class StopRequest:
    """Whether this process has been requested to stop; listens for signals from its creation on.

    Until `on_request` names a listener, there is nothing to save: the process exits at once.
    """

    def __init__(
        self, signals: Sequence[signal.Signals] = STOP_SIGNALS, on_request: Callable[[str], Any] | None = None
    ) -> None:
        self.received: str | None = None
        """Why, e.g. `SIGUSR1`; None: not requested."""
        self.is_agreed = False
        """All ranks know of it, and have agreed to start no further step."""
        self._signals = signals
        self._on_request: Callable[[str], Any] = on_request or exit_without_saving
        self._inlet, outlet = os.pipe()
        os.set_blocking(outlet, False)
        self._outlet: int | None = outlet
        handle_signals(self._handle, signals)
        signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    @property
    def stop_requested(self) -> bool:
        """Whether this process knows of a request."""
        return self.received is not None

    def on_request(self, call: Callable[[str], Any]) -> None:
        """From now on a signal's name is passed to `call`, on a thread."""
        self._on_request = call

    def record(self, reason: str) -> None:
        """This process is requested to stop."""
        self.received = self.received or reason

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._on_request is not exit_without_saving:
            self.record(signal.Signals(number).name)

    def _listen(self) -> None:
        while numbers := os.read(self._inlet, 64):
            for number in numbers:
                if number in self._signals:
                    self.record(signal.Signals(number).name)
                    self._on_request(signal.Signals(number).name)

    def _close(self, handler: signal.Handlers) -> None:
        handle_signals(handler, self._signals)
        if self._outlet is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._outlet)
            self._outlet = None

    def ignore_signals(self) -> None:
        """Ignore further requests until this process has ended.

        The first rank that exits with 85 makes srun send TERM to the others; one that dies of it turns the job's exit code
        into 143. Python resets every handler but `SIG_IGN` while it shuts down.
        """
        self._close(signal.SIG_IGN)

    def restore_handlers(self) -> None:
        """Let signals end this process again, as they did before."""
        self._close(signal.SIG_DFL)


def handle_signals(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers, signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> None:
    """Set the handler of all stop signals."""
    for number in signals:
        signal.signal(number, handler)


# ---- among ranks ---------------------------------------------------------------------------------------------------


class StopConsensus:
    """How ranks stop at the same step. For each step every rank calls `wait` for its own data, then `keep_going`.

    A rank that learns of a request while it waits for data abandons the wait: no rank waits for a slow disk in order to stop.
    """

    def __init__(self, request: StopRequest, group: ProcessGroup) -> None:
        """`group`: of all ranks, for tensors in host memory."""
        self.request, self.group = request, group

    def wait(self, future: Future[Result]) -> Result | None:
        """The result of a call; None as soon as this rank knows of a request. Raises: what the call raised."""
        while not wait_futures([future], _SLICE_SECONDS).done:
            if self.request.stop_requested:
                return None
        return future.result()

    def keep_going(self) -> bool:
        """Whether no rank has been requested to stop; the same answer on all. Collective."""
        import torch

        stop_requested = torch.tensor(float(self.request.stop_requested))
        torch.distributed.all_reduce(stop_requested, op=torch.distributed.ReduceOp.MAX, group=self.group)
        if stop_requested.item():
            self.request.record("on another rank")
            self.request.is_agreed = True
        return not self.request.is_agreed


# ---- exits ---------------------------------------------------------------------------------------------------------


def exit_now(code: int) -> NoReturn:
    """End this process now, whatever its threads are doing. What it wrote so far is written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_without_saving(reason: str) -> NoReturn:
    """End this process, which is requested to stop before there is anything to save."""
    logger.warning("stop requested (%s) before the first step: nothing to save", reason)
    exit_now(unsaved_code())


def unsaved_code() -> int:
    """The exit code of a stop before the first step: 85, or the batch script's own (HIMIX_UNSAVED_CODE), which distinguishes it
    from a stop that made progress, so that a job that never starts is not requeued forever."""
    return int(os.environ.get("HIMIX_UNSAVED_CODE", EXIT_REQUEUE))
