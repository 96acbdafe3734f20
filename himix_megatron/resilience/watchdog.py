"""The ranks' eyes on each other: a dead, failed or hung rank ends all of them, and one that is asked to stop is heard by all.

Flows in: this rank's marks of progress; out: the end of this process, with the reason in its log. gloo notices a closed socket
only inside a collective, NCCL does not at all, and neither says who hung. So each rank keeps one TCP connection to rank 0,
which a thread reads beside the training. A connection that closes without a goodbye is a death. While all is well nothing is
sent.

    rank -> 0: asked, failed, stuck, stands, bye          0 -> rank: stop, leave, show, end, bye

Rank 0's thread costs one epoll entry a rank. The kernel's keepalive finds a node that lost power, within half a minute.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..config import Config
from ..distributed.topology import Topology
from ..runtime import failpoints
from ..runtime.errors import StartError
from ..runtime.stop_signals import FAILED, StopRequest, exit_now, exit_without_saving, unsaved_code
from .watchdog_links import PeerLink, connect_ranks

logger = logging.getLogger(__name__)

_GATHER_SECONDS = 0.2
"""After the first sign of trouble: who else is in trouble, so that the cause is named and not a consequence."""
_ANSWER_SECONDS = 2.0
"""What a rank has to answer in; a stopped one, or one stuck in native code that holds Python's lock, does not."""


