"""The watchdog: ranks watch each other. A dead, failed or hung rank ends all of them, and a stop request to one reaches all.

Flows in: this rank's heartbeats; out: the end of this process, with the reason in its log. gloo notices a closed socket only
inside a collective, NCCL does not at all, and neither says who hung. So each rank keeps one TCP connection to rank 0, read by a
thread beside the training. A connection that closes without a goodbye is a death. While all is well nothing is sent.

    rank -> 0: stop_requested, failed, stalled, positions, goodbye
    0 -> rank: stop, exit_unsaved, show_stacks, shut_down, goodbye

Rank 0's thread costs one epoll entry per rank. The kernel's keepalive finds a node that lost power within half a minute.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
"""Time after the first report of an incident to hear who else is in trouble: to name the cause, not a consequence."""
_ANSWER_SECONDS = 2.0
"""Time that a rank has to answer. One that is stopped, or stuck in native code that holds Python's lock, does not."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last failpoint that shows progress, on this rank."""

    count: int
    """Such points so far; ranks with fewer are behind."""
    point: str
    at: float
    """Of `time.monotonic()`."""


Position = tuple[int, str, float]
"""Where a rank is, as it is sent: its heartbeat's count and point, and the seconds since."""


@dataclass(slots=True)
class Incident:
    """Something is wrong on some rank: what is known so far, and when this rank decides what to do."""

    decide_at: float
    reports: dict[int, str] = field(default_factory=dict)
    """By rank: `died`, or `failed: ...`."""
    positions: dict[int, Position] = field(default_factory=dict)
    """By rank, after a stall; empty: this rank has not shown its stacks."""


