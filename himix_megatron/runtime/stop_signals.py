"""Asked to stop: by Slurm before a time limit or a preemption, or by hand.

TERM, USR1 and USR2 set a flag; ranks agree on it at the next step boundary, save, and leave with exit code 85, which the
batch script answers with a requeue. Nothing is done inside the handlers themselves. A thread hears of a signal even while the
main thread is inside native code (meeting the other ranks, a collective, a read), and passes it on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

logger = logging.getLogger(__name__)

EXIT_REQUEUE = 85
"""Exit code: saved, please start this command again."""

EXIT_STOPPED = 3
"""Exit code: gave up on purpose, for the reason in RUN/STOP; starting again would not help by itself."""

FAILED = 1
"""Exit code: something broke; the log says what."""

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this rank has been asked to stop; watches from its creation on.

    Until `on_request` says who is to be told, there is nothing to lose: the process leaves with 85 at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Why, e.g. `SIGUSR1`; None: not asked."""
        self.is_agreed = False
        """All ranks know of it, and have agreed to do no further step."""
        self._tell: Callable[[str], None] = exit_without_saving
        self._inlet, outlet = os.pipe()
        os.set_blocking(outlet, False)
        self._outlet: int | None = outlet
        for number in _ASKING:
            signal.signal(number, self._note)
        signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, name="signals", daemon=True).start()

    @property
    def stop_requested(self) -> bool:
        """Whether this rank knows of a request."""
        return self.received is not None

    def on_request(self, tell: Callable[[str], None]) -> None:
        """From now on a signal is handed to `tell`, on a thread, with its name."""
        self._tell = tell

    def record(self, reason: str) -> None:
        """Somebody asks this rank to stop."""
        self.received = self.received or reason

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._tell is not exit_without_saving:
            self.record(signal.Signals(number).name)

    def _hear(self) -> None:
        while numbers := os.read(self._inlet, 64):
            for number in numbers:
                if number in _ASKING:
                    self.record(signal.Signals(number).name)
                    self._tell(signal.Signals(number).name)

    def _close(self, handler: signal.Handlers) -> None:
        for number in _ASKING:
            signal.signal(number, handler)
        if self._outlet is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._outlet)
            self._outlet = None

    def ignore_signals(self) -> None:
        """Ignore further requests until this process has ended.

        The first rank to leave with 85 makes srun send TERM to the others; one that dies of it turns the job's exit code
        into 143. Python resets every handler but `SIG_IGN` while it shuts down.
        """
        self._close(signal.SIG_IGN)

    def restore_handlers(self) -> None:
        """Let signals end this process again, as they did before."""
        self._close(signal.SIG_DFL)


def exit_now(code: int) -> NoReturn:
    """End this process now, whatever its threads are doing. What it wrote so far is written."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_without_saving(reason: str) -> NoReturn:
    """End this process, which has been asked to stop before there was anything to save."""
    logger.warning("asked to stop (%s) before the first step: nothing to save", reason)
    exit_now(unsaved_code())


def unsaved_code() -> int:
    """85; or what the batch script wants instead of it (HIMIX_UNSAVED_CODE), to tell a run that never begins from one that gets
    on a little each time: that one is requeued for ever."""
    return int(os.environ.get("HIMIX_UNSAVED_CODE", EXIT_REQUEUE))
