"""Places: a local path, `file://`, or `s3://` through fsspec. Nothing else is opened, whatever fsspec could.

Local folders keep what a file system gives: rename, fsync. On an object store an object is whole when it exists, and nothing is
renamed. S3 settings come from where boto has them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, profiles).
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

from ...runtime.durable_files import FileDigest, digest_of, sync_folder
from ...runtime.typed_json import MAX_FILE_BYTES
from ...runtime.untrusted_files import folder_below, open_below, open_lock, open_regular, read_below, size_below

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
CHUNK = 8 << 20
"""Bytes at a time where a whole file is gone through."""


def check_scheme(place: str, flag: str) -> None:
    """Raises: ValueError for anything but a path, file:// and s3://."""
    found = _SCHEME.match(place)
    scheme = found[1] if found else None
    if not place or "\0" in place:
        raise ValueError(f"{flag} is {place!r}: wanted a path, file:// or s3://")
    if scheme is not None and not re.match(r"file:///|s3://[^/]", place):
        raise ValueError(f"{flag} {place}: `{scheme}:` is not read; wanted a path, file:///PATH or s3://BUCKET/KEY")
    if scheme == "s3":
        _s3()


def check_reachable(place: str, flag: str) -> None:
    """Raises: ValueError where an object store does not answer, or does not know us."""
    if not is_remote(place):
        return
    from botocore.exceptions import BotoCoreError

    try:
        _listing(place)
    except (BotoCoreError, PermissionError) as error:
        raise ValueError(f"{flag} {place}: {error}") from None


def is_remote(place: str) -> bool:
    """Whether the place is on an object store."""
    return place.startswith("s3://")


def local_path(place: str) -> Path:
    """The path of a local place."""
    assert not is_remote(place)
    return Path(unquote(place[len("file://") :]) if place.startswith("file://") else place)


def join(folder: str, name: str) -> str:
    """A place below a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(local_path(folder) / name)


def name_of(place: str) -> str:
    """The last part of a place."""
    return posixpath.basename(place.rstrip("/")) if is_remote(place) else local_path(place).name


def check_folder(place: str, flag: str) -> None:
    """Raises: ValueError where there is no such folder (on an object store: nothing below it)."""
    there = bool(_listing(place)) if is_remote(place) else local_path(place).is_dir()
    if not there:
        raise ValueError(f"{flag} {place}: no such folder")


def is_file(place: str) -> bool:
    """Whether there is such a file."""
    return bool(_s3().isfile(place)) if is_remote(place) else local_path(place).is_file()


def list_folder(place: str) -> list[tuple[str, bool]]:
    """(name, whether it is a folder) of everything in a folder, sorted. Empty where there is none."""
    if is_remote(place):
        found = [(posixpath.basename(item["name"].rstrip("/")), item["type"] == "directory") for item in _listing(place)]
        return sorted(item for item in found if item[0])
    folder = local_path(place)
    return sorted((item.name, item.is_dir()) for item in folder.iterdir()) if folder.is_dir() else []


def open_file(place: str) -> io.BufferedReader:
    """A file for reading; an object is read like one. Raises: FileNotFoundError; OSError; ValueError for a FIFO or a device."""
    if is_remote(place):
        file: io.BufferedReader = _s3().open(place, "rb", block_size=CHUNK, cache_type="readahead")
        return file
    return io.BufferedReader(open_regular(local_path(place)).detach(), 1 << 18)


def read_bytes(place: str, limit: int | None = None) -> bytes:
    """A whole file, or its first `limit` bytes. Raises: FileNotFoundError; OSError; ValueError for a FIFO or a device."""
    if is_remote(place) and limit is None:
        return read_object(place)
    with open_file(place) as file:
        return file.read(-1 if limit is None else limit)


def read_object(place: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes start <= i < end of a file on an object store, or all of it; fewer where it is shorter. Raises: FileNotFoundError;
    OSError."""
    data: bytes = _s3().cat_file(place, start=start, end=end)
    return data


def size_of(place: str) -> int:
    """Bytes of a file. Raises: FileNotFoundError."""
    return int(_s3().info(place)["size"]) if is_remote(place) else local_path(place).stat().st_size


def remote_identity(place: str) -> dict[str, Any]:
    """What tells one version of a remote object from another, without reading it: size and ETag."""
    info = _s3().info(place)
    return {"bytes": int(info["size"]), "etag": str(info["ETag"]).strip('"')}


