"""Hostile files and requests by the thousand, drawn by a seed: every entry ends with a result or one line, and harms nothing.

    make campaign-hostile SEED=1                     ten minutes
    make campaign-hostile SEED=1 MINUTES=60          longer; it goes on where an earlier sitting on the same code stopped
    make campaign-hostile SEED=1 CASE=123            one case again; its files are kept, and what it said is shown
    make campaign-hostile SEED=1 ONLY=sources        cases of one target (tests/support/hostile_targets.py)

Manifests, indexes, checkpoints, models, archives, tables, questions, requests and the exported folder's inputs are changed in
their structure, with checksums made right again, and read by the real entry in a child. Required of each case: no traceback, no
signal, no hang over 20 s (more on a busy machine), at most 2 GiB beside the imports, exit code 0, or 2 with one `error:` line
(3 where a run may stop itself), no file changed or made outside the output, no private file in it, no control characters.

Outcomes are appended to runs/campaign-hostile/hostile.jsonl (REPORT=DIR: elsewhere), keyed by seed, number and the code under
test. The files of a failed case are kept in kept/SEED-NUMBER, three of each cause.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, hostile, hostile_http, hostile_targets
from tests.support.hostile import Outcome

SEED = int(os.environ.get("SEED") or 1)
MINUTES = float(os.environ.get("MINUTES") or 10)
CASE = os.environ.get("CASE")
ONLY = os.environ.get("ONLY")
FOLDER = Path(os.environ.get("REPORT") or ROOT / "runs" / "campaign-hostile")
CASES = 100_000
"""More than any sitting takes."""
SERVED = "serve"
SERVED_SHARE = 12
KEPT_OF_A_CAUSE = 3

pytestmark = pytest.mark.campaign


def code_hash() -> str:
    """Of what is under test, and of the tests."""
    product = [file for part in ("himix_megatron", "pipelines", "tools") for file in (ROOT / part).rglob("*.py")]
    files = [*product, *(ROOT / "tests" / "support").glob("hostile*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def target_of(number: int) -> str:
    """What a case attacks."""
    names = {name: share for name, (_, share) in hostile_targets.TARGETS.items()} | {SERVED: SERVED_SHARE}
    # Another generator than the case's own: what is drawn first would otherwise decide both.
    return random.Random(f"target {SEED} {number}").choices(list(names), list(names.values()))[0]


@pytest.fixture(scope="module")
def world() -> Path:
    """The good files, made once for a state of the code: their sizes decide what a seed draws."""
    folder = FOLDER / f"world-{code_hash()}"
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = [sys.executable, "-m", "tests.support.hostile_world", str(folder)]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        (folder / "whole").touch()
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[hostile_http.Server]:
    found = hostile_http.Server(world / "run", FOLDER)
    yield found
    found.stop()


def seconds_allowed() -> float:
    """A case's time: more where other processes want the same cores."""
    return hostile.HANG_SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def tried(number: int, world: Path, server: hostile_http.Server) -> Outcome:
    """One case, with its files in FOLDER/case."""
    name, draw, folder = target_of(number), hostile.draw_of(SEED, number), FOLDER / "case"
    if name == SERVED:
        asked = hostile_http.request(draw)
        began = time.monotonic()
        error, cause, said = server.ask(asked, seconds_allowed())
        folder.mkdir(exist_ok=True)
        (folder / "request").write_bytes(asked.data)
        return Outcome(
            number, name, "pipelines.serve", [asked.told], None, round(time.monotonic() - began, 2), 0, error, cause, said
        )
    case, call = hostile.make(world, folder, draw, hostile_targets.TARGETS[name][0])
    return hostile.run(number, name, case, call, seconds=seconds_allowed())


