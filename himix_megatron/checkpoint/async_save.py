"""The protocol of a save, on a thread or not, and what happens when a save fails. One save runs at a time.

Flows in: every rank's snapshot; out: a complete checkpoint folder, or none. On every rank a save passes these failpoints in
this order:

    save/begin        nothing has happened yet                                                         the training thread
    save/snapshot     the state is copied (async), or shared with training, which waits (sync)           "
    save/tensors      the working folder exists; this rank writes its tensors                          the save's thread
    save/description  all tensors are on the disk; rank 0 writes himix.json, and the frozen tower once   "
    save/sync         each rank syncs its files, and hashes what it reads back                           "
    save/manifest     all hashes are known; rank 0 writes manifest.json, the folder's last file          "
    save/rename       the folder is complete; rank 0 renames it to step-...: now the checkpoint counts   "
    save/tracker      rank 0 replaces the file `latest`                                                  "
    save/prune        rank 0 removes older checkpoints                                                   "

A rank that fails at one of them fails the save on all ranks. Existing checkpoints stay, and training goes on.
"""

from __future__ import annotations

import faulthandler
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import CheckpointConfig
from ..distributed.control_group import ControlGroup, SaveError
from ..runtime.background_thread import BackgroundThread
from ..runtime.durable_files import FileDigest, publish, sync_folder
from ..runtime.failpoints import failpoint
from . import manifest
from .run_lock import RunLock
from .snapshot import Snapshot, own_files, write

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointWriter:
    """Writes one checkpoint into a run folder; all ranks together."""

    ranks: ControlGroup
    run_lock: RunLock
    settings: CheckpointConfig

    def run(self, name: str, snapshot: Snapshot, describe: Callable[[Path], None]) -> Path:
        """Write a checkpoint and give it its name. Returns: its folder. Raises: SaveError on all ranks.

        Args:
            snapshot: this rank's part of the state.
            describe: writes himix.json into a folder; rank 0 calls it.
        """
        writing = self.run_lock.folder / name
        try:
            self.ranks.on_all_ranks(lambda: self._prepare(writing, snapshot))
            write(snapshot, writing, self.ranks)
            self._step("description", lambda: describe(writing))
            files = self._sync(writing)
            self._step("manifest", lambda: manifest.write_manifest(writing, files))
            self._step("rename", lambda: self._rename(writing))
            self._step("tracker", lambda: self._track(name))
        except SaveError:
            if self.ranks.rank == 0:
                shutil.rmtree(writing, ignore_errors=True)  # the next save may need its space
            raise
        self._step("prune", self._prune)
        return self._checkpoints / name

    @property
    def _checkpoints(self) -> Path:
        return self.run_lock.folder.parent

    def _step(self, point: str, part: Callable[[], None]) -> None:
        """Every rank passes the failpoint; rank 0 does its part."""

        def pass_and_do() -> None:
            failpoint(f"save/{point}")
            if self.ranks.rank == 0:
                part()

        self.ranks.on_all_ranks(pass_and_do)

    def _prepare(self, writing: Path, snapshot: Snapshot) -> None:
        if snapshot.error is not None:
            raise snapshot.error
        if self.ranks.rank == 0:
            self.run_lock.check()
            shutil.rmtree(writing, ignore_errors=True)  # left by a failed save
            writing.mkdir()

    def _sync(self, writing: Path) -> dict[str, FileDigest]:
        def part() -> dict[str, FileDigest]:
            failpoint("save/sync")
            return manifest.sync_and_digest(writing, own_files(writing, self.ranks.rank))

        return {name: digest for own in self.ranks.on_all_ranks(part) for name, digest in own.items()}

    def _rename(self, writing: Path) -> None:
        self.run_lock.check()
        final = self._checkpoints / writing.name
        if final.exists():
            # The run did not continue from it, or it would be further on. It is replaced.
            final.rename(self.run_lock.folder / f"{final.name}.replaced")
        writing.rename(final)
        sync_folder(self._checkpoints)
        shutil.rmtree(self.run_lock.folder / f"{final.name}.replaced", ignore_errors=True)

    def _track(self, name: str) -> None:
        publish(self._checkpoints / manifest.LATEST, f"{name}\n".encode(), partial=self.run_lock.folder / manifest.LATEST)
        (self._checkpoints / "newest").unlink(missing_ok=True)  # its name in earlier versions

    def _prune(self) -> None:
        """Move a checkpoint into the working folder before removing it, so that no partial checkpoint has its name."""
        settings = self.settings
        old = manifest.to_remove(self._checkpoints.parent, keep_last=settings.keep_last, keep_every=settings.keep_every)
        for folder in old:
            removed = self.run_lock.folder / f"{folder.name}.removed"
            try:
                folder.rename(removed)
                shutil.rmtree(removed)
            except OSError as error:
                logger.warning("could not remove %s: %s", folder, error)


