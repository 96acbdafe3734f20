"""LLaVA's layout: one JSON list (or a line per row) of {id, image, conversations}, and a folder of images."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ....runtime.untrusted_files import LinkError, open_below, open_regular
from ...errors import BadSampleError
from ...shards import storage
from .base import (
    MAX_SAMPLE_BYTES,
    BadRow,
    Sample,
    SourceError,
    checked_conversation,
    checked_id,
    digest_id,
    find_repeated,
    number_rows,
    parse_json,
    parse_row,
    usable_id,
)

# What a wrong file name answers with. Anything else (EIO, ESTALE, ENOMEM ...) is the machine's fault.
_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.EINVAL}
_NO_SUCH_FILE |= {errno.ENXIO, errno.EPERM}  # a socket; a protected file

MAX_ANNOTATION_BYTES = 4 << 30
"""The file is in memory as a whole, and its rows take some twenty times as much; the largest known has one GB."""


class LlavaSource:
    """The rows of an annotation file, held in memory as they were parsed. A line of a .jsonl that is no JSON is a bad row.

    Raises: SourceError where the annotations are no list of rows, or there is no such file or folder.
    """

    def __init__(self, annotations: str, images: str, follow_links: bool = False) -> None:
        self._rows, self.source_hash = _load(annotations)
        storage.check_folder(images, "--images")
        self._follow_links = follow_links
        self._images = images if storage.is_remote(images) else str(storage.local_path(images).absolute())
        digests = [digest_id(_id_or_row(row, number)) for number, row in enumerate(self._rows)]
        hashes = np.array([digest.hash for digest in digests], np.uint64)
        self._repeated = find_repeated(hashes, np.array([digest.numbered for digest in digests], np.int64))

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return len(self._rows)

    def part(self, first: int, end: int) -> LlavaPart:
        """The texts of these rows."""
        repeated = frozenset((first + np.flatnonzero(self._repeated[first:end])).tolist())
        return LlavaPart(first, self._rows[first:end], self._images, self._follow_links, repeated)


@dataclass(frozen=True, slots=True)
class LlavaPart:
    """The texts of some rows, and where their images are."""

    first_row: int
    texts: list[Any]
    images: str
    follow_links: bool
    repeated: frozenset[int]

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return len(self.texts)

    def rows(self) -> Iterator[tuple[int, Sample | BadRow]]:
        """Read each row's images from the folder."""
        return number_rows((self._read(row) for row in self.texts), self.first_row, self.repeated)

    def retry(self, rows: Iterable[int]) -> Iterator[tuple[int, Sample | BadRow]]:
        """Read the images of these rows again."""
        for row in rows:
            yield from number_rows([self._read(self.texts[row - self.first_row])], row, self.repeated)

    def _read(self, row: Any) -> Sample | BadRow:
        try:
            return read_llava(row, self.images, self.follow_links)
        except BadSampleError as error:
            return BadRow(_id_or_row(row, None), error)


def read_llava(row: Any, images: str, follow_links: bool = False) -> Sample:
    """One row with its images read from the folder. `image` may be absent (a text-only row), a name, or a list of names.

    Raises: BadSampleError; OSError when the machine fails.
    """
    if isinstance(row, BadSampleError):
        raise row
    if not isinstance(row, Mapping):
        raise BadSampleError("malformed", "the row is not an object")
    name_of_row = checked_id(row.get("id"))
    names = row.get("image")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSampleError("malformed", "`image` is neither a name nor a list of names")
    turns = checked_conversation(row.get("conversations"), len(names))
    contents: list[bytes] = []
    for name in names:
        contents.append(read_image(images, name, MAX_SAMPLE_BYTES - sum(map(len, contents)), follow_links))
    return Sample(name_of_row, turns, tuple(contents))


def read_image(folder: str, name: str, limit: int, follow_links: bool = False) -> bytes:
    """One file below the folder, of at most `limit` bytes. Raises: BadSampleError; OSError when the machine fails."""
    path = PurePosixPath(name)
    if not name.isprintable() or not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BadSampleError("unsafe_name", f"{name!r} does not stay in the image folder"[:200])
    if storage.is_remote(folder):
        try:
            data = storage.read_bytes(storage.join(folder, str(path)), limit + 1)
        except (FileNotFoundError, IsADirectoryError):
            raise BadSampleError("missing_image", f"{name!r}: {os.strerror(errno.ENOENT)}"[:200]) from None
    else:
        data = _read_local(Path(folder), str(path), limit, follow_links)
    if len(data) > limit:
        raise BadSampleError("oversized_image", f"{name!r} takes the sample above {MAX_SAMPLE_BYTES} bytes"[:200])
    return data


def _read_local(folder: Path, name: str, limit: int, follow_links: bool) -> bytes:
    """The file, or its first limit + 1 bytes."""
    try:
        stream = open_regular(f"{folder}/{name}") if follow_links else open_below(folder, name)
    except LinkError:
        detail = f"{name!r:.100} is a symbolic link, or behind one: --follow-links reads those"
        raise BadSampleError("missing_image", detail) from None
    except ValueError:
        raise BadSampleError("missing_image", f"{name!r} is no regular file"[:200]) from None
    except OSError as error:
        if error.errno in _NO_SUCH_FILE:
            raise BadSampleError("missing_image", f"{name!r}: {os.strerror(error.errno or 0)}"[:200]) from None
        raise
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise BadSampleError("oversized_image", f"{name!r} takes the sample above {MAX_SAMPLE_BYTES} bytes"[:200])
        return stream.read(min(limit, size) + 1)  # what is asked for is allocated first


def _load(annotations: str) -> tuple[list[Any], str]:
    """The rows, and the SHA-256 of the file they were parsed from."""
    if not storage.is_file(annotations):  # a named pipe would wait for ever
        raise SourceError(f"--annotations {annotations}: no such file")
    if (size := storage.size_of(annotations)) > MAX_ANNOTATION_BYTES:
        raise SourceError(f"--annotations {annotations} has {size} bytes: at most {MAX_ANNOTATION_BYTES} are read")
    data = storage.read_bytes(annotations)
    source_hash = hashlib.sha256(data).hexdigest()
    if annotations.endswith(".jsonl"):
        rows = [parse_row(line, f"line {number}") for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    else:
        try:
            text = data.decode("utf-8")
            del data  # a GB for the large sets
            rows = parse_json(text, "the file")
        except ValueError as error:
            long = re.search(r"\d{4301}", text) if "digits" in str(error) else None  # of these Python does not tell the place
            raise SourceError(f"--annotations {annotations}: {error}{f' (char {long.start()})' if long else ''}") from None
    if not isinstance(rows, list) or not rows:
        raise SourceError(f"--annotations {annotations}: not a list of rows")
    return rows, source_hash


def _id_or_row(row: Any, number: int | None) -> Any:
    """The row's id where it has a usable one, else the number."""
    found = usable_id(row.get("id")) if isinstance(row, Mapping) else None
    return number if found is None else found
