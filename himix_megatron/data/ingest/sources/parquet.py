"""Rows of parquet files with the images in them (Hugging Face's layout), read by row groups.

An image column holds bytes, or {bytes, path}, or a list of either. The text column holds LLaVA's turns (as structs, or as JSON
text), or a caption. A task reads the row groups that its rows lie in from the start, so groups of some thousand rows at most
(as Hugging Face writes them) cost least.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ....runtime.durable_files import file_digest
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
    parse_row,
    usable_id,
)
from .file_list import NO_ID, FileScan, scanned

IMAGE_COLUMNS = ("images", "image", "jpg", "png", "webp")
TEXT_COLUMNS = ("conversations", "text", "caption")
ID_COLUMNS = ("id", "key")
"""Names looked for, in this order, where a flag names none. Ids of another type than text or whole numbers are passed over."""

BATCH_ROWS = 1
"""Rows held at a time. One large value of a dictionary can stand in each of many rows; more at once would save 30 us a row."""
_BOMB_RATIO, _BOMB_BYTES = 20, 128 << 20
"""Images are compressed already: a larger column that shrinks more than this is a bomb, not data. So are the texts of a task's
rows that take this many times the file's bytes."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one file."""

    image: str | None
    text: str
    id: str | None
    status: str | None
    error: str | None

    @property
    def read(self) -> list[str]:
        """Those to read."""
        return [name for name in (self.image, self.text, self.id, self.status, self.error) if name]


@dataclass(frozen=True, slots=True)
class ParquetReader:
    """Parquet files; None: the usual names."""

    image_column: str | None = None
    text_column: str | None = None
    id_column: str | None = None
    needs_success: bool = False
    """Rows whose `status` is not success are bad (img2dataset)."""
    suffixes: tuple[str, ...] = (".parquet",)

    def scan(self, place: str) -> FileScan:
        """Check the file's columns, hash it, and read its ids. What is no Parquet file is not read to its end."""
        is_remote = storage.is_remote(place)
        with _opened(place) as file:
            columns = self._columns(file, place)
            _refuse_bombs(file, columns, place)
            identity = storage.remote_identity(place) if is_remote else asdict(file_digest(storage.local_path(place)))
            if columns.id is None:
                return scanned(identity, [NO_ID] * file.metadata.num_rows)
            ids: list[IdDigest] = []
            for batch in file.iter_batches(batch_size=4096, columns=[columns.id]):
                for values in _values(batch):
                    name = usable_id(values[columns.id]) if values else None
                    ids.append(NO_ID if name is None else digest_id(name))
        return scanned(identity, ids)

    def read(self, place: str, first: int, end: int, offset: int | None) -> Iterator[Sample | BadRow]:
        """Rows by their number."""
        with _opened(place) as file:
            columns = self._columns(file, place)
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            starts = [0, *accumulate(counts)]
            groups = [group for group, start in enumerate(starts[:-1]) if start < end and starts[group + 1] > first]
            row, left = starts[groups[0]] if groups else 0, max(_BOMB_BYTES, _BOMB_RATIO * storage.size_of(place))
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=columns.read):
                low, high = max(first - row, 0), min(end - row, batch.num_rows)
                row += batch.num_rows
                if low < high:
                    for values in _values(batch.slice(low, high - low)):
                        yield (outcome := self._outcome(values, columns))
                        if isinstance(outcome, Sample):
                            left -= sum(len(turn["value"]) for turn in outcome.conversations)
                        if left < 0:  # a value of a dictionary that stands in many rows
                            raise SourceError(
                                f"--input {place}: rows {first} to {row} unfold to far more text than a file of its size holds"
                            )
                if row >= end:
                    return

    def _columns(self, file: pq.ParquetFile, place: str) -> Columns:
        """Raises: SourceError listing the columns there are."""
        arrow = file.schema_arrow
        names = list(arrow.names)
        if len(set(names)) != len(names):
            raise SourceError(f"--input {place}: it has two columns of one name ({', '.join(names)})"[:500])

        def choose(given: str | None, usual: tuple[str, ...], flag: str) -> str | None:
            if given is not None and given not in names:
                raise SourceError(f"{flag} {given}: {place} has the columns {', '.join(names)}"[:500])
            return given or next((name for name in usual if name in names), None)

        text = choose(self.text_column, TEXT_COLUMNS, "--text-column")
        if text is None:
            raise SourceError(f"--input {place}: name its text with --text-column; it has the columns {', '.join(names)}"[:500])
        image = choose(self.image_column, IMAGE_COLUMNS, "--image-column")
        if image is None and (self.needs_success or not _is_turns(arrow.field(text).type, text)):
            raise SourceError(
                f"--input {place}: name its images with --image-column; it has the columns {', '.join(names)}"[:500]
            )
        if image is not None and not _is_image(arrow.field(image).type):
            raise SourceError(
                f"--image-column {image}: in {place} it is {arrow.field(image).type}, which holds no image bytes"[:500]
            )
        if not _is_string(arrow.field(text).type) and not _is_turns(arrow.field(text).type, text):
            raise SourceError(f"--text-column {text}: in {place} it is {arrow.field(text).type}, neither text nor turns"[:500])
        has_status = self.needs_success and "status" in names
        error = "error_message" if has_status and "error_message" in names else None
        ids = tuple(name for name in ID_COLUMNS if name in names and _is_id(arrow.field(name).type))
        if (name := choose(self.id_column, ids, "--id-column")) is not None and not _is_id(arrow.field(name).type):
            kind = arrow.field(name).type
            raise SourceError(f"--id-column {name}: in {place} it is {kind}, neither text nor whole numbers"[:500])
        return Columns(image, text, name, "status" if has_status else None, error)

    def _outcome(self, values: dict[str, Any] | None, columns: Columns) -> Sample | BadRow:
        if values is None:
            return BadRow(None, BadSampleError("bad_text", "the row holds text that is not UTF-8"))
        try:
            return _sample(values, columns)
        except BadSampleError as error:
            return BadRow(usable_id(values[columns.id]) if columns.id else None, error)


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch as Python objects; None where one holds text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            yield None
            return
        for row in range(batch.num_rows):
            yield from _values(batch.slice(row, 1))