class AsyncSaves:
    """At most one save in flight; a new one waits for it."""

    def __init__(self, settings: CheckpointConfig, run_lock: RunLock):
        self.settings, self.run_lock = settings, run_lock
        self.failures = 0
        """Consecutive saves that failed."""
        # A daemon's, so that the process can end while a file system does not answer.
        self._thread = BackgroundThread("save")
        self._flight: Future[Path] | None = None
        self._name, self._started, self._took = "", 0.0, 0.0

    def start(self, name: str, save: Callable[[], Path]) -> None:
        """Start a save on the thread of saves."""
        assert self._flight is None
        self._name, self._started = name, time.monotonic()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> Path:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread starts on device 0
            folder = save()
            self._took = time.monotonic() - self._started
            return folder

        self._flight = self._thread.start(run)

    def poll(self) -> None:
        """Look, without waiting, whether the save in flight has ended. Raises: RuntimeError if the run should end."""
        if self.run_lock.is_lost:
            self.run_lock.check()
        if self._flight is None:
            return
        if self._flight.done():
            self._record_outcome(self._flight)
        elif time.monotonic() - self._started > self.settings.timeout_seconds:
            self._raise_hung()

    def wait(self) -> None:
        """Wait until no save is in flight. Raises: as `poll`."""
        if self._flight is None:
            return
        while not self._flight.done():
            failpoint("wait/save", progress=True)  # the watchdog allows for this wait
            left = self._started + self.settings.timeout_seconds - time.monotonic()
            if left <= 0:
                self._raise_hung()
            wait([self._flight], timeout=min(left, 1.0))
        self._record_outcome(self._flight)

    def _record_outcome(self, flight: Future[Path]) -> None:
        """Count its success or failure, which is the same on every rank."""
        self._flight = None
        try:
            logger.info("saved %s in %.1f s", flight.result(), self._took)
            self.failures = 0
        except SaveError as error:
            self.failures += 1
            self.run_lock.check()
            allowed = self.settings.max_failures
            logger.error("%s was not saved (%s): %d of %d failures in a row", self._name, error, self.failures, allowed)
            if self.failures > allowed:
                raise RuntimeError(
                    f"{self.failures} saves in a row failed, more than checkpoint.max_failures {allowed}; "
                    f"the last one because of {error}"
                ) from error

    def _raise_hung(self) -> None:
        """End the run: a thread that hangs cannot be stopped. Earlier checkpoints stay."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            logger.error("saving %s hangs:\n%s", self._name, file.read())
        raise RuntimeError(
            f"saving {self._name} took longer than checkpoint.timeout_seconds ({self.settings.timeout_seconds:g}): "
            "RUN/log has the stacks; checkpoints saved before it are as they were"
        )

    def finish(self) -> None:
        """Complete the last save before the process ends. Raises: RuntimeError if it failed."""
        self.wait()
        if self.failures:
            raise RuntimeError(f"{self._name}, the last save, failed: the run ends without it")
