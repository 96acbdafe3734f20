"""The lock of a run folder: one launch at a time writes into it, and a launch that has lost the lock cannot publish anything.

Flows in: the run folder; out: a `RunLock`, or one line that names the owner. The lock has generations:
RUN/checkpoints/attempt-000007/ is the working folder of the seventh launch. Checkpoints are written in it and renamed out of
it; old ones are renamed into it to be removed. The eighth launch creates its own folder, which only one process can, and
renames the seventh away: from then on every rename of the seventh fails, however late it comes. No file lock is needed, whose
semantics differ between shared file systems; a rename whose source is gone fails on all of them.

A launch is refused while the owner of the newest generation is alive. On the same machine its process is looked up; from
elsewhere the lock is a lease: its owner touches `owner.json` every few seconds, and counts as dead when that stops. A job that
Slurm has requeued takes over from its earlier self at once. Times are compared as the file system stamps them, since the clocks
of two nodes may differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..distributed.control_group import ControlGroup
from ..runtime import typed_json
from ..runtime.durable_files import write_synced
from ..runtime.untrusted_files import refuse_links

logger = logging.getLogger(__name__)

_NAME = re.compile(r"attempt-([0-9]{6})")
_TOUCH_SECONDS = 4.0
_LEASE_SECONDS = 12.0
"""An owner elsewhere that has not touched its file for so long counts as dead."""


class StaleLockError(RuntimeError):
    """Another launch holds the run folder: this process must not write any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LockOwner:
    """Identifies the process that holds a lock (rank 0), also against a later process with the same number."""

    host: str
    boot: str
    """Boot id of the kernel: after a reboot the process is gone."""
    pid_space: str
    """PID namespace in which `pid` is valid (containers)."""
    pid: int
    started: str
    """In the kernel's ticks since boot."""
    job: str
    """Slurm's job id; empty without Slurm."""
    restarts: int
    """How often Slurm has requeued the job."""

    @classmethod
    def here(cls) -> LockOwner:
        """This process."""
        return cls(
            host=socket.gethostname(),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            pid_space=os.readlink("/proc/self/ns/pid") if os.path.islink("/proc/self/ns/pid") else "",
            pid=os.getpid(),
            started=_ticks(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def seen_from(self, here: LockOwner) -> Literal["alive", "dead", "unknown"]:
        """Whether this owner is alive, as far as `here` can tell without watching its folder."""
        if self == here or (self.job and self.job == here.job and self.restarts < here.restarts):
            return "dead"  # an earlier launch of this job
        if (self.host, self.pid_space) != (here.host, here.pid_space) or not self.started:
            return "unknown"
        return "alive" if self.boot == here.boot and _ticks(self.pid) == self.started else "dead"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _ticks(pid: int) -> str:
    """When a process started; empty if there is none, or it is a zombie."""
    after_name = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if not after_name or after_name[0] in "ZX" else after_name[19]


class RunLock:
    """The right to write into a run folder until a later launch takes it. Rank 0 owns it; the other ranks know its folder."""

    def __init__(self, folder: Path, *, owned: bool):
        self.folder, self.number, self.owned = folder, int(folder.name.removeprefix("attempt-")), owned
        self._ended = threading.Event()
        self.is_lost = False
        """The owner has noticed, when it touched its file, that another launch has taken over."""

    def check(self) -> None:
        """Raises: StaleLockError if a later launch has taken over."""
        if self.is_lost or not self.folder.is_dir():
            run_dir = self.folder.parent.parent
            raise StaleLockError(f"another launch has taken over {run_dir}: lock generation {self.number} ends")

    def end(self) -> None:
        """Release the lock: the next launch need not check whether this one is alive. Nothing may be written afterwards."""
        self._ended.set()
        if not self.owned:
            return
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "owner.json").unlink()
            (self.folder / "ended").touch()

    def _keep_touching(self) -> None:
        while not self._ended.wait(_TOUCH_SECONDS):
            try:
                os.utime(self.folder / "owner.json")
            except FileNotFoundError:
                self.is_lost = not self._ended.is_set()
                return
            except OSError as error:  # the file system is away: saves will say so
                logger.warning("could not touch %s: %s", self.folder, error)


def acquire_on_all_ranks(run_dir: Path, ranks: ControlGroup) -> RunLock:
    """Acquire the lock for all ranks together.

    Raises: ValueError on all ranks while another run holds it, or if the folder cannot be written.
    """
    owned: list[RunLock] = []

    def acquire_or_explain() -> tuple[Path | None, str]:
        try:
            owned.append(acquire(run_dir))
            return owned[0].folder, ""
        except ValueError as error:
            return None, str(error)
        except OSError as error:
            return None, f"{run_dir} cannot be written: {error}"

    folder, refusal = ranks.on_rank_zero(acquire_or_explain)
    if folder is None:
        raise ValueError(refusal)
    return owned[0] if owned else RunLock(folder, owned=False)


def acquire(run_dir: Path) -> RunLock:
    """Acquire the lock by one process.

    Raises: ValueError while another process holds it, or for links where a run writes; OSError if the folder cannot be written.
    """
    for name in ("checkpoints", "ledger", "log", "tensorboard", "towers"):
        refuse_links(run_dir, name, f"{name}/*")
    refuse_links(run_dir, "*.json*", "STOP")
    home = run_dir / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    here = LockOwner.here()
    while True:
        older = refuse_if_in_use(run_dir)
        number = 1 + (int(older[-1].name.removeprefix("attempt-")) if older else 0)
        mine = home / f"attempt-{number:06d}"
        try:
            mine.mkdir()
        except FileExistsError:
            continue  # another launch was quicker: check that one
        write_synced(mine / "owner.json", (json.dumps(asdict(here), indent=2) + "\n").encode())
        break
    for folder in older:
        _take_away(folder, mine)
    run_lock = RunLock(mine, owned=True)
    threading.Thread(target=run_lock._keep_touching, name="run-lock", daemon=True).start()
    return run_lock


def refuse_if_in_use(run_dir: Path) -> list[Path]:
    """Check that no other launch is alive in the folder. Returns: the locks of dead ones, oldest first.

    Raises: ValueError while another process holds it.
    """
    older = sorted(folder for folder in (run_dir / "checkpoints").glob("attempt-*") if _NAME.fullmatch(folder.name))
    if not older or (older[-1] / "ended").exists():
        return older
    folder = older[-1]
    owner = _owner(folder)
    state = "unknown" if owner is None else owner.seen_from(LockOwner.here())
    if state == "unknown":
        state = "alive" if _touches_within_lease(folder) else "dead"
        owner = _owner(folder)
    if state == "alive":
        who = f" (process {owner.pid} on {owner.host}{f', job {owner.job}' if owner.job else ''})" if owner else ""
        raise ValueError(f"{run_dir} is in use by another run{who}: wait until it has ended, or give another --run.dir")
    return older


def _owner(folder: Path) -> LockOwner | None:
    """None: the file is missing or incomplete."""
    try:
        return typed_json.build(LockOwner, typed_json.read(folder / "owner.json"), "owner.json")
    except (OSError, ValueError):
        return None


def _touches_within_lease(folder: Path) -> bool:
    """Watch a lock's folder until its owner touches it, or the lease ends."""
    last = _stamp(folder)
    while last is not None and _now(folder.parent) - last < _LEASE_SECONDS:
        time.sleep(0.5)
        newer = _stamp(folder)
        if newer != last:
            return newer is not None and not (folder / "ended").exists()
    return False


def _stamp(folder: Path) -> float | None:
    """When the owner last touched its file; None: the folder is gone. Opening makes shared file systems ask the server."""
    for path in (folder / "owner.json", folder):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
    return None


def _now(folder: Path) -> float:
    """The time as the file system stamps it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _take_away(folder: Path, mine: Path) -> None:
    """Rename an older lock's folder, so that its owner fails to use it, then remove it."""
    gone = mine / f"{folder.name}.gone"
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
    # Its owner may be alive and add a file meanwhile: what is left is removed with this launch's folder.
    shutil.rmtree(gone, ignore_errors=True)
