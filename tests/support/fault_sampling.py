"""Samples a chain of faults: what happens where, on which rank, in which step.

Flows in: a seed; out: cases (kinds), and for each its `himix_megatron.runtime.failpoints.Fault`, or a damage to the run folder.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from himix_megatron.checkpoint.manifest import LATEST, complete_checkpoints
from himix_megatron.runtime.failpoints import Fault

INTERVAL = 2
"""Steps between checkpoints."""


def flip(run: Path, draw: random.Random) -> str:
    """One bit of the newest checkpoint."""
    file = draw.choice(files_of(run))
    content = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return f"bit {bit} of {file.name}"


def truncate(run: Path, draw: random.Random) -> str:
    file = draw.choice(files_of(run))
    size = draw.randrange(file.stat().st_size)
    with file.open("rb+") as opened:
        opened.truncate(size)
    return f"{file.name} to {size} bytes"


def delete(run: Path, draw: random.Random) -> str:
    file = draw.choice(files_of(run))
    file.unlink()
    return file.name


def lose_tracker(run: Path, draw: random.Random) -> str:
    """The file that names the newest checkpoint is gone, or names none."""
    newest = run / "checkpoints" / LATEST
    if draw.random() < 0.5:
        newest.unlink()
        return "gone"
    newest.write_bytes(draw.randbytes(8))
    return "noise"


def files_of(run: Path) -> list[Path]:
    """Of the newest checkpoint, those that hold anything."""
    found = sorted(file for file in complete_checkpoints(run)[-1].rglob("*") if file.is_file() and file.stat().st_size)
    assert found
    return found


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "flipped bit": flip,
    "truncated file": truncate,
    "deleted file": delete,
    "lost tracker": lose_tracker,
}
"""What a disk may do to a run folder while nobody runs."""
AREAS = {
    "kill": "start data step save save save validation",
    "kill_node": "data step save",
    "exit": "data step save",
    "error": "start data step save validation",
    "crash": "step save",
    "abort": "step",
    "out_of_memory": "data step save",
    "term": "data step validation",
    "usr1": "step save",
    "usr2": "step save",
    "freeze": "data step save",
    "freeze_node": "step save",
    "no_space": "save save",
    "io_error": "data save",
    "full_disk": "save",
    "cut_network": "step save",
    "slow": "data step save",
}
"""Kinds of `himix_megatron.runtime.failpoints`, and where each is drawn: as often as listed."""
SIGNALS = ("term", "usr1", "usr2")
COSTS_A_SAVE = ("no_space", "io_error", "full_disk", "error", "out_of_memory")
"""In a save these cost that save, and not the run."""


@dataclass(frozen=True, slots=True)
class FaultCase:
    """A kind of fault."""

    kind: str
    area: str
    damage: str | None = None
    """What is done to the run folder afterwards."""

    def name(self, area: str) -> str:
        """How the report counts it."""
        return self.damage or f"{self.kind} in {area}"


def all_cases() -> list[FaultCase]:
    """Every kind, as often as it is to occur."""
    cases = [FaultCase(kind, area) for kind, areas in AREAS.items() for area in areas.split()]
    cases += [FaultCase("kill", "step", damage) for damage in DAMAGES]
    return [*cases, FaultCase("kill_worker", "step"), FaultCase("nan", "gradient"), FaultCase("bad_image", "shard")]


def sample_cases(seed: int, numbers: Sequence[int]) -> list[FaultCase]:
    """The kinds of the faults with these numbers: all cases in a random order, then in another one."""
    size = len(all_cases())
    shuffled = {number // size: random.Random(f"{seed} deck {number // size}").sample(all_cases(), size) for number in numbers}
    return [shuffled[number // size][number % size] for number in numbers]


def place(drawn: Sequence[FaultCase], draw: random.Random, reached: dict[str, list[int]]) -> Iterator[tuple[FaultCase, Fault]]:
    """Give each kind its point, rank and step, in the order of steps; nothing for those that are part of the case."""
    step = draw.randint(1, 2)
    # A fault of the start needs a start: the first one, or that after a fault that ends the attempt.
    first = [card for card in drawn if card.area == "start"]
    later = [card for card in drawn if card.area not in ("start", "gradient", "shard")]
    # Damage comes when there is an older checkpoint to fall back to.
    later.sort(key=lambda card: (card.damage is not None) * draw.randint(0, 1))
    for card in [*first, *later]:
        # Samples that worker processes read pass no point of the training process.
        area = card.area if card.area != "data" or "data/read" in reached else "step"
        point = draw.choice([point for point in reached if point.startswith(f"{area}/")])
        if card.area != "start":
            step += draw.randint(2, 3)
        if card.damage:
            step = max(step, 3 * INTERVAL + 1)
        delay = round(draw.uniform(0.0, 0.3), 3) if card.kind in (*SIGNALS, "kill") and draw.random() < 0.5 else 0.0
        rank = draw.choice(reached[point])
        yield card, Fault(kind=card.kind, point=point, step=0 if card.area == "start" else step, rank=rank, delay_seconds=delay)
