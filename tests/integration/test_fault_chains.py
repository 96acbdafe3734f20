"""Planned faults: where, when and how often they happen; and a few chains of them, of the many of `make campaign-faults`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from himix_megatron.monitoring.sample_ledger import open_for_append
from himix_megatron.runtime import failpoints
from himix_megatron.runtime.failpoints import Fault
from tests.support.fault_chains import LENGTH, Bench
from tests.support.fault_sampling import AREAS, FaultCase, all_cases, sample_cases

SEED = 318
"""Its chains 1 and 2 are quick (nothing freezes, and what only a timeout ends takes seconds), and of 16 kinds."""


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Path]:
    """A file for a plan; nothing is planned any more when the test has ended."""
    yield tmp_path / "plan.jsonl"
    failpoints.schedule_faults(None, rank=0)


def write(file: Path, *planned: Fault) -> str:
    file.write_text("".join(json.dumps(asdict(fault)) + "\n" for fault in planned))
    return str(file)


def happens(point: str) -> bool:
    try:
        failpoints.failpoint(point)
    except RuntimeError:
        return True
    return False


def test_a_fault_happens_once_at_its_point_on_its_rank_and_not_before_its_step(plan: Path) -> None:
    file = write(plan, Fault(kind="error", point="step/forward", step=3, rank=1))
    failpoints.schedule_faults(file, rank=0)
    failpoints.begin_step(3)
    assert not happens("step/forward")
    failpoints.schedule_faults(file, rank=1)
    failpoints.begin_step(2)
    assert not happens("step/forward")
    failpoints.begin_step(4)  # it does not matter that step 3 has gone by
    assert not happens("step/backward")
    assert happens("step/forward")
    assert not happens("step/forward")
    failpoints.schedule_faults(file, rank=1)  # as after a restart
    failpoints.begin_step(4)
    assert not happens("step/forward")


def test_faults_wait_for_those_above_them(plan: Path) -> None:
    planned = Fault(kind="error", point="save/begin", step=5), Fault(kind="error", point="start/restore")
    failpoints.schedule_faults(write(plan, *planned), rank=0)
    assert not happens("start/restore")
    failpoints.begin_step(5)
    assert happens("save/begin")
    assert happens("start/restore")


def test_every_fault_that_is_due_gets_the_tensors(plan: Path) -> None:
    faults = (Fault(kind="note", point="step/gradient", step=2), Fault(kind="nan", point="step/gradient", step=2))
    failpoints.schedule_faults(write(plan, *faults), rank=0)
    gradient = torch.ones(3)
    failpoints.begin_step(2)
    failpoints.failpoint("step/gradient", (tensor for tensor in [gradient]))
    assert gradient.isnan().any()


def test_a_lasting_fault_happens_each_time_in_its_step(plan: Path) -> None:
    failpoints.schedule_faults(write(plan, Fault(kind="nan", point="step/gradient", step=2, once=False)), rank=0)
    found = []
    for step in (1, 2, 3, 2):
        gradient = torch.ones(2, 2)
        failpoints.begin_step(step)
        failpoints.failpoint("step/gradient", [gradient])
        found.append(int(gradient.isnan().sum()))
    assert found == [0, 1, 0, 1]


def test_a_pattern_is_the_first_of_several_points(plan: Path) -> None:
    failpoints.schedule_faults(write(plan, Fault(kind="error", point="save/*")), rank=0)
    assert [happens(point) for point in ("step/end", "save/begin", "save/end")] == [False, True, False]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "line 1: no JSON: Expecting value"),
        ('{"kind": "kill"}', "line 1: the field point is missing"),
        ('{"kind": "kill", "point": "a/b", "when": 3}', "line 1: it has a field when"),
        ('{"kind": "kill", "point": "a/b", "step": "3"}', 'line 1: step is "3", wanted a whole number'),
        ("[1]", "line 1: it is a list, wanted an object"),
        ('{"kind": "flood", "point": "a/b"}', "line 1: kind is flood: wanted one of kill, "),
    ],
)
def test_a_plan_that_says_nothing_is_refused(plan: Path, line: str, said: str) -> None:
    plan.write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        failpoints.schedule_faults(str(plan), rank=0)


def test_a_run_without_a_plan_passes_all_points() -> None:
    gradient = torch.ones(1)
    failpoints.begin_step(1)
    failpoints.failpoint("step/forward")
    failpoints.failpoint("step/gradient", [gradient])
    assert gradient.item() == 1


@pytest.mark.parametrize(
    "left", [b"", b'{"step": 1}\n', b'{"step": 1}\n{"st', b'{"st', b"x" * 200_000, b"a\n" + b"x" * 200_000]
)
def test_a_half_written_line_of_a_killed_run_is_taken_back(tmp_path: Path, left: bytes) -> None:
    file = tmp_path / "steps.jsonl"
    file.write_bytes(left)
    with open_for_append(file) as opened:
        opened.write("next\n")
    assert file.read_bytes() == left[: left.rfind(b"\n") + 1] + b"next\n"


def test_the_campaign_has_at_least_24_kinds_of_fault() -> None:
    assert set(AREAS) <= failpoints.KINDS.keys()
    assert len({card.name(card.area) for card in all_cases()}) >= 24


@pytest.fixture(scope="module")
def bench(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(mixed_dataset, tmp_path_factory.mktemp("chains"))


@pytest.mark.parametrize("chain", [1, 2])
def test_a_run_recovers_from_a_chain_of_eight_faults(bench: Bench, chain: int) -> None:
    outcomes = bench.chain(SEED, chain, sample_cases(SEED, range(chain * LENGTH, (chain + 1) * LENGTH)))
    assert [(outcome.kind, outcome.error) for outcome in outcomes if outcome.error] == []


def test_a_rank_that_freezes_alone_is_replaced(bench: Bench) -> None:
    outcomes = bench.chain(SEED, 0, [FaultCase("freeze", "step")])  # chain 0: one rank, nobody who could end it
    assert [(outcome.kind, outcome.error) for outcome in outcomes] == [("freeze in step", None)]
