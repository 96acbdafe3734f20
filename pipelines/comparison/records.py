"""What is known of a finished arm, as the JSON file that is committed: EXPERIMENT/arms/NAME.json.

Flows in: what an arm's process measured, and which arm it was; out: the same, checked.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from himix_megatron.runtime import typed_json
from himix_megatron.runtime.durable_files import publish
from himix_megatron.runtime.limits import Count, Pattern, Positive

Record = TypeVar("Record", "Arm", "Measured")
Marks = Annotated[str, Pattern("[01]*", "zeros and ones")]
MEASURED = "measured.json"
"""In an arm's run folder: what its process measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """An arm after so many steps: what it has spent, and what it can do."""

    step: Count
    decoder_flops: Positive
    """Model FLOPs of all its steps without the tower's, as training counts them."""
    total_flops: Positive
    seconds: Positive
    """Its steps at the arm's median; start, saves and validation are not in them."""
    loss: float
    """Mean over the steps since the point before."""
    heldout_loss: float | None
    """None where a request to stop came meanwhile."""
    correct: dict[str, Marks]
    """For each kind of question, 1 for each answered exactly and 0 for each other, in the held-out set's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What an arm's process measures."""

    device: str
    code: str
    """The commit."""
    parameters: int
    """Of decoder and tower."""
    samples: str
    """Digest of the samples in the order of training."""
    heldout: str
    """Fingerprint of the held-out set."""
    lost_points: int
    """Steps whose numbers a kill took; the others' mean stands in their place."""
    step_seconds: float
    """Median."""
    samples_per_second: float
    """In training."""
    memory_gib: float
    """Peak in training; on a CPU of the whole process."""
    first_token_seconds: float
    """From one question and its image to the answer's first token; median."""
    tokens_per_second: float
    """Generated behind the first ones, for a batch of questions."""
    shuffled_accuracy: float
    """At the end, with the images of other samples."""
    curve: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A finished arm."""

    version: Literal[1] = 1
    method: str
    world: str
    size: int
    """Width of the decoder."""
    seed: int
    settings: str
    """Recipe and flags, without those of method, size, seed and folders."""
    measured: Measured


def read(kind: type[Record], path: Path) -> Record:
    """Raises: FileNotFoundError; ValueError, one line, for a file that is none."""
    return typed_json.build(kind, typed_json.read(path), str(path))


def write(path: Path, record: Record) -> None:
    """Publish a record."""
    publish(path, (json.dumps(asdict(record), indent=1) + "\n").encode())