def done_before(report: Path, key: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The outcomes of a report with this key, by number."""
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    return {line["number"]: line for line in lines if all(line[name] == value for name, value in key.items())}


def keep(number: int, found: dict[int, dict[str, Any]]) -> None:
    """The files of a failed case stay, unless there are enough of its cause."""
    if sum(line["cause"] == found[number]["cause"] for line in found.values()) <= KEPT_OF_A_CAUSE:
        place = FOLDER / "kept" / f"{SEED}-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(exist_ok=True)
        (FOLDER / "case").rename(place)


def test_good_files_are_read_by_every_entry(world: Path, server: hostile_http.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hostile cases are made from: without a change every call ends well."""
    if CASE is not None or done_before(FOLDER / "hostile.jsonl", {"seed": SEED, "code": code_hash()}):
        pytest.skip("seen before")
    hostile.preload()
    monkeypatch.setattr(hostile_targets, "alter", lambda case, *changes: None)
    seen, bad = set(), []
    for number in range(400):
        name = target_of(number)
        if name in (SERVED, "exported"):
            continue
        case, call = hostile.make(world, FOLDER / "case", hostile.draw_of(SEED, number), hostile_targets.TARGETS[name][0])
        if call.shown in seen or ("--benchmark" in call.words and "pope" not in call.words):
            continue
        seen.add(call.shown)
        outcome = hostile.run(number, name, case, call, seconds=3 * seconds_allowed())
        if outcome.error or outcome.exit_code:
            bad.append(
                f"{outcome.call}: {outcome.exit_code}, {outcome.error}: {(FOLDER / 'case' / 'stderr').read_text()[-300:]}"
            )
    assert server.ask(hostile_http.GOOD, seconds_allowed())[0] is None
    assert not bad, "\n".join(bad)
    print(f"{len(seen)} calls end well on good files", flush=True)


def test_nothing_hostile_does_harm(world: Path, server: hostile_http.Server) -> None:
    hostile.preload()
    report, key = FOLDER / "hostile.jsonl", {"seed": SEED, "code": code_hash()}
    found = done_before(report, key)
    if CASE is not None:
        shutil.rmtree(FOLDER / "case", ignore_errors=True)
        outcome = tried(int(CASE), world, server)
        print(json.dumps(asdict(outcome), indent=1), f"files: {FOLDER / 'case'}", sep="\n")
        assert outcome.error is None, outcome.error
        return
    began = shown = time.monotonic()
    for number in range(CASES):
        if time.monotonic() - began > 60 * MINUTES:
            break
        if number in found or (ONLY and target_of(number) != ONLY):
            continue
        shutil.rmtree(FOLDER / "case", ignore_errors=True)
        found[number] = {**key, **asdict(tried(number, world, server))}
        with report.open("a") as file:
            file.write(json.dumps(found[number]) + "\n")
        if found[number]["error"]:
            print(f"  {number}: {found[number]['target']}, {found[number]['call']}: {found[number]['error']!a}", flush=True)
            keep(number, found)
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            bad = sum(line["error"] is not None for line in found.values())
            print(f"{len(found)} cases, {bad} failed, {60 * MINUTES - (shown - began):.0f} s left", flush=True)
    print(summary(list(found.values())))
    failed = [line for line in found.values() if line["error"]]
    assert not failed, f"{len(failed)} of {len(found)} cases failed"


def summary(lines: list[dict[str, Any]]) -> str:
    """Counts by target, then each cause with its cases."""
    tried_of = collections.Counter(line["target"] for line in lines)
    bad_of = collections.Counter(line["target"] for line in lines if line["error"])
    causes: dict[str, list[int]] = collections.defaultdict(list)
    for line in lines:
        if line["error"]:
            causes[line["cause"]].append(line["number"])
    seconds = sum(line["seconds"] for line in lines) / max(1, len(lines))
    failed = bad_of.total()
    head = f"campaign-hostile, seed {SEED}: {len(lines)} cases, {failed} failed, {len(causes)} causes, {seconds:.1f} s each"
    by_target = [f"  {name:<18} {bad_of[name]:4d} of {count:4d} failed" for name, count in sorted(tried_of.items())]
    ordered = sorted(causes.items(), key=lambda item: -len(item[1]))
    by_cause = [f"  {len(numbers):4d}  {cause}: {' '.join(map(str, numbers[:8]))}" for cause, numbers in ordered]
    return (
        "\n".join(["", head, *by_target, "causes, and the numbers of their cases:", *by_cause])
        .encode("ascii", "backslashreplace")
        .decode()
    )
