"""Hundreds of random real faults, from each of which a run must recover by itself, to the bit (`fault_chains.py`).

    make campaign-faults FAULTS=500 SEED=1                   about half an hour on 2 cores
    make campaign-faults FAULTS=500 SEED=1 REPORT=DIR        the report elsewhere than in runs/campaign-faults/

Outcomes are appended to faults.jsonl in the report's folder, keyed by seed, number and the code under test: what was done is
not done again, so a campaign may be gathered over several sittings on unchanged code.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.fault_chains import LENGTH, Bench
from tests.support.fault_sampling import sample_cases

SEED = int(os.environ.get("SEED") or 1)
FAULTS = int(os.environ.get("FAULTS") or 500)
FOLDER = Path(os.environ.get("REPORT") or ROOT / "runs" / "campaign-faults")
SUPPORT = ("fault_chains", "fault_sampling", "restarter", "small_runs", "traces", "datasets")

pytestmark = pytest.mark.campaign


def code_hash() -> str:
    """Of what is under test, and of the tests."""
    files = [*(ROOT / "himix_megatron").rglob("*.py"), *(ROOT / "tests" / "support" / f"{name}.py" for name in SUPPORT)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def done_before(report: Path, key: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The outcomes of a report with this key, by number."""
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    return {line["number"]: line for line in lines if all(line[name] == value for name, value in key.items())}


def test_every_fault_is_recovered_from(mixed_dataset: Path, tmp_path: Path) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    report, key = FOLDER / "faults.jsonl", {"seed": SEED, "code": code_hash()}
    found = done_before(report, key)
    bench, began, before = Bench(mixed_dataset, tmp_path), time.monotonic(), len(found)
    for first in range(0, FAULTS, LENGTH):
        numbers = range(first, min(first + LENGTH, FAULTS))
        if all(number in found for number in numbers):
            continue
        outcomes = bench.chain(SEED, first // LENGTH, sample_cases(SEED, numbers))
        with report.open("a") as file:
            for number, outcome in zip(numbers, outcomes, strict=True):
                outcome.number = number
                found[number] = {**key, **asdict(outcome)}
                file.write(json.dumps(found[number]) + "\n")
        each = (time.monotonic() - began) / (len(found) - before)
        recovered = sum(line["error"] is None for line in found.values())
        remaining = (FAULTS - len(found)) * each / 60
        print(f"{len(found)}/{FAULTS} faults, {recovered} recovered, {each:.1f} s each, {remaining:.0f} min left", flush=True)
        for line in (found[number] for number in numbers):
            if line["error"]:
                print(f"  {line['number']}: {line['kind']}, {line['layout']}: {line['error']}", flush=True)
    print(summary([found[number] for number in range(FAULTS)]))
    failed = [line for line in found.values() if line["error"]]
    assert not failed, failed[:3]


def summary(lines: list[dict[str, Any]]) -> str:
    """How often each kind happened, and was recovered from."""
    kinds = collections.Counter(line["kind"] for line in lines)
    good = collections.Counter(line["kind"] for line in lines if line["error"] is None)
    seconds = sum(line["seconds"] for line in lines) / len(lines)
    head = f"campaign-faults, seed {SEED}: {good.total()} of {len(lines)} recovered, {len(kinds)} kinds, {seconds:.1f} s each"
    return "\n".join(["", head, *(f"  {good[kind]:3d} of {count:3d}  {kind}" for kind, count in sorted(kinds.items()))])
