"""Asked to stop: by Slurm before a time limit or a preemption, or by hand.

TERM, USR1 and USR2 set a flag; ranks look at it together at the end of a step, save, and leave with exit code 85, which the
batch script answers with a requeue. Nothing is done inside the handlers themselves.
"""

from __future__ import annotations

import signal
from types import FrameType

REQUEUE = 85
"""Exit code: saved, please start this command again."""

STOPPED = 3
"""Exit code: gave up on purpose, for the reason in RUN/STOP; starting again would not help by itself."""

_ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this rank has been asked to stop; watches from its creation on."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in _ASKING:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)

    @staticmethod
    def leave_in_peace() -> None:
        """Ignore further requests until this process has ended.

        The first rank to leave with 85 makes srun send TERM to the others; one that dies of it turns the job's exit code
        into 143. Python resets every handler but `SIG_IGN` while it shuts down.
        """
        for number in _ASKING:
            signal.signal(number, signal.SIG_IGN)
