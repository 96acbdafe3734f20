"""What every source gives: numbered rows, each a sample or the reason why it is none; and the checks they share.

What is wrong with a row is the row's own (a BadSampleError, quarantined). A file of the source that cannot be read to its end
is the source's (a SourceError, ends the run with one line); a failing disk is neither, and ends the run with a traceback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import BadSampleError
from ...text.chat_template import IMAGE_MARK, check_conversation

MAX_SAMPLE_BYTES = 128 << 20
"""A sample whose images together are larger is refused; one larger image is not even read."""
MAX_TEXT_BYTES = 4 << 20
"""A larger text is refused unread: parsed JSON takes some twenty times its size in memory."""


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
    """An id as a source has it. Raises: BadSampleError for what is neither text nor a whole number."""
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return value
    raise BadSampleError("malformed", "`id` is neither text nor a whole number")


def checked_conversation(turns: Any, num_images: int) -> list[dict[str, Any]]:
    """Turns in LLaVA's layout, without anything else that a source keeps in them. Raises: BadSampleError."""
    check_conversation(turns, num_images)
    return [{"from": turn["from"], "value": turn["value"]} for turn in turns]


def caption_turns(caption: Any, num_images: int) -> list[dict[str, Any]]:
    """A caption as a conversation: the images, then the caption as the answer. Raises: BadSampleError."""
    if not isinstance(caption, str) or not caption.strip():
        raise BadSampleError("no_text", "there is no caption")
    turns = [{"from": "human", "value": "\n".join([IMAGE_MARK] * num_images)}, {"from": "gpt", "value": caption}]
    return checked_conversation(turns, num_images)


class Ambiguous:
    """Stands where JSON has an object with the same key twice: readers would differ about its value."""


def parse_json(text: str) -> Any:
    """JSON with `Ambiguous` for an object that has a key twice. Raises: ValueError (also for too deep a nesting)."""
    try:
        return json.loads(text, object_pairs_hook=_unambiguous)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_object(data: bytes, what: str) -> Mapping[str, Any]:
    """The JSON object of one row. Raises: BadSampleError."""
    try:
        value = parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise BadSampleError("malformed", f"{what} is not JSON: {error}"[:200]) from None
    if isinstance(value, Ambiguous):
        raise BadSampleError("malformed", f"{what} has a key twice")
    if not isinstance(value, Mapping):
        raise BadSampleError("malformed", f"{what} is not an object")
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> Any:
    values = dict(pairs)
    return values if len(values) == len(pairs) else Ambiguous()


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
