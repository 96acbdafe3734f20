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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from himix_megatron.checkpoint.manifest import complete_checkpoints
from himix_megatron.config import Config
from himix_megatron.runtime.failpoints import Fault

from .fault_sampling import COSTS_A_SAVE, DAMAGES, INTERVAL, SIGNALS, FaultCase, place
from .restarter import Attempt, Ended
from .small_runs import small_config
from .traces import Trace, hash_of, lines_of, samples_of, steps_of

LENGTH = 8
"""Faults in a chain."""
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
    mode: Literal["async", "sync"] = "async"
    """Of saves."""


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


def case_of(seed: int, chain: int, drawn: Sequence[FaultCase]) -> Case:
    """Layouts take turns."""
    kinds = {card.kind for card in drawn}
    return Case(
        layout=list(LAYOUTS)[chain % len(LAYOUTS)],
        nan="nan" in kinds,
        bad_image="bad_image" in kinds,
        workers="kill_worker" in kinds,
        mode="sync" if chain % 3 == 0 else "async",
    )


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
            checkpoint=replace(config.checkpoint, interval_steps=INTERVAL, keep_last=3, mode=case.mode),
            # Faults follow each other more closely than trouble does: several may fall between two saves.
            health=replace(config.health, max_starts_without_progress=LENGTH),
            log=replace(config.log, ledger=True, validation_interval_steps=5, validation_samples=8),
            run=replace(config.run, fault_injection=str(planned)),
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
                for point in sorted(set(re.findall(r"injected fault \d+: note at (\S+),", log))):
                    reached.setdefault(point, []).append(rank)
            self._references[case] = Reference(steps_of(run), samples_of(run), final_state(run), reached)
        return self._references[case]

    def chain(self, seed: int, chain: int, drawn: Sequence[FaultCase]) -> list[Outcome]:
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
        config = self.config(case, run, run / "faults.jsonl")
        try:
            error = Journey(config, LAYOUTS[case.layout][0], placed, outcomes, draw).go() or difference(run, wanted)
        except (AssertionError, TimeoutError) as problem:
            error = str(problem)
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


class Journey:
    """One run on its way through its faults."""

    def __init__(
        self,
        config: Config,
        ranks: int,
        placed: Sequence[tuple[FaultCase, Fault]],
        outcomes: Sequence[Outcome],
        draw: random.Random,
    ) -> None:
        self.config, self.ranks, self.run, self.draw = config, ranks, config.run_dir, draw
        self.open = {number: (card, outcome) for number, ((card, _), outcome) in enumerate(zip(placed, outcomes, strict=True))}
        """What has not happened yet."""
        self.starts = 0

    def go(self) -> str | None:
        """Start the run until it has ended. Returns: what was wrong on the way."""
        happened: list[tuple[FaultCase, Outcome]] = []
        for _ in range(2 * len(self.open) + 4):
            before, number = steps_in(self.run), self.starts
            attempt = self._start()
            while self._node_may_freeze() and attempt.freezes(60):
                happened = self._note_happened()
                replaced, attempt, before = attempt, self._start(), []
                codes = come_back(replaced, attempt, after_seconds=self.draw.uniform(0.0, 1.5))
                for _, outcome in happened:
                    outcome.codes = codes
                if 0 in codes:
                    attempt.kill()
                    return f"start {number} was replaced, and ended with {codes}"
            ended = attempt.wait(120)
            if error := count_lost(before, steps_in(self.run), happened, self.config.checkpoint.mode):
                return f"start {number}: {error}"
            happened = self._note_happened()
            for card, outcome in happened:
                outcome.codes = list(ended.codes)
                if card.damage:
                    outcome.damage = DAMAGES[card.damage](self.run, self.draw)
            if error := verdict(ended, [card for card, _ in happened]):
                return f"start {number} (after step {max(before, default=0)}): {error}"
            if ended.done:
                return None
        return "it was started again and again, and did not end"

    def _start(self) -> Attempt:
        self.starts += 1
        return Attempt(self.config, self.ranks, self.run / "starts" / f"{self.starts - 1:02d}", restarts=self.starts - 1)

    def _node_may_freeze(self) -> bool:
        """Whether a fault to come leaves no rank that could end the others: a scheduler replaces such an attempt."""
        return any(card.kind == "freeze_node" or (card.kind == "freeze" and self.ranks == 1) for card, _ in self.open.values())

    def _note_happened(self) -> list[tuple[FaultCase, Outcome]]:
        """Faults since the last look."""
        done = self.run / "faults.jsonl.done"
        happened = [self.open.pop(number) for number in list(self.open) if (done / f"{number:03d}").exists()]
        for _, outcome in happened:
            outcome.happened = True
        return happened


def count_lost(before: list[int], now: list[int], happened: Sequence[tuple[FaultCase, Outcome]], mode: str) -> str | None:
    """Steps that a start did again, by what ended the one before it. Returns: what is wrong with their number.

    An interval may be lost; another one where a save was under way beside it, failed, or was damaged.
    """
    if not before or len(now) == len(before):
        return None
    lost = max(before) - (now[len(before)] - 1)
    for _, outcome in happened:
        outcome.lost_steps = lost
    kinds = [card for card, _ in happened]
    more = sum(bool(card.damage) or (card.area == "save" and card.kind in COSTS_A_SAVE) for card in kinds)
    allowed = 0 if all(card.kind in SIGNALS for card in kinds) else INTERVAL * (1 + (mode == "async") + more)
    return None if lost <= allowed else f"{lost} steps were lost, {allowed} may be"


def come_back(replaced: Attempt, newer: Attempt, after_seconds: float) -> list[int]:
    """A frozen attempt, taken for dead, goes on while a newer one runs. Returns: the exit codes that it comes to."""
    try:
        time.sleep(after_seconds)
        replaced.thaw()
        return list(replaced.wait(120).codes)
    except BaseException:
        replaced.kill()
        newer.kill()
        raise


def verdict(ended: Ended, happened: Sequence[FaultCase]) -> str | None:
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
