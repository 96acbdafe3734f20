"""Chains of faults: one run, hit again and again, started again as a scheduler would, and held against a run without faults.

Flows in: a seed and a number; out: for each fault of that chain what it was, and whether the run recovered from it without a
hand: it went on, lost no more steps than it may, and ended with the losses, the samples, the weights and the optimizer state of
the run that nothing happened to, to the bit.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from himix_megatron.checkpoint import complete_checkpoints
from himix_megatron.config import Config
from himix_megatron.faults import Fault
from tests.runs import small_config
from tests.scheduler import Attempt, Ended
from tests.traces import Trace, hash_of, lines_of, samples_of, steps_of

LENGTH = 8
"""Faults in a chain."""
INTERVAL = 2
"""Steps between checkpoints."""
STEPS = 32
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 2, distributed optimizer": (2, {"distributed_optimizer": True}),
}
TIMEOUT_SECONDS = 8.0
"""Of a collective: how long a frozen rank holds the others up."""


# ---- what can happen -----------------------------------------------------------------------------------------------


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


def litter(run: Path, draw: random.Random) -> str:
    """What a save that was killed in the middle leaves behind."""
    newest = complete_checkpoints(run)[-1]
    step = int(newest.name.removeprefix("step-")) + INTERVAL
    half = newest.with_name(f"step-{step:08d}.writing")
    shutil.copytree(newest, half, dirs_exist_ok=True)
    (draw.choice([file for file in half.iterdir() if file.is_file()])).unlink()
    return half.name


def files_of(run: Path) -> list[Path]:
    """Of the newest checkpoint, those that hold anything."""
    found = sorted(file for file in complete_checkpoints(run)[-1].rglob("*") if file.is_file() and file.stat().st_size)
    assert found
    return found


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "flipped bit": flip,
    "truncated file": truncate,
    "deleted file": delete,
    "half-written checkpoint": litter,
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
"""Kinds of `himix_megatron.faults`, and where each is drawn: its share of a deck."""
SIGNALS = ("term", "usr1", "usr2")


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of fault."""

    kind: str
    area: str
    damage: str | None = None
    """What is done to the run folder afterwards."""

    def name(self, area: str) -> str:
        """How the report counts it."""
        return self.damage or f"{self.kind} in {area}"


def deck() -> list[Card]:
    """Every kind, as often as it shall come."""
    cards = [Card(kind, area) for kind, areas in AREAS.items() for area in areas.split()]
    cards += [Card("kill", "step", damage) for damage in DAMAGES]
    return [*cards, Card("kill_worker", "step"), Card("nan", "gradient"), Card("bad_image", "shard")]


@dataclass(frozen=True, slots=True)
class Case:
    """In which run a chain happens. What changes a run's result changes its reference too."""

    layout: str
    nan: bool = False
    """The gradient of one step is not finite, on one rank, each time that the step is done."""
    bad_image: bool = False
    """A shard has an image that cannot be read."""
    workers: bool = False
    """Samples are read by worker processes."""


NAN = Fault(kind="nan", point="step/gradient", step=9, once=False)


@dataclass(frozen=True, slots=True)
class Reference:
    """The run that nothing happens to."""

    trace: Trace
    samples: dict[int, list[str]]
    state: str
    reached: dict[str, list[int]]
    """Ranks that come to each point."""


@dataclass(slots=True)
class Outcome:
    """One fault of a chain."""

    number: int
    kind: str
    fault: dict[str, Any]
    layout: str
    happened: bool = False
    damage: str | None = None
    codes: list[int] = field(default_factory=list)
    lost_steps: int = 0
    """Done before it, and done again after it."""
    error: str | None = None
    """Why it does not count as recovered from."""
    seconds: float = 0.0


# ---- drawing -------------------------------------------------------------------------------------------------------