def _sample(values: dict[str, Any], columns: Columns) -> Sample:
    """Raises: BadSampleError."""
    if columns.status and values[columns.status] != "success":
        message = values[columns.error] if columns.error else None
        raise BadSampleError("download_failed", str(message or values[columns.status])[:200])
    name = checked_id(values[columns.id]) if columns.id else None
    found = values[columns.image] if columns.image else None
    cells = [] if found is None else found if isinstance(found, list) else [found]
    images = tuple(_image_bytes(cell) for cell in cells)
    if sum(map(len, images)) > MAX_SAMPLE_BYTES:
        raise BadSampleError("oversized_image", f"the images take more than {MAX_SAMPLE_BYTES} bytes")
    text = values[columns.text]
    if isinstance(text, str) and len(text) > MAX_TEXT_BYTES:
        raise BadSampleError("oversized_text", f"more than {MAX_TEXT_BYTES} characters")
    if isinstance(text, list):
        return Sample(name, checked_conversation(text, len(images)), images)
    if columns.text == "conversations" and isinstance(text, str):
        return Sample(name, checked_conversation(parse_row(text, "`conversations`"), len(images)), images)
    if not images:
        raise BadSampleError("missing_image", "there is no image beside the caption")
    return Sample(name, caption_turns(text, len(images)), images)


def _image_bytes(cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise BadSampleError("missing_image", "the row holds no image bytes")
    return data


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_id(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_string(kind) or bool(pa.types.is_integer(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_image(kind: pa.DataType) -> bool:
    if _is_list(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        return "bytes" in names and _is_image(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_turns(kind: pa.DataType, name: str) -> bool:
    if _is_string(kind):
        return name == "conversations"
    return _is_list(kind) and bool(pa.types.is_struct(kind.value_type))


def _refuse_bombs(file: pq.ParquetFile, columns: Columns, place: str) -> None:
    """Raises: SourceError where a column of a row group unfolds to far more than image data does."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        for i in range(group.num_columns):
            column = group.column(i)
            whole, packed = column.total_uncompressed_size, column.total_compressed_size
            if column.path_in_schema.split(".")[0] in columns.read and whole > max(_BOMB_BYTES, _BOMB_RATIO * packed):
                raise SourceError(f"--input {place}: {packed} bytes of column {column.path_in_schema} unfold to {whole}"[:500])


@contextmanager
def _opened(place: str) -> Iterator[pq.ParquetFile]:
    """The file, with what pyarrow finds wrong in it, now or while it is read, as a SourceError."""
    try:
        with (
            storage.open_file(place) as stream,
            pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as file,
        ):
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's; pyarrow's own have no number
        raise SourceError(f"--input {place}: not a whole parquet file ({' '.join(str(error).split())[:300]})") from None
