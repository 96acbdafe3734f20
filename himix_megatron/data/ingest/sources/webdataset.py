"""Rows of any WebDataset: consecutive members of a tar whose names are equal up to the first dot.

KEY.jpg (png, webp, gif, bmp; or several: KEY.0.jpg, KEY.1.png) with KEY.json in LLaVA's layout, or a caption in KEY.json or
KEY.txt. Other members are passed over, unread: pickles, arrays and whatever else is there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import BadSampleError
from ...shards import storage
from .base import (
    MAX_SAMPLE_BYTES,
    MAX_TEXT_BYTES,
    BadRow,
    IdDigest,
    Sample,
    SourceError,
    caption_turns,
    checked_conversation,
    checked_id,
    digest_id,
    parse_object,
)
from .file_list import FileScan, scanned
from .tar_reader import Member, TarError, TarStream

IMAGE_SUFFIX = re.compile(r"(?:(\d{1,6})\.)?(?:jpe?g|png|webp|gif|bmp)")
TEXT_SUFFIXES = ("json", "txt")


@dataclass(slots=True)
class Row:
    """The members of one row, as far as they were read."""

    key: str
    offset: int = 0
    contents: dict[str, bytes] = field(default_factory=dict)
    """By suffix in small letters, without the first dot."""
    error: BadSampleError | None = None

    def room(self, suffix: str) -> int:
        """Bytes that the member with this suffix may have."""
        return MAX_TEXT_BYTES if suffix in TEXT_SUFFIXES else MAX_SAMPLE_BYTES - sum(map(len, self.contents.values()))


@dataclass(frozen=True, slots=True)
class TarReader:
    """Tars of a WebDataset."""

    needs_success: bool = False
    """Rows whose KEY.json has a `status` other than success are bad (img2dataset)."""
    suffixes: tuple[str, ...] = (".tar",)

    def scan(self, place: str) -> FileScan:
        """Hash the tar; find where each row begins, and its id. An error tells how many samples are before the damage."""
        digest, size = hashlib.sha256(), storage.size_of(place)
        ids: list[IdDigest] = []
        offsets: list[int] = []
        with storage.open_file(place) as file:

            def read(count: int) -> bytes:
                data = file.read(count)
                digest.update(data)
                return data

            try:
                for row in _rows(TarStream(read, size), lambda suffix: suffix == "json"):
                    ids.append(digest_id(row_id(row)))
                    offsets.append(row.offset)
            except TarError as error:
                raise SourceError(f"--input {place}: {error}, after {len(ids)} whole samples") from None
        identity = storage.remote_identity(place) if storage.is_remote(place) else {"bytes": size, "sha256": digest.hexdigest()}
        return scanned(identity, ids, offsets)

    def read(self, place: str, first: int, end: int, offset: int | None) -> Iterator[Sample | BadRow]:
        """Rows from a byte on."""
        assert offset is not None
        size = storage.size_of(place)
        with storage.open_file(place) as file:
            file.seek(offset)
            rows = _rows(TarStream(file.read, size, offset), has_content)
            try:
                for _ in range(end - first):
                    row = next(rows, None)
                    if row is None:
                        return
                    yield row_outcome(row, self.needs_success)
            except TarError as error:
                raise SourceError(f"{place}: {error}") from None


def _rows(stream: TarStream, is_used: Callable[[str], bool]) -> Iterator[Row]:
    """Group members into rows, with the contents of those suffixes that are used. Raises: TarError."""
    row: Row | None = None
    for member in stream.members():
        key, suffix = split_name(member.name)
        if member.refused is None and not suffix:
            continue  # a README, ._file or __meta__.json belongs to no row
        if member.is_folder and (member.refused or "").startswith("it is"):
            continue
        if row is not None and row.key != key:
            yield row
            row = None
        if row is None:
            row = Row(key, member.offset)
        _add(row, member, suffix, stream, is_used)
    if row is not None:
        yield row


def _add(row: Row, member: Member, suffix: str, stream: TarStream, is_used: Callable[[str], bool]) -> None:
    """Read one member into its row, or note why it cannot be."""
    error = None
    if member.refused:
        reason = "not_a_file" if "plain file" in member.refused or "sparse" in member.refused else "unsafe_name"
        error = BadSampleError(reason, f"member {member.name!r:.150}: {member.refused}")
    elif suffix in row.contents:
        error = BadSampleError("duplicate_member", f"two members {member.name!r:.150}")
    elif is_used(suffix) and member.size > row.room(suffix):
        reason = "oversized_text" if suffix in TEXT_SUFFIXES else "oversized_image"
        error = BadSampleError(reason, f"member {member.name!r:.150} has {member.size} bytes")
    elif is_used(suffix):
        row.contents[suffix] = stream.content()
    row.error = row.error or error


def split_name(name: str) -> tuple[str, str]:
    """A member's name as key (with its folders) and suffix; an empty suffix: it belongs to no row."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or (base.startswith("__") and stem.endswith("__")):
        suffix = ""
    return folder + slash + stem, suffix.lower()


def has_content(suffix: str) -> bool:
    """Whether members with this suffix (in small letters) are read."""
    return suffix in TEXT_SUFFIXES or IMAGE_SUFFIX.fullmatch(suffix) is not None


def row_id(row: Row) -> str | int:
    """`id` of the JSON, or else the key."""
    try:
        found = checked_id(facts_of(row.contents).get("id"))
    except BadSampleError:
        found = None
    return row.key if found is None else found


def row_outcome(row: Row, needs_success: bool) -> Sample | BadRow:
    """What a row's members amount to."""
    try:
        if row.error:
            raise row.error
        return _sample(row, needs_success)
    except BadSampleError as error:
        return BadRow(row_id(row), error)


def _sample(row: Row, needs_success: bool) -> Sample:
    """Raises: BadSampleError."""
    facts = facts_of(row.contents)
    if needs_success and facts.get("status", "success") != "success":
        raise BadSampleError("download_failed", str(facts.get("error_message") or facts["status"])[:200])
    name = checked_id(facts.get("id"))
    images = tuple(images_of(row.contents))
    if "conversations" not in facts and not images:
        raise BadSampleError("missing_image", "there is no image beside the caption")
    return Sample(checked_id(row.key) if name is None else name, row_turns(row.contents, facts, len(images)), images)


def facts_of(contents: Mapping[str, bytes]) -> Mapping[str, Any]:
    """KEY.json; without one nothing. Raises: BadSampleError."""
    return parse_object(contents["json"], "KEY.json") if "json" in contents else {}


def row_turns(contents: Mapping[str, bytes], facts: Mapping[str, Any], num_images: int) -> list[dict[str, Any]]:
    """The conversation of KEY.json (`facts`), or else a caption: KEY.txt, or `caption` or `text` of KEY.json.

    Raises: BadSampleError.
    """
    if "conversations" in facts:
        return checked_conversation(facts["conversations"], num_images)
    try:
        caption = contents["txt"].decode("utf-8") if "txt" in contents else facts.get("caption") or facts.get("text")
    except UnicodeDecodeError as error:
        raise BadSampleError("bad_text", f"KEY.txt is not UTF-8: {error}"[:200]) from None
    return caption_turns(caption, num_images)


def images_of(contents: Mapping[str, bytes]) -> list[bytes]:
    """In the order of their numbers: KEY.jpg before KEY.2.jpg before KEY.10.png."""
    found = [(int(match[1] or -1), suffix) for suffix in contents if (match := IMAGE_SUFFIX.fullmatch(suffix))]
    return [contents[suffix] for _, suffix in sorted(found)]