def _listing(place: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = _s3().ls(place, detail=True, refresh=True)
        return found
    except FileNotFoundError:
        return []


def _s3() -> Any:
    """The S3 file system of this process. Raises: ValueError where s3fs is not installed."""
    try:
        import s3fs
    except ImportError:
        raise ValueError("s3:// needs the package s3fs: pip install 'himix-megatron[s3]'") from None
    return s3fs.S3FileSystem(use_listings_cache=False)  # fsspec keeps one


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Alone among the processes of this machine, however they end; where a file system has no locks, with the others.

    The file stays: deleting it would let two processes hold two locks.
    """
    with open_lock(folder, name) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_sizes(folder: Path, wanted: Mapping[str, FileDigest], again: str) -> None:
    """Raises: ValueError for a file in a folder that is missing or has another size. `again`: how it is made anew."""
    for name, digest in wanted.items():
        try:
            found = size_below(folder, name)
        except FileNotFoundError:
            found = None
        if found != digest.bytes:
            state = "is missing" if found is None else f"has {found} bytes, not {digest.bytes}"
            raise ValueError(f"{folder / name} {state}: {again}")


class Folder(Protocol):
    """Where a dataset is written. Names are relative, with slashes."""

    def read(self, name: str) -> bytes | None:
        """A file's content; None: there is none."""

    def is_whole(self, name: str, wanted: FileDigest) -> bool | None:
        """Whether a file, read to its end if it is as long, is as it should be; None: there is none."""

    def put(self, files: dict[str, Path]) -> None:
        """Move finished local files, which are on the disk, to their names; they are there for good when this returns."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def receipts(self) -> list[str]:
        """Names of the shards that have a receipt."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of a file system that all workers share."""

    path: Path

    def read(self, name: str) -> bytes | None:
        """As Folder says."""
        try:
            return read_below(self.path, name, MAX_FILE_BYTES)
        except (FileNotFoundError, ValueError):  # a link or a FIFO is no file of a dataset: what is made anew replaces it
            return None

    def is_whole(self, name: str, wanted: FileDigest) -> bool | None:
        """As Folder says."""
        try:
            with open_below(self.path, name) as file:
                return os.fstat(file.fileno()).st_size == wanted.bytes and digest_of(file) == wanted
        except (FileNotFoundError, ValueError):
            return None

    def put(self, files: dict[str, Path]) -> None:
        """By rename: a reader sees the whole file or none."""
        folders = {folder_below(self.path, posixpath.dirname(name)) if "/" in name else self.path for name in files}
        for name, file in files.items():
            os.replace(file, self.path / name)
        for folder in folders:
            sync_folder(folder)

    def remove(self, name: str) -> None:
        """As Folder says."""
        (self.path / name).unlink(missing_ok=True)
        sync_folder((self.path / name).parent)

    def receipts(self) -> list[str]:
        """As Folder says."""
        return sorted(path.stem for path in (self.path / "receipts").glob("*.json"))

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A prefix of an object store."""

    url: str

    def read(self, name: str) -> bytes | None:
        """As Folder says."""
        try:
            return read_bytes(join(self.url, name))
        except FileNotFoundError:
            return None

    def is_whole(self, name: str, wanted: FileDigest) -> bool | None:
        """Read again from the store: an ETag is no hash of ours."""
        try:
            with open_file(join(self.url, name)) as file:
                return size_of(join(self.url, name)) == wanted.bytes and digest_of(file) == wanted
        except FileNotFoundError:
            return None

    def put(self, files: dict[str, Path]) -> None:
        """By upload: an object appears when all of it is there."""
        for name, file in files.items():
            _s3().put_file(str(file), join(self.url, name))
            file.unlink()

    def remove(self, name: str) -> None:
        """As Folder says."""
        try:
            _s3().rm_file(join(self.url, name))
        except FileNotFoundError:
            return

    def receipts(self) -> list[str]:
        """As Folder says."""
        names = (name for name, _ in list_folder(join(self.url, "receipts")))
        return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))

    def __str__(self) -> str:
        return self.url


def folder_at(place: str) -> LocalFolder | RemoteFolder:
    """The folder of a place."""
    return RemoteFolder(place.rstrip("/")) if is_remote(place) else LocalFolder(local_path(place).absolute())
