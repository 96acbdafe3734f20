"""One writer for a run folder: each start takes the next attempt, and whoever still runs an older one cannot publish.

RUN/checkpoints/attempt-000007/ is the working folder of the seventh start. Checkpoints are written in it and renamed out of
it; old ones are renamed into it to be removed. The eighth start makes its own folder, which nobody else can make too, and
takes the seventh's away: from then on every rename of the seventh fails, however late it comes. No file lock is involved,
since those of shared file systems differ; a rename whose source is gone fails on all of them.

A start is refused while the owner of the newest attempt is alive. On the same machine its process is looked for; elsewhere it
touches `owner.json` every few seconds, and is taken for dead when that stops. A job that Slurm has requeued takes over from
its earlier self at once. Times are compared as the file system stamps them: the clocks of two nodes need not agree.
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
from ..runtime.durable_files import write_synced

logger = logging.getLogger(__name__)

_NAME = re.compile(r"attempt-(\d{6})")
_TOUCH_SECONDS = 4.0
_DEAD_SECONDS = 12.0
"""An owner elsewhere that has not touched its file for so long is dead."""


class StaleAttemptError(RuntimeError):
    """Another start has taken the run folder over: this process must not write any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LockOwner:
    """The process of rank 0 of an attempt, so that it can be found again, and told from a later one with its number."""

    host: str
    boot: str
    """Of the kernel: after a reboot nothing runs any more."""
    pid_space: str
    """Process numbers mean something within it only (containers)."""
    pid: int
    started: str
    """When, in the kernel's ticks since boot."""
    job: str
    """Slurm's, empty elsewhere."""
    restarts: int
    """How often Slurm has requeued that job."""

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
        """What is known of this owner without watching its folder."""
        if self == here or (self.job and self.job == here.job and self.restarts < here.restarts):
            return "dead"  # our own earlier start
        if (self.host, self.pid_space) != (here.host, here.pid_space) or not self.started:
            return "unknown"
        return "alive" if self.boot == here.boot and _ticks(self.pid) == self.started else "dead"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _ticks(pid: int) -> str:
    """When a process started; empty if there is none, or it is dead and only its parent has not noticed."""
    after_name = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return "" if not after_name or after_name[0] in "ZX" else after_name[19]


class RunLock:
    """The right to write into a run folder, until a later start takes it. Rank 0 owns it; the others know its folder."""

    def __init__(self, folder: Path, *, owned: bool):
        self.folder, self.number, self.owned = folder, int(folder.name.removeprefix("attempt-")), owned
        self._ended = threading.Event()
        self.is_lost = False
        """Whether the owner has noticed, while it touched its file, that another start has taken over."""

    def check(self) -> None:
        """Raises: StaleAttemptError if a later start has taken over."""
        if self.is_lost or not self.folder.is_dir():
            raise StaleAttemptError(f"another start has taken over {self.folder.parent.parent}: attempt {self.number} ends")

    def end(self) -> None:
        """Give the folder up: the next start need not look whether we live. Nothing is written afterwards."""
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
    """All ranks together become the ones that write into a run folder.

    Raises: ValueError, on all, while another run does, or if the folder cannot be written.
    """
    taken: list[RunLock] = []

    def take_or_say() -> tuple[Path | None, str]:
        try:
            taken.append(acquire(run_dir))
            return taken[0].folder, ""
        except ValueError as error:
            return None, str(error)
        except OSError as error:
            return None, f"{run_dir} cannot be written: {error}"

    folder, refusal = ranks.on_rank_zero(take_or_say)
    if folder is None:
        raise ValueError(refusal)
    return taken[0] if taken else RunLock(folder, owned=False)


def acquire(run_dir: Path) -> RunLock:
    """Become the one that writes into a run folder, by one process.

    Raises: ValueError while another process does; OSError if the folder cannot be written.
    """
    home = run_dir / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    here = LockOwner.here()
    while True:
        older = attempts(home)
        if older:
            _refuse_if_alive(older[-1], here)
        number = 1 + (int(older[-1].name.removeprefix("attempt-")) if older else 0)
        mine = home / f"attempt-{number:06d}"
        try:
            mine.mkdir()
        except FileExistsError:
            continue  # another start was quicker: now it is the one to look at
        write_synced(mine / "owner.json", (json.dumps(asdict(here), indent=2) + "\n").encode())
        break
    for folder in older:
        _take_away(folder, mine)
    run_lock = RunLock(mine, owned=True)
    threading.Thread(target=run_lock._keep_touching, name="attempt", daemon=True).start()
    return run_lock


def attempts(home: Path) -> list[Path]:
    """Folders of the attempts in `RUN/checkpoints`, oldest first."""
    return sorted(folder for folder in home.glob("attempt-*") if _NAME.fullmatch(folder.name))


def _refuse_if_alive(folder: Path, here: LockOwner) -> None:
    if (folder / "ended").exists():
        return
    owner = _owner(folder)
    state = "unknown" if owner is None else owner.seen_from(here)
    if state == "unknown":
        state = "alive" if _touched_soon(folder) else "dead"
        owner = _owner(folder)
    if state == "alive":
        who = f" (process {owner.pid} on {owner.host}{f', job {owner.job}' if owner.job else ''})" if owner else ""
        raise ValueError(
            f"{folder.parent.parent} is in use by another run{who}: wait until it has ended, or give another --run.dir"
        )


def _owner(folder: Path) -> LockOwner | None:
    """None: it has not been written yet, or not to its end."""
    try:
        return LockOwner(**json.loads((folder / "owner.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _touched_soon(folder: Path) -> bool:
    """Watch an attempt's folder for a sign of life, until it has shown none for too long."""
    last = _stamp(folder)
    while last is not None and _now(folder.parent) - last < _DEAD_SECONDS:
        time.sleep(0.5)
        newer = _stamp(folder)
        if newer != last:
            return newer is not None and not (folder / "ended").exists()
    return False


def _stamp(folder: Path) -> float | None:
    """When the owner was last heard of. Opened, because shared file systems then ask the server; None: the folder is gone."""
    for path in (folder / "owner.json", folder):
        try:
            descriptor = os.open(path, os.O_RDONLY)
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
    """Put an older attempt's folder where its owner does not look, then remove it."""
    gone = mine / f"{folder.name}.gone"
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
    # Its owner may be alive and add a file while we remove: what is left goes with our own folder.
    shutil.rmtree(gone, ignore_errors=True)
