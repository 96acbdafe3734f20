"""A source of several large files, each holding many rows: rows are numbered through all files, in order.

A first pass over each file (a task of its own) hashes it and counts its rows; a shard is then made from pieces of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...shards import shard_format, storage
from .base import BadRow, IdDigest, Sample, SourceError, digest_id, find_repeated, number_rows

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FileScan:
    """What the first pass over one file found."""

    identity: dict[str, Any]
    """Size and SHA-256; on an object store size and ETag."""
    hashes: npt.NDArray[np.uint64]
    """uint64[rows] of the ids."""
    numbered: Integers
    """int64[rows]: N of ids like ID@N, -1 of others, -2 where a row has no id."""
    offsets: Integers | None = None
    """int64[rows]: where each row begins, in bytes; None: rows are found by their number."""

    @property
    def num_rows(self) -> int:
        """Rows of this file."""
        return len(self.hashes)


class FileReader(Protocol):
    """One layout of files."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """How the names of its files end; empty: each is a folder."""

    def scan(self, place: str) -> FileScan:
        """Go through a file once. Raises: SourceError where it is damaged or of another layout."""

    def read(self, place: str, first: int, end: int, offset: int | None) -> Iterator[Sample | BadRow]:
        """Rows first <= row < end of a file; the first one begins at `offset`. Raises: SourceError."""


NO_ID = IdDigest(0, -2)


def scanned(identity: dict[str, Any], ids: Sequence[IdDigest], offsets: Sequence[int] | None = None) -> FileScan:
    """A FileScan from lists."""
    return FileScan(
        identity,
        np.array([digest.hash for digest in ids], np.uint64),
        np.array([digest.numbered for digest in ids], np.int64),
        None if offsets is None else np.array(offsets, np.int64),
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one file."""

    place: str
    first: int
    end: int
    offset: int | None


class FilesSource:
    """Files of one layout, in order, and what the first pass found in each. Raises: SourceError where there are no rows."""

    def __init__(self, reader: FileReader, places: Sequence[str], scans: Sequence[FileScan]) -> None:
        self._reader, self._places, self._scans = reader, places, scans
        self._ends = np.cumsum([scan.num_rows for scan in scans])
        files = [[storage.name_of(place), scan.identity] for place, scan in zip(places, scans, strict=True)]
        self.source_hash = shard_format.hash_of(files)
        if not self.num_rows:
            raise SourceError(f"--input {places[0]}{' and the other files' if len(places) > 1 else ''}: no rows in it")
        hashes, numbered = (np.concatenate([getattr(scan, name) for scan in scans]) for name in ("hashes", "numbered"))
        for row in np.flatnonzero(numbered == -2):
            hashes[row], numbered[row] = digest_id(int(row)).hash, -1
        self._repeated = find_repeated(hashes, numbered)

    @property
    def num_rows(self) -> int:
        """Rows in all files."""
        return int(self._ends[-1])

    def part(self, first: int, end: int) -> FilesPart:
        """Which pieces of which files."""
        pieces = []
        first_file, last_file = np.searchsorted(self._ends, [first, end - 1], side="right")
        for number in range(first_file, last_file + 1):
            scan = self._scans[number]
            start = int(self._ends[number]) - scan.num_rows
            low, high = max(first - start, 0), min(end - start, scan.num_rows)
            if low < high:  # not for a file without rows
                offset = None if scan.offsets is None else int(scan.offsets[low])
                pieces.append(Piece(self._places[number], low, high, offset))
        repeated = frozenset((first + np.flatnonzero(self._repeated[first:end])).tolist())
        return FilesPart(self._reader, first, tuple(pieces), repeated)


@dataclass(frozen=True, slots=True)
class FilesPart:
    """Pieces of files that make one shard."""

    reader: FileReader
    first_row: int
    pieces: tuple[Piece, ...]
    repeated: frozenset[int]

    @property
    def num_rows(self) -> int:
        """How many rows."""
        return sum(piece.end - piece.first for piece in self.pieces)

    def rows(self) -> Iterator[tuple[int, Sample | BadRow]]:
        """Read the pieces."""
        return number_rows((row for piece in self.pieces for row in self._read(piece)), self.first_row, self.repeated)

    def retry(self, rows: Iterable[int]) -> Iterator[tuple[int, Sample | BadRow]]:
        """None: the source's hash covers the images."""
        return iter(())

    def _read(self, piece: Piece) -> Iterator[Sample | BadRow]:
        count = 0
        for outcome in self.reader.read(piece.place, piece.first, piece.end, piece.offset):
            yield outcome
            count += 1
        if count != piece.end - piece.first:
            raise SourceError(f"{piece.place}: it changed while it was read (rows {piece.first} to {piece.end} are not there)")


def find_files(inputs: Sequence[str], suffixes: tuple[str, ...], follow_links: bool = False) -> list[str]:
    """The files that --input names, and in its folders those with one of the suffixes, sorted. Raises: ValueError."""
    places: list[str] = []
    for place in inputs:
        storage.check_scheme(place, "--input")
        place = place if storage.is_remote(place) else str(storage.local_path(place).absolute())
        if storage.is_file(place):
            places.append(place)
            continue
        names = [name for name, is_folder in storage.list_folder(place) if not is_folder and name.endswith(suffixes)]
        names = [name for name in names if not name.startswith(".")]
        if not names:
            storage.check_folder(place, "--input")
            raise ValueError(f"--input {place}: no {' or '.join(suffixes)} files in it")
        found = [storage.join(place, name) for name in names]
        check_links(found, follow_links)
        places += found
    return places


def check_links(found: Iterable[str], follow_links: bool) -> None:
    """Raises: SourceError for a link among the files and folders in a folder of --input, and for what is neither."""
    for path in (storage.local_path(place) for place in found if not storage.is_remote(place)):
        if path.is_symlink() and not follow_links:
            raise SourceError(f"--input {path}: it is a symbolic link, which can lead to any file: --follow-links reads it")
        if not path.is_file() and not path.is_dir():
            raise SourceError(f"--input {path}: it is no regular file")
