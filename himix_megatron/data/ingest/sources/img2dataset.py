"""What img2dataset leaves: tars, parquet files with the images in them, or folders of plain files.

Rows that it could not download are bad rows here (`download_failed`). A set that was crawled years after it was listed has
many: raise --max-bad-fraction knowingly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ...errors import BadSampleError
from ...shards import storage
from .base import BadRow, Sample, digest_id
from .file_list import FileReader, FileScan, check_links, find_files, scanned
from .llava import read_image
from .parquet import ParquetReader
from .webdataset import Row, TarReader, has_content, row_id, row_outcome, split_name


def open_img2dataset(inputs: Sequence[str], follow_links: bool = False) -> tuple[FileReader, list[str]]:
    """The layout that a run of img2dataset used, and its files. Raises: ValueError where there is none."""
    for place in inputs:
        storage.check_scheme(place, "--input")
    entries = [(place, *item) for place in inputs for item in storage.list_folder(place)]
    names = [name for _, name, is_folder in entries if not is_folder] + list(inputs)
    if any(name.endswith(".tar") for name in names):
        return TarReader(needs_success=True), find_files(inputs, (".tar",), follow_links)
    folders = [storage.join(place, name) for place, name, is_folder in entries if is_folder and name.isdigit()]
    if folders:
        check_links(folders, follow_links)
        return FolderReader(follow_links), [
            place if storage.is_remote(place) else str(storage.local_path(place).absolute()) for place in folders
        ]
    return ParquetReader(needs_success=True), find_files(inputs, (".parquet",), follow_links)


@dataclass(frozen=True, slots=True)
class FolderReader:
    """The `files` layout: folders 00000, 00001 ... of KEY.jpg, KEY.txt, KEY.json."""

    follow_links: bool = False
    suffixes: tuple[str, ...] = ()

    def scan(self, place: str) -> FileScan:
        """Hash names and contents; find the ids."""
        digest = hashlib.sha256()
        ids = []
        for key, names in _keys(place):
            row = self._load(place, key, names)
            digest.update(json.dumps([key, [[suffix, len(data)] for suffix, data in row.contents.items()]]).encode())
            for data in row.contents.values():
                digest.update(data)
            ids.append(digest_id(row_id(row)))
        return scanned({"sha256": digest.hexdigest()}, ids)

    def read(self, place: str, first: int, end: int, offset: int | None) -> Iterator[Sample | BadRow]:
        """Rows by the order of their keys."""
        for key, names in _keys(place)[first:end]:
            yield row_outcome(self._load(place, key, names), needs_success=True)

    def _load(self, place: str, key: str, names: list[str]) -> Row:
        """The files of one key."""
        row = Row(key)
        for name in names:
            suffix = split_name(name)[1]
            if not has_content(suffix):
                continue
            try:
                row.contents[suffix] = read_image(place, name, row.room(suffix), self.follow_links)
            except BadSampleError as error:
                row.error = row.error or error
        return row


def _keys(place: str) -> list[tuple[str, list[str]]]:
    """Each key of a folder with its files, in order."""
    names = [name for name, is_folder in storage.list_folder(place) if not is_folder and split_name(name)[1]]
    names.sort(key=lambda name: (split_name(name)[0], name))
    return [(key, list(group)) for key, group in groupby(names, lambda name: split_name(name)[0])]
