"""What every source gives: numbered rows, each a sample or the reason why it is none; and the checks they share.

What is wrong with a row is the row's own (a BadSampleError, quarantined). A file of the source that cannot be read to its end
is the source's (a SourceError, ends the run with one line); a failing disk is neither, and ends the run with a traceback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ....runtime import typed_json
from ...errors import BadSampleError
from ...text.chat_template import IMAGE_MARK, check_conversation

MAX_SAMPLE_BYTES = 128 << 20
"""A sample whose images together are larger is refused; one larger image is not even read."""
MAX_TEXT_BYTES = 4 << 20
"""Of a sample, its JSON included. A larger file is refused unread: parsed JSON takes some twenty times its size in memory."""
MAX_IMAGES = 256
"""Of a sample: all of them go into one step of the training, where 256 of SigLIP's are 187,000 vision tokens."""
MAX_ID_CHARACTERS = 1000
_TURN_BYTES = len('{"from": "human", "value": ""}')


class SourceError(ValueError):
    """A file of the source is damaged, or not what the flags say: one line that names it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, read: what a shard stores."""

    id: str | int | None
    """None: the source has none, and the row's number stands in."""
    conversations: list[dict[str, Any]]
    images: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that is no sample."""

    id: str | int | None
    error: BadSampleError


class Part(Protocol):
    """The rows of one shard, as a reference of a few hundred bytes (or the texts of LLaVA rows): this travels to a task, and
    the task reads the images."""

    @property
    def first_row(self) -> int:
        """Number of the first row in the whole source."""

    @property
    def num_rows(self) -> int:
        """How many rows."""

    def rows(self) -> Iterator[tuple[int, Sample | BadRow]]:
        """Each row with its number, in order. Raises: SourceError; OSError when the machine fails."""

    def retry(self, rows: Iterable[int]) -> Iterator[tuple[int, Sample | BadRow]]:
        """Those of some rows that may be others now, since the source's hash does not cover their images."""


class Source(Protocol):
    """A snapshot of raw data: its rows never change while its hash does not."""

    @property
    def num_rows(self) -> int:
        """Rows in all."""

    @property
    def source_hash(self) -> str:
        """SHA-256 of the annotation file, or of the list of files with their sizes and hashes."""

    def part(self, first: int, end: int) -> Part:
        """Rows first <= row < end."""


def checked_id(value: Any) -> str | int | None:
    """An id as a source has it. Raises: BadSampleError for what is neither text nor a whole number, or very long."""
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise BadSampleError("malformed", "`id` is neither text nor a whole number")
    if len(str(value)) > MAX_ID_CHARACTERS:
        raise BadSampleError("oversized_id", f"`id` has more than {MAX_ID_CHARACTERS} characters")
    return value


def usable_id(value: Any) -> str | int | None:
    """An id as a source has it; None also for one that `checked_id` refuses."""
    try:
        return checked_id(value)
    except BadSampleError:
        return None


def checked_conversation(turns: Any, num_images: int) -> list[dict[str, Any]]:
    """Turns in LLaVA's layout, without anything else that a source keeps in them. Raises: BadSampleError."""
    check_conversation(turns, num_images)
    if num_images > MAX_IMAGES:
        raise BadSampleError("too_many_images", f"{num_images} images, more than {MAX_IMAGES}")
    if sum(_TURN_BYTES + len(turn["value"].encode("utf-8", "surrogatepass")) for turn in turns) > MAX_TEXT_BYTES:
        raise BadSampleError("oversized_text", f"the conversation has more than {MAX_TEXT_BYTES} bytes")
    return [{"from": turn["from"], "value": turn["value"]} for turn in turns]


def caption_turns(caption: Any, num_images: int) -> list[dict[str, Any]]:
    """A caption as a conversation: the images, then the caption as the answer. Raises: BadSampleError."""
    if not isinstance(caption, str) or not caption.strip():
        raise BadSampleError("no_text", "there is no caption")
    turns = [{"from": "human", "value": "\n".join([IMAGE_MARK] * num_images)}, {"from": "gpt", "value": caption}]
    return checked_conversation(turns, num_images)


def parse_json(text: str, what: str) -> Any:
    """JSON, with a BadSampleError for an object that has a key twice: readers would differ about its value.

    Raises: ValueError, as `typed_json.parse`.
    """
    return typed_json.parse(text, what, pairs=_unambiguous)


def parse_row(data: str | bytes, what: str) -> Any:
    """The JSON of one row; a BadSampleError for what is none."""
    try:
        return parse_json(data if isinstance(data, str) else data.decode("utf-8"), what)
    except ValueError as error:
        return BadSampleError("malformed", f"{what}: {str(error).removeprefix(f'{what}: ')}"[:200])


def parse_object(data: bytes, what: str) -> Mapping[str, Any]:
    """The JSON object of one row. Raises: BadSampleError."""
    value = parse_row(data, what)
    if isinstance(value, BadSampleError):
        raise value
    if not isinstance(value, Mapping):
        raise BadSampleError("malformed", f"{what} is not an object")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> Any:
    values = dict(pairs)
    return values if len(values) == len(pairs) else BadSampleError("malformed", "an object has a key twice")


# ID@ROW is what a repeated id becomes; an id that already looks so may stand in the way of one.
_NUMBERED = re.compile(r".*@(0|[1-9]\d{0,17})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class IdDigest:
    """Enough of one id to find repetitions among many: 8 bytes of a hash, and N of an id like ID@N (else -1)."""

    hash: int
    numbered: int


def digest_id(value: str | int) -> IdDigest:
    """What `find_repeated` compares; two ids that look alike as text are one."""
    text = str(value)
    found = _NUMBERED.fullmatch(text)
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return IdDigest(int.from_bytes(key, "little"), int(found[1]) if found else -1)


def find_repeated(hashes: npt.NDArray[np.uint64], numbered: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool[rows]: the rows whose id must become ID@ROW, so that all are unique: each but the first of those with one id."""
    rows = np.arange(len(hashes))
    late = np.ones(len(hashes), np.bool_)
    late[np.unique(hashes, return_index=True)[1]] = False
    while True:  # an id that is spelt ID@N in another row than N, where row N is to be given such a one
        in_the_way = ~late & (numbered >= 0) & (numbered < len(hashes)) & (numbered != rows)
        in_the_way &= late[np.where(in_the_way, numbered, 0)]
        if not in_the_way.any():
            return late
        late |= in_the_way


def number_rows(
    outcomes: Iterable[Sample | BadRow], first_row: int, repeated: Container[int]
) -> Iterator[tuple[int, Sample | BadRow]]:
    """Give rows their numbers, and ids their final form."""
    for number, outcome in enumerate(outcomes, first_row):
        name = str(number) if outcome.id is None else outcome.id
        if number in repeated:
            name = f"{name}@{number}"
        yield number, dataclasses.replace(outcome, id=name)
