"""Preprocessing of two sets, each killed at 50 random moments and run again: byte-identical every time.

    make campaign-data                     the emoji of the tests and 20,000 rendered rows (10 to 20 minutes on 2 cores)
    make campaign-data EMOJI=DIR           another set with instruct.json and images/
    make campaign-data KILLS=5 SEED=7      fewer, other moments

The trials are appended to runs/campaigns/kill-preprocess.jsonl, keyed by seed, number, set and code: what was done is not done
again, so a campaign may be gathered over several sittings on unchanged code.
"""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from tests.support.data_fixtures import EMOJI, row
from tests.support.preprocess_kills import ROOT, Source, Undisturbed, as_line, trial, undisturbed

SEED = int(os.environ.get("SEED") or 1)
KILLS = int(os.environ.get("KILLS") or 50)
REPORT = ROOT / "runs" / "campaigns" / "kill-preprocess.jsonl"
NUM_ROWS = 20_000
CODE = (
    *(
        "himix_megatron/data/ingest/sources",
        "himix_megatron/data/shards/storage.py",
        "himix_megatron/data/ingest/shard_writer.py",
        "himix_megatron/runtime/durable_files.py",
        "himix_megatron/data/errors.py",
    ),
    *(
        "himix_megatron/data/shards/shard_format.py",
        "himix_megatron/data/loading/token_counts.py",
        "himix_megatron/data/images/image_file.py",
    ),
    *("pipelines/preprocess.py", "pipelines/launchers/task_engine.py", "tests/support/preprocess_kills.py"),
)

pytestmark = pytest.mark.campaign


def code_hash() -> str:
    """Of what is under test."""
    files = [file for place in CODE for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def emoji_source(folder: Path) -> Source:
    place = Path(os.environ.get("EMOJI") or EMOJI).absolute()
    num_rows = len(json.loads((place / "instruct.json").read_text()))
    return Source("emoji", place / "instruct.json", place / "images", max(2, num_rows // 40))


def rendered_source(folder: Path) -> Source:
    """Small pictures, a few of them broken or missing."""
    images = folder / "images"
    images.mkdir(parents=True)
    rows = []
    for i in range(NUM_ROWS):
        colour = (i * 37 % 256, i * 59 % 256, i * 83 % 256)
        if i % 997 != 1:
            Image.new("RGB", (16 + i % 7, 16 + i % 5), colour).save(images / f"{i}.jpg")
        if i % 991 == 2:
            (images / f"{i}.jpg").write_bytes(b"broken")
        rows.append(row(i, f"{i}.jpg", "Which colour?", f"{colour}"))
    (folder / "rows.json").write_text(json.dumps(rows))
    return Source("rendered", folder / "rows.json", images, 250)


def done_before(key: dict[str, object]) -> dict[int, dict]:
    """Trials of the report with this key, by number."""
    lines = [json.loads(line) for line in REPORT.read_text().splitlines()] if REPORT.exists() else []
    return {line["number"]: line for line in lines if all(line[name] == value for name, value in key.items())}


@pytest.mark.parametrize("make_source", [emoji_source, rendered_source], ids=["emoji", "rendered"])
def test_no_kill_changes_a_byte(make_source, tmp_path):
    source = make_source(tmp_path / "source")
    annotations = hashlib.sha256(source.annotations.read_bytes()).hexdigest()[:16]
    key = {"seed": SEED, "set": source.name, "annotations": annotations, "code": code_hash()}
    found = done_before(key)
    wanted: Undisturbed | None = None
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    for number in range(KILLS):
        if number in found:
            continue
        wanted = wanted or undisturbed(source, tmp_path)
        engine = "ray" if number % 4 == 3 else "local"
        outcome = trial(source, wanted, tmp_path, random.Random(f"{SEED} {source.name} {number}"), engine)
        found[number] = {**key, "number": number, **as_line(outcome)}
        with REPORT.open("a") as file:
            file.write(json.dumps(found[number]) + "\n")
    lines = [found[number] for number in range(KILLS)]
    whom = {f"{engine} {who}": 0 for engine in ("local", "ray") for who in ("driver", "worker")}
    for line in lines:
        whom[f"{line['engine']} {line['victim']}"] += 1
    failed = [line for line in lines if line["error"]]
    print(
        f"\ncampaign-data, {source.name}: {len(lines)} kills ({', '.join(f'{who} {count}' for who, count in whom.items())}; "
        f"{sum(line['moment'].startswith('in the') for line in lines)} in the middle of a file), {len(failed)} with another "
        f"result; workers outlived a driver by {max(line['orphan_seconds'] for line in lines):.1f} s at most"
    )
    assert not failed, failed[:3]
