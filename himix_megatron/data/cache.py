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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from himix_megatron.data.schema import FileDigest

DEFAULT_FOLDER = Path("~/.cache/himix-megatron/shards")
DEFAULT_BYTES = 50 << 30
CHUNK_BYTES = 16 << 20
"""Of one request: what a killed process loses, and what fetching holds in memory."""
REQUESTS_AT_ONCE = 16
"""For small files."""
RETRY_SECONDS = 0.1
"""Between two looks for room that others are filling."""


class DamagedFileError(RuntimeError):
    """A remote file is not what the manifest says."""


def local_folder(location: str | Path) -> Path | None:
    """The folder that a path or file:// names; None for s3://. Raises: ValueError for any other scheme."""
    scheme, mark, rest = str(location).partition("://")
    if isinstance(location, Path) or not mark:
        return Path(location)
    if scheme == "file":
        return Path(rest)
    if scheme == "s3":
        return None
    raise ValueError(f"{location}: {scheme}:// cannot be read; wanted a folder, file:// or s3://")


class Remote:
    """Reads one dataset folder on S3. It can be sent to other processes; each connects for itself."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._store: Any = None

    def read(self, name: str) -> bytes:
        """A small file of the folder. Raises: FileNotFoundError; OSError when the store cannot be read."""
        return self._get(name)

    def read_many(self, sizes: dict[str, int]) -> Iterator[tuple[str, bytes]]:
        """Small files of known sizes, several requests under way at a time. Raises: as `read`."""
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            found = pool.map(lambda name: self._get(name, start=0, end=sizes[name]), sizes)
            yield from zip(sizes, found, strict=True)

    def chunks(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """A large file, piece by piece. Raises: as `read`."""
        for start in range(0, num_bytes, CHUNK_BYTES):
            yield self._get(name, start=start, end=min(start + CHUNK_BYTES, num_bytes))

    def _get(self, name: str, **part: int) -> bytes:
        place = f"{self.url}/{name}"
        if self._store is None:
            self._store = connect(self.url)
        from botocore.exceptions import BotoCoreError  # without credentials or a connection s3fs lets these through

        try:
            data: bytes = self._store.cat_file(place, **part)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", place) from None
        except BotoCoreError as error:
            raise OSError(f"{place} cannot be read: {error}") from error
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}


def connect(url: str) -> Any:
    """fsspec's S3 file system. Raises: ValueError where s3fs, which it needs, is not installed."""
    import fsspec

    try:
        return fsspec.filesystem("s3", use_listings_cache=False)
    except ImportError:
        raise ValueError(f"{url} needs s3fs, which is not installed: pip install 'himix-megatron[s3]'") from None


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

    def keep_small(self, remote: Remote, folder: Path, wanted: dict[str, FileDigest]) -> None:
        """See that small files are in `folder`. One process of a machine fetches them, the others wait.

        Raises: DamagedFileError for one that is not as its digest says.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            missing = {name: digest.bytes for name, digest in wanted.items() if _size(folder / name) != digest.bytes}
            for parent in {(folder / name).parent for name in missing}:
                parent.mkdir(parents=True, exist_ok=True)
            for name, data in remote.read_many(missing):
                if FileDigest(len(data), hashlib.sha256(data).hexdigest()) != wanted[name]:
                    raise DamagedFileError(f"{remote.url}/{name} is not the file that the manifest names")
                partial = folder / f"{name}.partial"
                partial.write_bytes(data)
                os.replace(partial, folder / name)

    def open(self, remote: Remote, folder: Path, name: str, digest: FileDigest) -> int:
        """An open descriptor of a large file, which is fetched first unless it is here. It counts as used just now.

        Raises: DamagedFileError for a file that is not as its digest says (nothing of it is kept); OSError.
        """
        path = folder / name
        while True:
            with contextlib.suppress(FileNotFoundError):
                return mark_used(os.open(path, os.O_RDONLY))
            fetched = self._fetch(remote, path, name, digest)
            if fetched is not None:
                return mark_used(fetched)

    def _fetch(self, remote: Remote, path: Path, name: str, digest: FileDigest) -> int | None:
        """Bring the file to its place and open it. None: look again; another process was about it, or there was no room."""
        partial = path.with_name(path.name + ".partial")
        with contextlib.ExitStack() as stack:
            with _locked(self.folder / "lock"):
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
                _download(remote, partial, name, digest)
            except BaseException:
                partial.unlink()
                raise
            with _locked(self.folder / "lock"):
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


def _download(remote: Remote, partial: Path, name: str, digest: FileDigest) -> None:
    """Write the file into its place-holder. Raises: DamagedFileError when it is another file."""
    sha256, done = hashlib.sha256(), 0
    with partial.open("r+b") as file:
        for chunk in remote.chunks(name, digest.bytes):
            file.write(chunk)
            sha256.update(chunk)
            done += len(chunk)
    if FileDigest(done, sha256.hexdigest()) != digest:
        raise DamagedFileError(f"{remote.url}/{name} is not the file that the manifest names")


def mark_used(descriptor: int) -> int:
    """Note that a kept file is used now: its modification time says when. (The kernel's own stamps are 4 ms apart.)"""
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))
    return descriptor


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine. The file stays: deleting it would let two processes hold two locks."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
