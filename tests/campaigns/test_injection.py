"""Random points of the space of `injection`, drawn by a seed: each is what its equations say, at tensor 2 x pipeline 2, packed.

    make campaign-injection SEED=1                   40 points
    make campaign-injection SEED=1 NUMBER=400        more; those that an earlier sitting on the same code tried are not repeated
    make campaign-injection SEED=1 CASE=17           one point again, with all of its errors

Logits, loss and every gradient, the tower's included where it trains, against float64 (tests/support/injection_reference.py).

Outcomes are appended to runs/campaign-injection/injection.jsonl (REPORT=DIR: elsewhere), keyed by seed, number and the code
under test.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.injection_points import point_case
from tests.support.injection_ranks import LIMIT, POINTS, errors, reference, run_cases, tried
from tests.support.ranks import run_ranks

SEED = int(os.environ.get("SEED") or 1)
NUMBER = int(os.environ.get("NUMBER") or 40)
CASE = os.environ.get("CASE")
FOLDER = Path(os.environ.get("REPORT") or ROOT / "runs" / "campaign-injection")
OF_A_START = 10
"""Points that one start of ranks takes."""

pytestmark = pytest.mark.campaign


def code_hash() -> str:
    """Of what is under test, and of the tests."""
    files = [*(ROOT / "himix_megatron").rglob("*.py"), *(ROOT / "tests" / "support").glob("injection_*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def done_before(report: Path, key: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The outcomes of a report with this key, by number."""
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    return {line["number"]: line for line in lines if all(line[name] == value for name, value in key.items())}


def attempt(numbers: list[int]) -> dict[int, dict[str, Any]]:
    """Outcomes by number. A point that ends with an exception ends its start of ranks: the others of it are tried alone."""
    cases = [point_case(SEED, number) for number in numbers]
    try:
        results = tried(cases)
    except (RuntimeError, TimeoutError) as error:
        if len(numbers) > 1:
            return {number: line for one in numbers for number, line in attempt([one]).items()}
        results = [(float("inf"), str(error))]
    return {
        number: {"number": number, "error": error, "where": where, "injection": asdict(case.config.injection)}
        for number, case, (error, where) in zip(numbers, cases, results, strict=True)
    }


def test_random_points_are_their_equations() -> None:
    if CASE is not None:
        show(int(CASE))
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    report, key = FOLDER / "injection.jsonl", {"seed": SEED, "code": code_hash()}
    found = done_before(report, key)
    left = [number for number in range(NUMBER) if number not in found]
    for first in range(0, len(left), OF_A_START):
        lines = {number: {**key, **line} for number, line in attempt(left[first : first + OF_A_START]).items()}
        with report.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines.values())
        found |= lines
        print(f"{len(found)} points, worst {max(line['error'] for line in found.values()):.1e}", flush=True)
    failed = [line for line in found.values() if line["error"] > LIMIT]
    for line in failed:
        print(f"  {line['number']}: {line['error']:.1e} in {line['where']}, {line['injection']}")
    print(f"campaign-injection, seed {SEED}: {len(found)} points, {len(failed)} failed")
    assert not failed, f"{len(failed)} of {len(found)} points failed"


def show(number: int) -> None:
    """One point with all of its errors."""
    case = point_case(SEED, number)
    print(case)
    found = run_ranks(run_cases, POINTS.tensor * POINTS.pipeline, [case], POINTS, start_gloo=False)[0]
    by_name = errors(found[0], reference(case))
    for name, error in by_name.items():
        print(f"{error:.1e}  {name}")
    assert max(by_name.values()) <= LIMIT
