"""Saves of a run, one at a time: the steps of the protocol, in the background or not, and what happens when one fails.

On every rank a save passes these points, in this order (`failpoint`):

    save/begin        nothing has happened yet                                                            the training thread
    save/snapshot     the state has been copied (async), or lies where it is (sync)                         "
    save/tensors      the working folder is there; this rank writes its tensors                           the save's thread
    save/description  all tensors are on the disk; rank 0 writes himix.json, and the frozen tower once      "
    save/sync         each rank brings its files to the disk, and hashes them as they are read back         "
    save/manifest     all hashes are known; rank 0 writes manifest.json, the last file of the folder        "
    save/rename       the folder is whole; rank 0 renames it to step-...: now the checkpoint counts         "
    save/tracker      rank 0 replaces the file `newest`                                                     "
    save/prune        rank 0 removes older checkpoints                                                      "

A rank that fails at one of them fails the save on all. The checkpoints that were there stay, and training goes on.
"""

from __future__ import annotations

import faulthandler
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import CheckpointConfig
from ..distributed.control_group import ControlGroup, SaveError
from ..runtime.durable_files import FileDigest, publish, sync_folder
from ..runtime.failpoints import failpoint
from . import manifest
from .run_lock import RunLock
from .snapshot import Snapshot, own_files, write

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointWriter:
    """How one checkpoint gets into a run folder; all ranks go through it together."""

    ranks: ControlGroup
    run_lock: RunLock
    settings: CheckpointConfig

    def run(self, name: str, take: Callable[[], Snapshot], describe: Callable[[Path], None]) -> Path:
        """Write a checkpoint and give it its name. Returns: the folder. Raises: SaveError, on all ranks.

        Args:
            take: gives this rank's part of the state, or the error that came in place of it.
            describe: rank 0 writes `himix.json` by it.
        """
        writing = self.run_lock.folder / name
        try:
            snapshot = self._prepare(writing, take)
            write(snapshot, writing, self.ranks)
            self._step("description", lambda: describe(writing))
            files = self._sync(writing)
            self._step("manifest", lambda: manifest.write_manifest(writing, files))
            self._step("rename", lambda: self._rename(writing))
            self._step("tracker", lambda: self._track(name))
        except SaveError:
            if self.ranks.rank == 0:
                shutil.rmtree(writing, ignore_errors=True)  # its space may be what the next one lacks
            raise
        self._step("prune", self._prune)
        return self._home / name

    @property
    def _home(self) -> Path:
        return self.run_lock.folder.parent

    def _step(self, point: str, part: Callable[[], None]) -> None:
        """Rank 0 does its part; every rank comes to the point."""

        def reach_and_do() -> None:
            failpoint(f"save/{point}")
            if self.ranks.rank == 0:
                part()

        self.ranks.on_all_ranks(reach_and_do)

    def _prepare(self, writing: Path, take: Callable[[], Snapshot]) -> Snapshot:
        snapshot: list[Snapshot] = []

        def part() -> None:
            snapshot.append(take())
            if self.ranks.rank == 0:
                self.run_lock.check()
                shutil.rmtree(writing, ignore_errors=True)  # what a failed save left
                writing.mkdir()

        self.ranks.on_all_ranks(part)
        return snapshot[0]

    def _sync(self, writing: Path) -> dict[str, FileDigest]:
        def part() -> dict[str, FileDigest]:
            failpoint("save/sync")
            return manifest.sync_and_digest(writing, own_files(writing, self.ranks.rank))

        return {name: digest for own in self.ranks.on_all_ranks(part) for name, digest in own.items()}

    def _rename(self, writing: Path) -> None:
        self.run_lock.check()
        final = self._home / writing.name
        if final.exists():
            # Not the one this run continued from: then it would be further on. It goes before its successor comes.
            final.rename(self.run_lock.folder / f"{final.name}.replaced")
        writing.rename(final)
        sync_folder(self._home)
        shutil.rmtree(self.run_lock.folder / f"{final.name}.replaced", ignore_errors=True)

    def _track(self, name: str) -> None:
        partial = self.run_lock.folder / manifest.LATEST  # a writer whose lock was taken finds no such folder
        publish(self._home / manifest.LATEST, f"{name}\n".encode(), partial=partial)

    def _prune(self) -> None:
        """Through the attempt's folder, so that no half of a checkpoint ever has its name."""
        settings = self.settings
        old = manifest.to_remove(self._home.parent, keep_last=settings.keep_last, keep_every=settings.keep_every)
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
        """Saves that failed, one after another."""
        self._flight: Future[Path] | None = None
        self._name, self._started, self._took = "", 0.0, 0.0

    def start(self, name: str, save: Callable[[], Path]) -> None:
        """Begin a save in a thread of its own."""
        assert self._flight is None
        self._name, self._started = name, time.monotonic()
        flight: Future[Path] = Future()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a new thread is on device 0, whose stream knows nothing of our copies
                folder = save()
                self._took = time.monotonic() - self._started
                flight.set_result(folder)
            except BaseException as error:  # whatever it is, the training thread hears of it
                flight.set_exception(error)

        self._flight = flight
        # A daemon, so that a file system that does not answer cannot keep the process from ending.
        threading.Thread(target=run, name=name, daemon=True).start()

    def poll(self) -> None:
        """Look, without waiting, what has become of the save in flight. Raises: RuntimeError if the run should end."""
        if self.run_lock.is_lost:
            self.run_lock.check()
        if self._flight is None:
            return
        if self._flight.done():
            self._settle(self._flight)
        elif time.monotonic() - self._started > self.settings.timeout_seconds:
            self._give_up()

    def wait(self) -> None:
        """Until no save is in flight. Raises: as `poll`."""
        if self._flight is None:
            return
        while not self._flight.done():
            failpoint(
                "wait/save", progress=True
            )  # this rank waits, and does not hang: the watch here knows for how long it may
            left = self._started + self.settings.timeout_seconds - time.monotonic()
            if left <= 0:
                self._give_up()
            wait([self._flight], timeout=min(left, 1.0))
        self._settle(self._flight)

    def _settle(self, flight: Future[Path]) -> None:
        """Note how it went; the same on every rank."""
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

    def _give_up(self) -> None:
        """A save hangs, and a thread cannot be stopped: the run ends, and what was saved before it stays."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            logger.error("saving %s hangs:\n%s", self._name, file.read())
        raise RuntimeError(
            f"saving {self._name} took longer than checkpoint.timeout_seconds ({self.settings.timeout_seconds:g}): "
            "RUN/log has the stacks; checkpoints saved before it are as they were"
        )

    def finish(self) -> None:
        """Before leaving: the last save is on the disk. Raises: RuntimeError if it is not."""
        self.wait()
        if self.failures:
            raise RuntimeError(f"{self._name}, the last save, failed: the run ends without it")
