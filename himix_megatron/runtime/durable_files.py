"""Files that survive a crash: a file under its final name is complete, also after a power cut.

Flows in: paths and bytes; out: files that are on the disk when the call returns, and their digests.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .limits import Sha256, Size
from .untrusted_files import open_regular


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and SHA-256 of one file."""

    bytes: Size
    sha256: Sha256


def bytes_digest(data: bytes) -> FileDigest:
    """The digest of a file with this content."""
    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def file_digest(path: Path) -> FileDigest:
    """Raises: FileNotFoundError; ValueError for what is no regular file."""
    with open_regular(path) as file:
        return digest_of(file)


def digest_of(file: io.BufferedReader) -> FileDigest:
    """The digest of an open file, read from where it stands to its end, which is its start for a file just opened."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(file.tell(), digest)


def publish(path: Path, data: bytes, *, partial: Path | None = None) -> None:
    """Write or replace a file atomically: readers see all of it or none.

    Args: `partial`: where it is written first, on the same file system; default: beside it, with the suffix `.writing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial or path.with_name(f"{path.name}.writing")
    write_synced(partial, data)
    partial.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file into an existing folder and flush it to the disk; a crash meanwhile leaves a part of it.

    What has the name makes way: a link there would have led to another file.
    """
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)
        sync_file(file)


def append_synced(path: Path, text: str) -> None:
    """Append to a file in an existing folder and flush it to the disk; a crash meanwhile leaves a part of the text."""
    with open_append(path) as file:
        file.write(text)
        sync_file(file)


def open_append(path: Path) -> IO[str]:
    """A text file for appending, made where there is none. Raises: OSError, also for a symbolic link, or a FIFO
    that nobody reads."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def sync_file(file: IO[bytes] | IO[str]) -> None:
    """Flush what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: files created, renamed and removed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
