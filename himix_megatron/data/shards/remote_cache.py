"""Files of remote datasets, kept whole on this machine while they are read. Flows in: an s3:// place and what the receipt
says of the file; out: an open local file.

All processes of a machine share one folder and one cap. It holds datasets' own layout, so a cached file is found where it
would be in a local dataset:

    CACHE/lock                            held while room is made
    CACHE/FINGERPRINT/shards/NAME.tar     fetched on first use; those used longest ago are deleted for others
    CACHE/FINGERPRINT/shards/NAME.idx     fetched when the dataset is opened; not counted (a thousandth of the tars)
    .../NAME.tar.partial                  on its way; as long as the whole from the start, so that it holds its room

Deleting a file takes it from nobody: a process that has it open goes on reading it, and closes it before it opens another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...runtime.durable_files import FileDigest, bytes_digest, publish, sync_file
from . import storage

DEFAULT_FOLDER = Path("~/.cache/himix-megatron/shards")
DEFAULT_BYTES = 50 << 30
CHUNK_BYTES = 16 << 20
"""Of one request: what a killed process loses, and what fetching holds in memory."""
REQUESTS_AT_ONCE = 16
"""For small files, several of which are under way at a time."""
RETRY_SECONDS = 0.1
"""Between two looks for room that others are filling."""


class DamagedFileError(RuntimeError):
    """A remote file is not what the manifest says."""


def fetch(place: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file of an object store, or bytes start <= i < end of it.

    Raises: FileNotFoundError; OSError when the store cannot be read; ValueError where s3fs is not installed.
    """
    storage.check_scheme(place, "data.datasets")  # that s3fs, and botocore with it, are there
    from botocore.exceptions import BotoCoreError  # without credentials or a connection s3fs lets these through

    try:
        return storage.read_object(place, start, end)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file", place) from None
    except BotoCoreError as error:
        raise OSError(f"{place} cannot be read: {error}") from error


class ShardCache:
    """A folder of whole files with a cap on its bytes. Raises: ValueError where the folder cannot be made."""

    def __init__(self, folder: Path | None, max_bytes: int) -> None:
        self.folder, self.max_bytes = (folder or DEFAULT_FOLDER).expanduser().absolute(), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"no shards can be kept in {self.folder} ({error.strerror}): give another --data.cache-dir"
            ) from None

    def check_fits(self, name: str, num_bytes: int) -> None:
        """Raises: ValueError for a file that is larger than the whole cache."""
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"{name} has {num_bytes / 2**30:.3g} GiB, more than the {self.max_bytes / 2**30:.3g} GiB that shards may take "
                "on this machine: raise --data.cache-gib"
            )

    def keep_small(self, url: str, folder: Path, wanted: Mapping[str, FileDigest]) -> None:
        """See that small files are in `folder`. One process of a machine fetches them, the others wait.

        Raises: DamagedFileError for one that is not as its digest says.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with storage.locked(folder, "lock"), ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            missing = [name for name, digest in wanted.items() if _size(folder / name) != digest.bytes]
            found = pool.map(lambda name: fetch(f"{url}/{name}", 0, wanted[name].bytes), missing)
            for name, data in zip(missing, found, strict=True):
                if bytes_digest(data) != wanted[name]:
                    raise DamagedFileError(f"{url}/{name} is not the file that the manifest names")
                publish(folder / name, data)

    def open(self, url: str, folder: Path, name: str, digest: FileDigest) -> int:
        """An open descriptor of a large file, which is fetched first unless it is here. It counts as used just now.

        Raises: DamagedFileError for a file that is not as its digest says (nothing of it is kept); OSError.
        """
        path = folder / name
        while True:
            with contextlib.suppress(FileNotFoundError):
                return mark_used(os.open(path, os.O_RDONLY))
            fetched = self._fetch(url, path, name, digest)
            if fetched is not None:
                return mark_used(fetched)

    def _fetch(self, url: str, path: Path, name: str, digest: FileDigest) -> int | None:
        """Bring the file to its place and open it. None: look again; another process was about it, or there was no room."""
        partial = path.with_name(path.name + ".partial")
        with contextlib.ExitStack() as stack:
            with storage.locked(self.folder, "lock"):
                if path.exists():
                    return None
                file = stack.enter_context(partial.open("ab"))
                mine = _try_lock(file.fileno())
                if mine and os.fstat(file.fileno()).st_nlink == 0:
                    return None  # the process that had it has just given up
                has_room = mine and self._make_room(digest.bytes, partial)
                if has_room:
                    os.truncate(partial, digest.bytes)
                elif mine:
                    partial.unlink()
            if not mine:
                fcntl.flock(file, fcntl.LOCK_SH)  # until the other process has finished, or died
                return None
            if not has_room:
                time.sleep(RETRY_SECONDS)
                return None
            try:
                _download(url, partial, name, digest)
            except BaseException:
                partial.unlink()
                raise
            with storage.locked(self.folder, "lock"):
                os.replace(partial, path)
                return os.open(path, os.O_RDONLY)

    def _make_room(self, num_bytes: int, mine: Path) -> bool:
        """Delete what was used longest ago until so many bytes fit; the lock is held.

        Returns: False where files that others are fetching leave no room: once they are whole they can go.
        """
        files = []
        for path in self.folder.glob("*/shards/*.tar*"):
            if path == mine or (path.suffix == ".partial" and _delete_orphan(path)):
                continue
            with contextlib.suppress(FileNotFoundError):  # a fetch that fails takes its partial file away
                state = path.stat()
                files.append((state.st_mtime_ns, state.st_size, path))
        total = num_bytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total > self.max_bytes and path.suffix == ".tar":
                path.unlink()
                total -= size
        return total <= self.max_bytes


def _download(url: str, partial: Path, name: str, digest: FileDigest) -> None:
    """Write the file into its place-holder. Raises: DamagedFileError when it is another file."""
    sha256, done = hashlib.sha256(), 0
    with partial.open("r+b") as file:
        for start in range(0, digest.bytes, CHUNK_BYTES):
            chunk = fetch(f"{url}/{name}", start, min(start + CHUNK_BYTES, digest.bytes))
            file.write(chunk)
            sha256.update(chunk)
            done += len(chunk)
        sync_file(file)
    if FileDigest(done, sha256.hexdigest()) != digest:
        raise DamagedFileError(f"{url}/{name} is not the file that the manifest names")


def mark_used(descriptor: int) -> int:
    """Note that a kept file is used now: its modification time says when. (The kernel's own stamps are 4 ms apart.)"""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _delete_orphan(partial: Path) -> bool:
    """Delete a partial file whose process has died; whether it was one."""
    try:
        descriptor = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        orphan = _try_lock(descriptor)
        if orphan:
            partial.unlink(missing_ok=True)
        return orphan
    finally:
        os.close(descriptor)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