class Watchdog:
    """Watches from `with` to the end of it; on the way out the peers are told whether this rank failed or is done.

    Without a `heartbeat` for `timeout_seconds`, all ranks write the stacks of their threads to their logs, the rank that is
    behind is named, and all exit. The main thread calls the public methods; everything else runs on the watching thread.
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
        self.links: dict[int, PeerLink] = {}
        """To the other ranks, on rank 0; to rank 0, on the others."""
        self._selector = selectors.DefaultSelector()
        # Written by the main thread, read by the watching one.
        self._heartbeat = Heartbeat(0, "start", time.monotonic())
        self._armed_at = -math.inf
        self._has_begun = self._is_closing = False
        self._lock = threading.Lock()
        """Between `begin_steps` and the answer to a stop request."""
        self._failure: str | None = None
        # Written by the watching thread.
        self._incident: Incident | None = None
        self._is_blamed = threading.Event()
        """Rank 0 has named this rank's own failure: the main thread may go on to raise it."""

    @classmethod
    def over(
        cls, config: Config, topology: Topology, host: str, request: StopRequest, on_exit: Callable[[int, str], object]
    ) -> Self:
        """The watchdog of a run whose ranks have met; connects them."""
        watchdog = cls(
            request,
            config.run_dir,
            rank=topology.rank,
            world_size=topology.world_size,
            timeout_seconds=config.parallel.timeout_seconds,
            on_exit=on_exit,
        )
        watchdog.links = connect_ranks(topology, host, config.parallel.timeout_seconds)
        return watchdog

    # ---- on the main thread ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._stack_file = self.log_file.open("ab")
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        for link in self.links.values():
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        failpoints.listeners.insert(0, self._at_failpoint)
        self.heartbeat("start")
        self.request.on_request(self._request_stop)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        if self.request.received:
            self._request_stop(self.request.received)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and not isinstance(error, StartError):
            self._fail(f"{type(error).__name__}: {error}")
            self.request.restore_handlers()
        else:
            self.request.ignore_signals()
        failpoints.listeners.remove(self._at_failpoint)
        self._is_closing = True
        self._send_all("goodbye")
        self._wake.send(b"x")
        self._thread.join(_ANSWER_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        for link in self.links.values():
            link.socket.close()
        self._selector.close()
        for end in (self._wake, self._woken, self._stack_file):
            end.close()

    def heartbeat(self, point: str) -> None:
        """This rank has reached a point of its work: it does not hang."""
        # Ranks wait for a save differently often: counted, that would say nothing about who is behind.
        count = self._heartbeat.count + (point != "wait/save")
        self._heartbeat = Heartbeat(count, point, time.monotonic())
        if self._heartbeat.at - self._armed_at > 1:
            # A thread of C: it writes the stacks also where native code holds Python's lock and ours cannot run.
            later = self.timeout_seconds + 2 * _ANSWER_SECONDS + 3  # after rank 0 has named who is to blame
            faulthandler.dump_traceback_later(later, exit=True, file=self._stack_file)
            self._armed_at = self._heartbeat.at

    def _at_failpoint(self, name: str, progress: bool) -> None:
        if progress:
            self.heartbeat(name)

    def begin_steps(self) -> None:
        """From now on there may be something to save."""
        with self._lock:
            self._has_begun = True

    def _fail(self, reason: str) -> None:
        """Tell the others. A rank that fails only because another one died says so in one line and exits here."""
        self._failure = reason
        if self.rank == 0:
            self._wake.send(b"x")
        else:
            self._send_all("failed", reason=reason)
        if self.links:
            self._is_blamed.wait(_ANSWER_SECONDS / 2)

    # ---- on the watching thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        tick = min(0.5, self.timeout_seconds / 4)
        while not self._is_closing:
            for key, _ in self._selector.select(tick if self._incident is None else 0.05):
                if key.data is None:
                    self._woken.recv(64)
                else:
                    self._read(key.data)
            self._check()

    def _check(self) -> None:
        """Do what is due now."""
        if self._failure and self.rank == 0 and not self._is_blamed.is_set():
            self._report(0, f"failed: {self._failure}")
        now = time.monotonic()
        if self._incident is not None:
            if now >= self._incident.decide_at:
                self._decide(self._incident)
        elif not self._is_closing and now - self._heartbeat.at > self.timeout_seconds:
            self._show_stacks(answer_seconds=_ANSWER_SECONDS)
            self._send_all("stalled" if self.rank else "show_stacks")

    def _read(self, link: PeerLink) -> None:
        for message in link.messages():
            if message is not None:
                self._handle(link, message)
                continue
            self._selector.unregister(link.socket)
            if not link.said_goodbye and not self._is_closing:
                self._report(link.rank, "died")

    def _handle(self, link: PeerLink, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "goodbye"}:
                link.said_goodbye = True
            case {"kind": "stop_requested", "reason": reason}:
                self._request_stop(reason)
            case {"kind": "failed", "reason": reason}:
                self._report(link.rank, f"failed: {reason}")
            case {"kind": "stalled"}:
                if not self._has_shown_stacks:
                    self._show_stacks(answer_seconds=_ANSWER_SECONDS)
                    self._send_all("show_stacks")
            case {"kind": "show_stacks"}:
                self._answer_with_position(link)
            case {"kind": "positions", "position": [count, point, seconds]}:
                if self._incident is not None and self._has_shown_stacks:
                    self._incident.positions[link.rank] = count, point, seconds
                    if len(self._incident.positions) == self.world_size:
                        self._incident.decide_at = time.monotonic()
            case {"kind": "stop", "reason": reason}:
                self.request.record(reason)
            case {"kind": "exit_unsaved", "reason": reason}:
                self._exit_unsaved(reason)
            case {"kind": "shut_down", "reason": reason, "ranks": ranks}:
                self._shut_down(reason, ranks)
            case _:
                raise AssertionError(f"rank {link.rank} sent {message}")

    def _answer_with_position(self, link: PeerLink) -> None:
        """Show this rank's stacks, if it has not yet, and tell rank 0 where it is."""
        if not self._has_shown_stacks:
            self._show_stacks(answer_seconds=0)
        assert self._incident is not None
        self._incident.decide_at = time.monotonic() + 2 * _ANSWER_SECONDS  # rank 0 decides before
        link.send("positions", position=self._incident.positions[self.rank])

    # ---- stop requests --------------------------------------------------------------------------------------------------

    def _request_stop(self, reason: str) -> None:
        """This rank is requested to stop. Rank 0 decides for all: no step can be done before it begins its steps."""
        self.request.record(reason)
        if self.rank:
            self._send_all("stop_requested", reason=reason)
            return
        with self._lock:
            if self._has_begun:
                self._send_all("stop", reason=reason)
            else:
                self._send_all("exit_unsaved", reason=reason)
                self._exit_unsaved(reason)

    def _exit_unsaved(self, reason: str) -> None:
        self._say_goodbye()
        self._on_exit(unsaved_code(), reason)
        exit_without_saving(reason)

    # ---- incidents ------------------------------------------------------------------------------------------------------

    def _report(self, rank: int, what: str) -> None:
        """A rank died or failed; a moment later `_decide` says so."""
        if self._incident is None:
            self._incident = Incident(time.monotonic() + (_GATHER_SECONDS if self.rank == 0 else 0))
        if self._incident.reports.get(rank, "died") == "died":
            self._incident.reports[rank] = what

    def _decide(self, incident: Incident) -> None:
        """Rank 0: name who is to blame, and end all. Another rank comes here only if rank 0 cannot."""
        incident.decide_at = math.inf
        reports, positions = incident.reports, incident.positions
        if self.rank:
            self._shut_down("rank 0 died" if reports else _hung({**positions, 0: None}), [0])
            return
        ranks: list[int] = []
        if reports:
            ranks = sorted(rank for rank, what in reports.items() if what == "died") or sorted(reports)
            reason = "; ".join(f"rank {rank} {reports[rank]}" for rank in ranks[:4])
            reason += f"; and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        else:
            hung = _hung({rank: positions.get(rank) for rank in range(self.world_size)})
            reason = f"no progress for {self.timeout_seconds:.0f} s: {hung}"
        self._send_all("shut_down", reason=reason[:2000], ranks=ranks)
        self._shut_down(reason, ranks)

    def _shut_down(self, reason: str, ranks: list[int]) -> None:
        """End this process, unless it is already ending by an error of its own. `ranks`: those to blame."""
        if self._failure and self.rank in ranks:
            self._is_blamed.set()
            return
        # On stderr once: thousands of ranks have the same to say.
        speaks = self.rank == (1 if 0 in ranks else 0)
        logger.log(logging.ERROR if speaks else logging.WARNING, "%s; shutting down this rank", reason)
        if self.rank == 0:
            self._say_goodbye()
        self._on_exit(FAILED, reason)
        exit_now(FAILED)

    def _say_goodbye(self) -> None:
        """So that what was sent before arrives: closing with unread input would take it back."""
        self._send_all("goodbye")
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
        time.sleep(_GATHER_SECONDS)

    @property
    def _has_shown_stacks(self) -> bool:
        return self._incident is not None and bool(self._incident.positions)

    def _show_stacks(self, *, answer_seconds: float) -> None:
        """Write the stacks of all threads of this process to its log, record its position, and decide when others have had
        time to answer."""
        seconds = time.monotonic() - self._heartbeat.at
        self._incident = self._incident or Incident(0)
        self._incident.decide_at = time.monotonic() + answer_seconds
        self._incident.positions = {self.rank: (self._heartbeat.count, self._heartbeat.point, round(seconds, 1))}
        logger.warning("a rank makes no progress; this one reached %s %.1f s ago; stacks:", self._heartbeat.point, seconds)
        faulthandler.dump_traceback(self._stack_file, all_threads=True)

    def _send_all(self, kind: str, **facts: Any) -> None:
        for link in list(self.links.values()):
            if not link.said_goodbye:
                link.send(kind, **facts)


def _hung(positions: dict[int, Position | None]) -> str:
    """Who is behind. `positions`: by rank; None: it did not answer."""
    silent = [rank for rank, position in positions.items() if position is None]
    if silent:
        who = f"rank {silent[0]} does" if len(silent) == 1 else f"ranks {silent[:8]} do"
        return f"{who} not answer (stopped, or stuck in native code); the stacks of the others are in RUN/log"
    rank, position = min(positions.items(), key=lambda item: (item[1][0], -item[1][2]) if item[1] else (0, 0.0))
    assert position is not None
    return f"rank {rank} is the farthest behind, at {position[1]} for {position[2]} s; the stacks of all ranks are in RUN/log"
