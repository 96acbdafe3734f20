"""A small world of good files, from which hostile ones are made: data, a run, features, models, an exported folder, sources.

Flows in: an empty folder; out: the same files every time. `python -m tests.support.hostile_world DIR` makes it, so that the
process that forks the cases has run nothing of all this.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from himix_megatron.config import Config
from tests.support import ROOT
from tests.support.exported_models import random_config

RECIPE = "tests.support.hostile_world:recipe"
PRECIOUS = {"precious.txt": "of great value\n", "secret.txt": "SECRET-6b1f of mine\n", "inner/more.idx": "an index of mine\n"}
SECRET = b"SECRET-6b1f"


def recipe() -> Config:
    """Two decoder layers of width 32, and two steps of two samples."""
    made = random_config()
    return replace(
        made,
        recipe="hostile",
        data=replace(made.data, template="tiny", max_text_tokens=96, num_workers=0),
        train=replace(made.train, steps=2, global_batch_samples=2),
        optimizer=replace(made.optimizer, learning_rate=1e-3),
        log=replace(made.log, interval_steps=1, predictions_interval_steps=0),
    )


def make_victim(folder: Path) -> None:
    """Files that nothing may read or change."""
    for name, text in PRECIOUS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def make_world(folder: Path) -> None:
    """All of it."""
    from tests.support.datasets import make_mixed_dataset
    from tests.support.exported_models import export_random
    from tests.support.model_folders import LANGUAGE, make_language, make_tower

    data = make_mixed_dataset(folder / "source", 12)
    data.rename(folder / "data")
    (folder / "source" / "mixed.json").rename(folder / "source" / "rows.json")
    _sources(folder)
    _questions(folder)
    make_language(folder / "language", **LANGUAGE["qwen2, tied"] | {"vocab_size": 260, "num_hidden_layers": 2})
    make_tower(folder / "vision")
    export_random(recipe(), folder / "exported")
    given = ["--data.datasets", str(folder / "data"), "--run.dir"]
    _call("pipelines.pretrain", RECIPE, *given, str(folder / "run"))
    _call("pipelines.encode", RECIPE, "--data", str(folder / "data"), "--out", str(folder / "features"), "--engine", "local")
    _call("tools.convert", "himix-to-authors", str(folder / "run"), "--out", str(folder / "authors"))
    asked = ("--questions", str(folder / "questions/coco_pope_x.json"), "--images", str(folder / "questions"))
    _call("pipelines.evaluate", str(folder / "run"), "--benchmark", "pope", *asked, "--max-new-tokens", "2")


def _call(module: str, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{module} {words}: {done.stderr[-3000:]}"


def _sources(folder: Path) -> None:
    """The same few rows as parquet, as tars of WebDataset, and as img2dataset leaves them."""
    from tests.support.hostile_files import parquet_of, tar_of

    images = sorted((folder / "source" / "images").iterdir())[:8]
    for name in ("parquet", "tars", "crawl/00000"):
        (folder / name).mkdir(parents=True)
    rows, members = [], {}
    for number, image in enumerate(images):
        data, key = image.read_bytes(), f"{number:05d}"
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": f"colour {number}"}]
        rows.append({"id": key, "image": {"bytes": data, "path": image.name}, "conversations": turns})
        told = json.dumps({"key": key, "caption": f"colour {number}", "status": "success"}).encode()
        members |= {f"{key}.png": data, f"{key}.json": told, f"{key}.txt": f"colour {number}".encode()}
        for suffix in ("png", "json", "txt"):
            (folder / "crawl" / "00000" / f"{key}.{suffix}").write_bytes(members[f"{key}.{suffix}"])
    parquet_of(rows, folder / "parquet" / "rows.parquet")
    tar_of(members, folder / "tars" / "part-000.tar")


def _questions(folder: Path) -> None:
    (folder / "questions").mkdir()
    rows = []
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (20, 20), colour).save(folder / "questions" / f"{number}.png")
        rows.append({"question_id": number, "image": f"{number}.png", "text": f"Is it {colour}?", "label": "yes"})
    (folder / "questions" / "coco_pope_x.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


if __name__ == "__main__":
    make_world(Path(sys.argv[1]))
