"""himix.json carries a version: a reader takes those it knows, also files without one, and names the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from himix_megatron.checkpoint.description import Position, check_architecture, position_of, write_description
from himix_megatron.checkpoint.manifest import DESCRIPTION, find_checkpoint, sync_and_digest, write_manifest
from himix_megatron.config import Config
from himix_megatron.data.loading.plan import START
from pipelines.recipes import RECIPES

CONFIG = RECIPES["tiny_align"]()
POSITION = Position(step=7, place=replace(START, samples=56), data={"train.seed": 1234})


def described(folder: Path, version: int | None, num_bytes: int = 4 << 20) -> Path:
    """A checkpoint that holds its description, and a file as large as its weights would be."""
    folder.mkdir(parents=True)
    write_description(folder, CONFIG, POSITION, ("vision_kv",), None, 2.5)
    content = json.loads((folder / DESCRIPTION).read_text())
    assert content.pop("version") == 1
    if version is not None:
        content = {"version": version} | content
    (folder / DESCRIPTION).write_text(json.dumps(content))
    (folder / "weights").write_bytes(bytes(num_bytes))
    write_manifest(folder, sync_and_digest(folder, [DESCRIPTION, "weights"]))
    return folder


@pytest.mark.parametrize("version", [None, 0, 1])
def test_known_versions_are_read(tmp_path: Path, version: int | None) -> None:
    folder = described(tmp_path / "checkpoints" / "step-00000007", version)
    assert find_checkpoint(str(tmp_path)) == folder
    found = check_architecture(folder, CONFIG)
    assert position_of(found) == POSITION
    assert (found.parts, found.validation_loss) == (("vision_kv",), 2.5)


def test_a_model_that_is_larger_than_its_files_is_not_begun(tmp_path: Path) -> None:
    folder = described(tmp_path / "step-00000007", 1, num_bytes=1000)
    with pytest.raises(ValueError, match=r"has \d+ bytes: too few for a model of 8.* parameters"):
        check_architecture(folder, CONFIG)


def test_a_newer_version_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    older = described(tmp_path / "checkpoints" / "step-00000006", 1)
    described(tmp_path / "checkpoints" / "step-00000007", 2)
    with pytest.raises(ValueError, match=r"himix\.json has version 2, and this code reads versions up to 1: use the code that"):
        find_checkpoint(str(tmp_path))
    assert find_checkpoint(str(older)) == older


def test_another_architecture_is_named(tmp_path: Path) -> None:
    folder = described(tmp_path / "step-00000007", 1)
    other: Config = replace(CONFIG, model=replace(CONFIG.model, num_layers=CONFIG.model.num_layers + 1))
    with pytest.raises(ValueError, match=r"another architecture: model\.num_layers is \d+ there and \d+ here"):
        check_architecture(folder, other)