class Watchdog:
    """Watches from `with` to the end of it; on the way out peers are told whether this rank failed or is done.

    `heartbeat` says that this rank makes progress. Without it for `timeout_seconds`, all ranks write the stacks of their
    threads to their logs, the one that is behind is named, and all end.
    """

    def __init__(
        self,
        request: StopRequest,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        on_exit: Callable[[int, str], object] = lambda code, reason: None,
    ) -> None:
        """`on_exit`: called with exit code and reason before this watchdog ends the process."""
        self._on_exit = on_exit
        self.request, self.rank, self.world_size, self.timeout_seconds = request, rank, world_size, timeout_seconds
        self.log_file = run_dir / "log" / f"rank-{rank:03d}.log"
        self._marks, self._point, self._marked_at = 0, "start", time.monotonic()
        self._armed_at = 0.0
        self._selector = selectors.DefaultSelector()
        self.links: dict[int, PeerLink] = {}
        """To the other ranks, on rank 0; to rank 0, on the others."""
        self._lock = threading.Lock()
        self._has_begun = self._is_closing = False
        self._failure: str | None = None
        self._verdict = threading.Event()
        self._trouble: dict[int, str] = {}
        self._judge_at: float | None = None
        self._positions: dict[int, list[Any]] | None = None

    @classmethod
    def over(
        cls, config: Config, topology: Topology, host: str, request: StopRequest, on_exit: Callable[[int, str], object]
    ) -> Self:
        """A watch over the ranks of a run, which have met; connects them."""
        watch = cls(
            request,
            config.run_dir,
            rank=topology.rank,
            world_size=topology.world_size,
            timeout_seconds=config.parallel.timeout_seconds,
            on_exit=on_exit,
        )
        watch.links = connect_ranks(topology, host, config.parallel.timeout_seconds)
        return watch

    # ---- called by the training, on the main thread ---------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._stack_file = self.log_file.open("ab")
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        for link in self.links.values():
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        failpoints.listeners.insert(0, self._at_failpoint)
        self.heartbeat("start")
        self.request.on_request(self._asked)
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()
        if self.request.received:
            self._asked(self.request.received)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StartError):
            self._failed(f"{type(error).__name__}: {error}")
            self.request.restore_handlers()
        else:
            self.request.ignore_signals()
        failpoints.listeners.remove(self._at_failpoint)
        self._is_closing = True
        self._say_all("bye")
        self._wake.send(b"x")
        self._thread.join(_ANSWER_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        for link in self.links.values():
            link.socket.close()
        self._selector.close()
        for end in (self._wake, self._woken, self._stack_file):
            end.close()

    def heartbeat(self, point: str) -> None:
        """This rank has come to a point of its work: it does not hang."""
        # Ranks wait for a save differently often: counted, that would tell nothing of who is behind.
        self._marks, self._point, self._marked_at = self._marks + (point != "wait/save"), point, time.monotonic()
        if self._marked_at - self._armed_at > 1 or not self._armed_at:
            # A thread of C: it writes the stacks also where native code holds Python's lock and ours cannot run.
            later = self.timeout_seconds + 2 * _ANSWER_SECONDS + 3  # after rank 0 has named who is to blame
            faulthandler.dump_traceback_later(later, exit=True, file=self._stack_file)
            self._armed_at = self._marked_at

    def _at_failpoint(self, name: str, progress: bool) -> None:
        if progress:
            self.heartbeat(name)

    def begin_steps(self) -> None:
        """From now on there may be something to save."""
        with self._lock:
            self._has_begun = True

    def _failed(self, reason: str) -> None:
        """Tell the others. Where this rank fails only because another one died, it says so in one line and ends here."""
        self._failure = reason
        if self.rank == 0:
            self._wake.send(b"x")
        else:
            self._say_all("failed", reason=reason)
        if self.links:
            self._verdict.wait(_ANSWER_SECONDS / 2)

    # ---- on the watching thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        tick = min(0.5, self.timeout_seconds / 4)
        while not self._is_closing:
            for key, _ in self._selector.select(0.05 if self._judge_at or self._positions is not None else tick):
                if key.data is None:
                    self._woken.recv(64)
                else:
                    self._read(key.data)
            self._look()

    def _look(self) -> None:
        """What is due now."""
        now = time.monotonic()
        if self._failure and self.rank == 0 and not self._verdict.is_set():
            self._note_trouble(0, f"failed: {self._failure}")
        if self._judge_at is not None and now >= self._judge_at:
            self._judge()
        elif self._judge_at is None and not self._is_closing and now - self._marked_at > self.timeout_seconds:
            self._show_stacks()
            self._say_all("stuck" if self.rank else "show")
            self._judge_at = now + _ANSWER_SECONDS

    def _read(self, link: PeerLink) -> None:
        for line in link.lines():
            if line is None:
                self._selector.unregister(link.socket)
                if not link.is_over and not self._is_closing:
                    self._note_trouble(link.rank, "died")
            else:
                getattr(self, f"_on_{line.pop('kind')}")(link, **line)

    def _on_bye(self, link: PeerLink) -> None:
        link.is_over = True

    def _on_asked(self, _: PeerLink, reason: str) -> None:
        self._asked(reason)

    def _on_failed(self, link: PeerLink, reason: str) -> None:
        self._note_trouble(link.rank, f"failed: {reason}")

    def _on_stuck(self, _: PeerLink) -> None:
        if self._positions is None:
            self._show_stacks()
            self._say_all("show")
            self._judge_at = time.monotonic() + _ANSWER_SECONDS

    def _on_show(self, link: PeerLink) -> None:
        if self._positions is None:
            self._show_stacks()
        assert self._positions is not None
        link.send("stands", at=self._positions[self.rank])
        self._judge_at = time.monotonic() + 2 * _ANSWER_SECONDS  # rank 0 answers before

    def _on_stands(self, link: PeerLink, at: list[Any]) -> None:
        if self._positions is not None:
            self._positions[link.rank] = at
            if len(self._positions) == self.world_size:
                self._judge_at = time.monotonic()

    def _on_stop(self, _: PeerLink, reason: str) -> None:
        self.request.record(reason)

    def _on_leave(self, _: PeerLink, reason: str) -> None:
        self._leave_unsaved(reason)

    def _on_end(self, _: PeerLink, reason: str, ranks: list[int]) -> None:
        self._end(reason, ranks)

    # ---- asked to stop --------------------------------------------------------------------------------------------------

    def _asked(self, reason: str) -> None:
        """Somebody asks this rank. Rank 0 decides for all: no step can be done before it begins its steps."""
        self.request.record(reason)
        if self.rank:
            self._say_all("asked", reason=reason)
            return
        with self._lock:
            if self._has_begun:
                self._say_all("stop", reason=reason)
            else:
                self._say_all("leave", reason=reason)
                self._leave_unsaved(reason)

    def _leave_unsaved(self, reason: str) -> None:
        self._part()
        self._on_exit(unsaved_code(), reason)
        exit_without_saving(reason)

    # ---- trouble --------------------------------------------------------------------------------------------------------

    def _note_trouble(self, rank: int, what: str) -> None:
        """A rank is dead or failed; a moment later `_judge` says so."""
        if self._trouble.get(rank, "died") == "died":
            self._trouble[rank] = what
        if self._judge_at is None:
            self._judge_at = time.monotonic() + (_GATHER_SECONDS if self.rank == 0 else 0)

    def _judge(self) -> None:
        """Rank 0: name who is to blame, and end all. Another rank comes here only if rank 0 cannot."""
        self._judge_at = None
        if self.rank:
            self._end("rank 0 died" if self._trouble else _hung({**(self._positions or {}), 0: None}), [0])
            return
        if self._trouble:
            dead = sorted(rank for rank, what in self._trouble.items() if what == "died")
            ranks = dead or sorted(self._trouble)
            reason = "; ".join(f"rank {rank} {self._trouble[rank]}" for rank in ranks[:4])
            reason += f"; and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        else:
            stands: dict[int, list[Any] | None] = dict.fromkeys(range(self.world_size))
            reason, ranks = f"no progress for {self.timeout_seconds:.0f} s: {_hung({**stands, **(self._positions or {})})}", []
        self._say_all("end", reason=reason[:2000], ranks=ranks)
        self._end(reason, ranks)

    def _end(self, reason: str, ranks: list[int]) -> None:
        """End this process, unless it is already ending by an error of its own."""
        if self._failure and self.rank in ranks:
            self._verdict.set()
            return
        # On stderr once: thousands of ranks have the same to say.
        speaks = self.rank == (1 if 0 in ranks else 0)
        logger.log(logging.ERROR if speaks else logging.WARNING, "%s: this rank ends too", reason)
        if self.rank == 0:
            self._part()
        self._on_exit(FAILED, reason)
        exit_now(FAILED)

    def _part(self) -> None:
        """Say goodbye so that what was sent before arrives: closing with unread input would take it back."""
        self._say_all("bye")
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
        time.sleep(_GATHER_SECONDS)

    def _show_stacks(self) -> None:
        """Write where all threads of this process are to its log, and note how far it came."""
        seconds = time.monotonic() - self._marked_at
        self._positions = {self.rank: [self._marks, self._point, round(seconds, 1)]}
        logger.warning("no progress on some rank; this one came to %s %.1f s ago; its stacks:", self._point, seconds)
        faulthandler.dump_traceback(self._stack_file, all_threads=True)

    def _say_all(self, kind: str, **facts: Any) -> None:
        for link in list(self.links.values()):
            if not link.is_over:
                link.send(kind, **facts)


def _hung(stands: dict[int, list[Any] | None]) -> str:
    """Who is behind. `stands`: by rank its marks, the point it came to, and seconds since; None: it did not answer."""
    silent = [rank for rank, at in stands.items() if at is None]
    if silent:
        who = f"rank {silent[0]} does" if len(silent) == 1 else f"ranks {silent[:8]} do"
        return f"{who} not answer (stopped, or stuck in native code); the stacks of the others are in RUN/log"
    rank, at = min(stands.items(), key=lambda item: (item[1][0], -item[1][2]) if item[1] else (0, 0.0))
    assert at is not None
    return f"rank {rank} is the farthest behind, at {at[1]} for {at[2]} s; the stacks of all ranks are in RUN/log"