def cards(seed: int, numbers: Sequence[int]) -> list[Card]:
    """The kinds of the faults with these numbers: a shuffled deck, and another one when it is used up."""
    size = len(deck())
    decks = {number // size: random.Random(f"{seed} deck {number // size}").sample(deck(), size) for number in numbers}
    return [decks[number // size][number % size] for number in numbers]


def case_of(seed: int, chain: int, drawn: Sequence[Card]) -> Case:
    """Layouts take turns."""
    kinds = {card.kind for card in drawn}
    return Case(
        layout=list(LAYOUTS)[chain % len(LAYOUTS)],
        nan="nan" in kinds,
        bad_image="bad_image" in kinds,
        workers="kill_worker" in kinds,
    )


def place(drawn: Sequence[Card], draw: random.Random, reached: dict[str, list[int]]) -> Iterator[tuple[Card, Fault]]:
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


# ---- running -------------------------------------------------------------------------------------------------------


class Bench:
    """Runs chains on one dataset, in one folder; references are made when they are first needed."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder = data, folder
        self._references: dict[Case, Reference] = {}

    def config(self, case: Case, run: Path, planned: Path) -> Config:
        """2 layers, 4 samples a step."""
        data = self._damaged_data() if case.bad_image else self.data
        config = small_config(data, run, parts=("language", "vision_kv"), steps=STEPS, **LAYOUTS[case.layout][1])
        return replace(
            config,
            model=replace(config.model, num_layers=2),
            data=replace(config.data, num_workers=int(case.workers), validation_path=str(self.data)),
            train=replace(config.train, global_batch_samples=4),
            parallel=replace(config.parallel, timeout_seconds=TIMEOUT_SECONDS),
            checkpoint=replace(config.checkpoint, interval_steps=INTERVAL, keep_last=3),
            log=replace(config.log, ledger=True, validation_interval_steps=5, validation_samples=8),
            run=replace(config.run, faults=str(planned)),
        )

    def _damaged_data(self) -> Path:
        """The dataset with an image that became noise."""
        damaged = self.folder / "damaged-data"
        if not damaged.is_dir():
            shutil.copytree(self.data, damaged)
            tar = sorted((damaged / "shards").glob("*.tar"))[0]
            content = bytearray(tar.read_bytes())
            at = content.index(b"IDAT")
            content[at + 4 : at + 24] = bytes(20)
            tar.write_bytes(content)
        return damaged

    def reference(self, case: Case) -> Reference:
        """The case without faults, and which ranks come to which points."""
        if case not in self._references:
            run = self.folder / "-".join(["reference", *(str(value).replace(", ", "-") for value in asdict(case).values())])
            ranks = LAYOUTS[case.layout][0]
            notes = [
                Fault(kind="note", point="*", step=step, rank=rank, once=False)
                for rank in range(ranks)
                for step in range(2 * INTERVAL + 2)
            ]
            write_plan(run, [*notes, *([NAN] if case.nan else [])])
            ended = Attempt(self.config(case, run, run / "faults.jsonl"), ranks, run / "attempts").wait(120)
            assert ended.done, (ended, run)
            reached: dict[str, list[int]] = {}
            for rank in range(ranks):
                log = (run / "log" / f"rank-{rank:03d}.log").read_text()
                for point in sorted(set(re.findall(r"planned fault \d+: note at (\S+),", log))):
                    reached.setdefault(point, []).append(rank)
            self._references[case] = Reference(steps_of(run), samples_of(run), final_state(run), reached)
        return self._references[case]

    def chain(self, seed: int, chain: int, drawn: Sequence[Card]) -> list[Outcome]:
        """Let these kinds of faults happen to one run, one after the other."""
        began = time.monotonic()
        case = case_of(seed, chain, drawn)
        wanted = self.reference(case)
        draw = random.Random(f"{seed} chain {chain}")
        placed = list(place(drawn, draw, wanted.reached))
        outcomes = [Outcome(0, card.name(fault.point.split("/")[0]), asdict(fault), case.layout) for card, fault in placed]
        run = self.folder / f"chain-{seed}-{chain}"
        shutil.rmtree(run, ignore_errors=True)
        write_plan(run, [*(fault for _, fault in placed), *([NAN] if case.nan else [])])
        error = self._attempts(case, run, placed, outcomes, draw)
        if error is None:
            error = difference(run, wanted)
        if case.nan:
            outcomes.append(Outcome(0, "nan in gradient", asdict(NAN), case.layout, happened=True))
        if case.bad_image:
            outcomes.append(Outcome(0, "bad image in shard", {}, case.layout, happened=True))
        for outcome in outcomes:
            outcome.seconds = round((time.monotonic() - began) / len(outcomes), 2)
            if error is None and not outcome.happened:
                outcome.error = "it did not happen"
            outcome.error = outcome.error or error
        if not any(outcome.error for outcome in outcomes):
            shutil.rmtree(run)
        return outcomes

    def _attempts(
        self, case: Case, run: Path, placed: Sequence[tuple[Card, Fault]], outcomes: list[Outcome], draw: random.Random
    ) -> str | None:
        """Start the run until it has ended. Returns: what was wrong on the way."""
        config, ranks = self.config(case, run, run / "faults.jsonl"), LAYOUTS[case.layout][0]
        open_faults, happened = dict(enumerate(placed)), list[int]()
        for number in range(0, 4 * len(placed) + 8, 2):
            before = steps_in(run)
            attempt = Attempt(config, ranks, run / "attempts" / f"{number:02d}", restarts=number)
            if open_faults and next(iter(open_faults.values()))[0].kind == "freeze_node" and attempt.freezes(60):
                # Taken for dead, it comes back in the middle of the next attempt.
                index, _ = next(iter(open_faults.items()))
                del open_faults[index]
                outcomes[index].happened = True
                stale = attempt
                attempt = Attempt(config, ranks, run / "attempts" / f"{number:02d}-again", restarts=number + 1)
                time.sleep(draw.uniform(0.0, 1.5))
                stale.thaw()
                outcomes[index].codes = list(stale.wait(60).codes)
                if 0 in outcomes[index].codes:
                    attempt.kill()
                    return f"attempt {number} was replaced, and ended with {outcomes[index].codes}"
                before = []
            ended = attempt.wait(120)
            if error := self._count_lost(before, steps_in(run), [(placed[index][0], outcomes[index]) for index in happened]):
                return f"attempt {number}: {error}"
            happened = [index for index in open_faults if (run / "faults.jsonl.done" / f"{index:03d}").exists()]
            for index in happened:
                card, _ = open_faults.pop(index)
                outcomes[index].happened, outcomes[index].codes = True, list(ended.codes)
                if card.damage:
                    outcomes[index].damage = DAMAGES[card.damage](run, draw)
            if error := verdict(ended, [placed[index][0] for index in happened]):
                return f"attempt {number} (after step {max(before, default=0)}): {error}"
            if ended.done:
                return None
        return "it was started again and again, and did not end"

    @staticmethod
    def _count_lost(before: list[int], now: list[int], happened: Sequence[tuple[Card, Outcome]]) -> str | None:
        """Steps that an attempt did again, for the faults that ended the one before. Returns: what is wrong with them."""
        if not before or len(now) == len(before):
            return None
        lost = max(before) - (now[len(before)] - 1)
        for _, outcome in happened:
            outcome.lost_steps = lost
        bounds = [0 if card.kind in SIGNALS else INTERVAL * (2 if card.damage else 1) for card, _ in happened]
        return None if lost <= max(bounds, default=0) else f"{lost} steps were lost, {bounds} are allowed"


def verdict(ended: Ended, happened: Sequence[Card]) -> str | None:
    """What is wrong with how an attempt ended, if anything is."""
    if ended.killed and not any(card.kind == "freeze" for card in happened):
        return f"ranks {list(ended.killed)} stayed {ended.leaving_seconds:.0f} s after another's death: {ended.codes}"
    if any(ended.codes) and not happened:
        return f"it ended with {ended.codes}, and no fault had happened"
    if not ended.done and not ended.again:
        return f"it ended with {ended.codes}: it wants a hand"
    if happened and all(card.kind in SIGNALS for card in happened) and set(ended.codes) - {0, 85}:
        return f"it was asked to stop, and ended with {ended.codes}"
    return None


def difference(run: Path, wanted: Reference) -> str | None:
    """In what a run that recovered differs from the one that nothing happened to."""
    if steps_of(run) != wanted.trace:
        found = steps_of(run)
        return f"other losses or norms at steps {[step for step in wanted.trace if found.get(step) != wanted.trace[step]]}"
    if samples_of(run) != wanted.samples:
        return "other samples"
    return None if final_state(run) == wanted.state else "other parameters or optimizer state"


def final_state(run: Path) -> str:
    """The hash of the last checkpoint. Raises: AssertionError if the run did not come to its last step."""
    last = complete_checkpoints(run)[-1]
    assert last.name == f"step-{STEPS:08d}", last
    return hash_of(last)


def steps_in(run: Path) -> list[int]:
    """The steps in the ledger, as they were done."""
    file = run / "ledger" / "steps.jsonl"
    return [line["step"] for line in lines_of(file)] if file.is_file() else []


def write_plan(run: Path, planned: Sequence[Fault]) -> None:
    """RUN/faults.jsonl."""
    run.mkdir(parents=True)
    (run / "faults.jsonl").write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in planned))
