"""Failpoints: named points of a run, at which faults are injected and from which the watchdog sees progress.

Flows in: the points that the code passes (`failpoint("save/manifest")`), and with `--run.fault-injection` a schedule; out:
calls of listeners, and real faults of this process: a signal, a crash, a cut network, a full disk. A schedule is a file with
one JSON object per line:

    {"kind": "kill", "point": "step/backward", "step": 7, "rank": 1}

Each fault happens once, when its rank first reaches its point in that step or a later one, and only after all lines above it
have happened; FILE.done/ records that over restarts. A setting and not an environment variable names the schedule, so that
config.json and the log show it and no other run inherits it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import multiprocessing
import os
import resource
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import typed_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One line of a schedule."""

    kind: str
    """A key of `KINDS`."""
    point: str
    """Name of a failpoint, e.g. `step/backward`; `save/*` matches any point of a save."""
    step: int = 0
    """The earliest optimizer step; 0: any time, also before the first step."""
    rank: int = 0
    """The rank of the process that it happens to."""
    delay_seconds: float = 0.0
    """Delay after the point, wherever the process is then."""
    once: bool = True
    """False: only in that step, but each time the step is executed (as with a bad batch); lines below do not wait for it."""


listeners: list[Callable[[str, bool], None]] = []
"""Called at every failpoint of this process, on its thread, with the name and whether it is progress."""


def failpoint(name: str, tensors: Iterable[Any] = (), *, progress: bool = False) -> None:
    """This process has reached a named point, such as `step/backward` or `save/rename`.

    Args: `tensors`: values that a fault may corrupt here; `progress`: the point is on the main thread, and reaching it means
    that this rank does not hang.
    """
    for listener in listeners:
        listener(name, progress)
    if _schedule is not None:
        _schedule.reach(name, tensors)


def begin_step(step: int) -> None:
    """This process begins an optimizer step."""
    if _schedule is not None:
        _schedule.step = step


def schedule_faults(file: str | None, rank: int) -> None:
    """Schedule the faults of this process, or none. Raises: ValueError for a line that is not a fault."""
    global _schedule
    _schedule = None if file is None else FaultSchedule(read_faults(Path(file)), Path(file), rank)


def read_faults(file: Path) -> list[Fault]:
    """The lines of a schedule. Raises: ValueError naming one that is not a fault."""
    faults = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        where = f"run.fault_injection {file}, line {number}"
        fault = typed_json.build(Fault, typed_json.parse(line, where), where)
        if fault.kind not in KINDS:
            raise ValueError(f"{where}: kind is {fault.kind}: wanted one of {', '.join(KINDS)}")
        faults.append(fault)
    return faults


class FaultSchedule:
    """The faults of this process, and a folder with a marker for each that has happened."""

    def __init__(self, faults: list[Fault], file: Path, rank: int) -> None:
        self.faults, self.rank, self.step = faults, rank, 0
        self.done = file.with_name(f"{file.name}.done")
        self.done.mkdir(exist_ok=True)

    def reach(self, point: str, tensors: Iterable[Any]) -> None:
        tensors = tuple(tensors)  # for every fault that is due here
        for number, fault in enumerate(self.faults):
            if fnmatchcase(point, fault.point) and fault.rank == self.rank and self._is_due(number, fault):
                logger.warning("injected fault %d: %s at %s, step %d", number, fault.kind, point, self.step)
                happen = KINDS[fault.kind]
                if fault.delay_seconds:
                    threading.Timer(fault.delay_seconds, happen, tensors).start()
                else:
                    happen(*tensors)

    def _is_due(self, number: int, fault: Fault) -> bool:
        if not fault.once:
            return self.step == fault.step
        if self.step < fault.step or any(not self._mark(i).exists() for i in range(number) if self.faults[i].once):
            return False
        try:
            self._mark(number).touch(exist_ok=False)  # before it happens: afterwards this process may be gone
        except FileExistsError:
            return False
        return True

    def _mark(self, number: int) -> Path:
        return self.done / f"{number:03d}"


_schedule: FaultSchedule | None = None


# ---- kinds ---------------------------------------------------------------------------------------------------------


def _send(number: signal.Signals, *, to_group: bool = False) -> Callable[..., None]:
    return lambda *_: os.kill(0 if to_group else os.getpid(), number)


def _raise(kind: Callable[..., Exception], *arguments: Any) -> Callable[..., None]:
    def happen(*_: Any) -> None:
        raise kind(*arguments)

    return happen


def _out_of_memory(*_: Any) -> None:
    import torch

    torch.empty(2**62, dtype=torch.uint8)


def _full_disk(*_: Any) -> None:
    """For 2 s this process's files cannot grow beyond 20 kB: the kernel refuses in the middle of a write."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    threading.Timer(2.0, resource.setrlimit, (resource.RLIMIT_FSIZE, unlimited)).start()


def _cut_network(*_: Any) -> None:
    """Shut down every TCP connection of this process, as a switch that fails would."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                        connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # closed meanwhile, or not connected


def _kill_worker(*_: Any) -> None:
    workers = multiprocessing.active_children()
    if workers:
        assert workers[0].pid is not None
        os.kill(workers[0].pid, signal.SIGKILL)


def _nan(*tensors: Any) -> None:
    for tensor in tensors:
        tensor.view(-1)[:1] = float("nan")


KINDS: dict[str, Callable[..., object]] = {
    "kill": _send(signal.SIGKILL),
    "kill_node": _send(signal.SIGKILL, to_group=True),
    "term": _send(signal.SIGTERM),
    "usr1": _send(signal.SIGUSR1),
    "usr2": _send(signal.SIGUSR2),
    "freeze": _send(signal.SIGSTOP),
    "freeze_node": _send(signal.SIGSTOP, to_group=True),
    "abort": _send(signal.SIGABRT),
    "crash": lambda *_: ctypes.string_at(0),
    "exit": lambda *_: os._exit(7),
    "error": _raise(RuntimeError, "an injected error"),
    "out_of_memory": _out_of_memory,
    "no_space": _raise(OSError, errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "io_error": _raise(OSError, errno.EIO, os.strerror(errno.EIO)),
    "full_disk": _full_disk,
    "cut_network": _cut_network,
    "kill_worker": _kill_worker,
    "note": lambda *_: None,
    "slow": lambda *_: time.sleep(2.0),
    "nan": _nan,
}
"""Kinds of faults. `..._node`: of the whole process group (a launcher and its ranks); `note`: only a line in the log."""
