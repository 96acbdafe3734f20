"""A checkpoint that is not, byte for byte, what was written is named before it is read, and the one before it is taken."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.checkpoint.manifest import (
    complete_checkpoints,
    find_checkpoint,
    validation_loss,
    verify_checkpoint,
    write_manifest,
)
from himix_megatron.config import Config
from himix_megatron.runtime.durable_files import file_digest
from tests.support.corruptions import check, damaged, damages, starts
from tests.support.interrupted_saves import saving_config
from tests.support.ranks import run_ranks
from tests.support.small_runs import train


@pytest.fixture(scope="module")
def trained(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2, written by two tensor ranks, and a frozen tower."""
    run = tmp_path_factory.mktemp("trained")
    config = saving_config(mixed_dataset, run, steps=2, layout={"tensor": 2})
    run_ranks(train, 2, config, start_gloo=False)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(("ranks", "flips", "cuts"), [(1, 160, 48), (2, 24, 8)], ids=["one rank", "two ranks"])
def test_every_flipped_bit_and_every_cut_is_seen(mixed_dataset: Path, run: Path, ranks: int, flips: int, cuts: int) -> None:
    found = damages(run, flips, cuts, seed=ranks)
    config = saving_config(mixed_dataset, run, steps=3, layout={"tensor": ranks})
    results = run_ranks(starts, ranks, config, found, start_gloo=False, timeout_seconds=400)
    for own in results:
        check(found, own)
    assert len({tuple(taken for taken, _ in own) for own in results}) == 1  # all ranks settle on the same one


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(mixed_dataset: Path, run: Path, tmp_path: Path) -> None:
    newest = complete_checkpoints(run)[-1]
    before = (newest / "manifest.json").read_bytes()
    damaged(run, (str((newest / "__1_0.distcp").relative_to(run)), 5000, 3))
    config = saving_config(mixed_dataset, run, steps=3, layout={"tensor": 2})
    run_ranks(train, 2, config, start_gloo=False)
    log = (run / "log" / "rank-000.log").read_text()
    assert "__1_0.distcp is damaged: its SHA-256 is not the one in manifest.json" in log
    assert "falling back to" in log
    assert "restored" in log.split("falling back to")[1]
    assert [folder.name for folder in complete_checkpoints(run)] == ["step-00000002", "step-00000003"]
    assert verify_checkpoint(complete_checkpoints(run)[0]) == []
    assert (run / "checkpoints" / "damaged-step-00000002" / "manifest.json").read_bytes() == before


def each_other_damage() -> Iterator[tuple[str, Callable[[Path], Any], str]]:
    def all_hashes_redone(folder: Path) -> None:
        manifest = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(manifest.replace('"bytes": ', '"bytes": 1', 1))

    yield "missing", lambda f: (f / "common.pt").unlink(), "common.pt is missing"
    yield "extra", lambda f: (f / "extra.pt").write_bytes(b"x"), "extra.pt is in no manifest"
    yield "swapped", swap, "is damaged: its SHA-256 is not the one in"
    yield "longer", lambda f: (f / "himix.json").write_bytes((f / "himix.json").read_bytes() + b" "), "himix.json has"
    yield (
        "no manifest",
        lambda f: (f / "manifest.json").unlink(),
        "manifest.json is missing: the checkpoint cannot be verified",
    )
    yield "empty manifest", lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json is damaged"
    yield "edited manifest", all_hashes_redone, "manifest.json is damaged"
    yield "manifest of nothing", lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"
    yield "no tower", lambda f: shutil.rmtree(f.parent.parent / "towers"), "is missing: keep a run folder together"


def swap(folder: Path) -> None:
    """Two ranks' tensors change places; where they have one size only the hashes tell."""
    first, second = folder / "__0_0.distcp", folder / "__1_0.distcp"
    content = first.read_bytes()
    size = second.stat().st_size
    second.write_bytes((content * 2)[:size])


@pytest.mark.parametrize(("damage", "says"), [pytest.param(d, s, id=n) for n, d, s in each_other_damage()])
def test_what_is_wrong_is_said(run: Path, damage: Callable[[Path], Any], says: str) -> None:
    folder = complete_checkpoints(run)[-1]
    damage(folder)
    assert says in "; ".join(verify_checkpoint(folder))


def test_with_no_whole_checkpoint_left_nothing_starts(mixed_dataset: Path, run: Path) -> None:
    """Damage that shows in a size is told before ranks meet, damage in content right after; both as a user's one line."""
    for number, folder in enumerate(complete_checkpoints(run)):
        damaged(run, (str((folder / "__0_0.distcp").relative_to(run)), 3000 + number, 1))
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*") if "attempt" not in str(path)}
    config = saving_config(mixed_dataset, run, steps=3, layout={"tensor": 2})
    both = r"no checkpoint can be trusted: \S+step-00000002/__0_0.distcp is damaged.*; \S+step-00000001/__0_0.distcp is damaged"
    with pytest.raises(RuntimeError, match=f"DamagedError: {both}"):
        run_ranks(train, 2, config, start_gloo=False)
    after = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*") if "attempt" not in str(path)}
    assert {path: time for path, time in after.items() if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


class Bomb:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_pickle_that_no_manifest_vouches_for_is_not_opened(mixed_dataset: Path, run: Path, tmp_path: Path, name: str) -> None:
    config = saving_config(mixed_dataset, tmp_path / "next", steps=3)
    for folder in complete_checkpoints(run):
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "opened")))
    initial = replace(config, checkpoint=replace(config.checkpoint, init_from=str(run)))
    for path in (run, complete_checkpoints(run)[-1]):
        with pytest.raises(ValueError, match=f"{name} has .* bytes, it was written with"):
            find_checkpoint(str(path))
    with pytest.raises(RuntimeError, match="DamagedError"):
        run_ranks(train, 1, initial, start_gloo=False)
    assert not (tmp_path / "opened").exists()
    pickle.loads((complete_checkpoints(run)[-1] / name).read_bytes())
    assert (tmp_path / "opened").exists()


def test_weights_are_verified_wherever_they_are_loaded(mixed_dataset: Path, run: Path, tmp_path: Path) -> None:
    """As evaluation, generation, encoding and conversion load them, and a run that starts from them."""
    damaged(run, (str((complete_checkpoints(run)[-1] / "__0_0.distcp").relative_to(run)), 3000, 1))
    config = saving_config(mixed_dataset, run, steps=3)
    found = run_ranks(refusals, 1, config, complete_checkpoints(run)[-1], start_gloo=False)[0]
    assert len(found) == 3
    assert all("__0_0.distcp is damaged" in line for line in found), found
    initial = replace(config, run=replace(config.run, dir=str(tmp_path / "next")))
    initial = replace(initial, checkpoint=replace(config.checkpoint, init_from=str(run)))
    run_ranks(train, 1, initial, start_gloo=False)
    assert "falling back to" in (tmp_path / "next" / "log" / "rank-000.log").read_text()


def refusals(config: Config, folder: Path) -> list[str]:
    from himix_megatron.checkpoint.checkpointer import Checkpoints
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed
    from himix_megatron.inference.generator import Answerer
    from tools.conversions import _read_checkpoint

    topology = init_distributed(config.parallel, seed=1)
    answerer = Answerer(config, detect(), topology)
    tower_alone = Checkpoints(config, [], None, answerer.tower).load_tower
    found = []
    for load in (answerer.load, tower_alone, _read_checkpoint):
        try:
            load(folder)
        except ValueError as error:
            found.append(str(error))
    return found


def test_a_loss_that_is_no_number_is_neither_the_best_nor_in_its_way(run: Path) -> None:
    newest = complete_checkpoints(run)[-1]
    description = json.loads((newest / "himix.json").read_text()) | {"validation_loss": math.nan}
    (newest / "himix.json").write_text(json.dumps(description))
    files = {path.name: file_digest(path) for path in newest.iterdir() if path.name != "manifest.json"}
    write_manifest(newest, files)
    assert verify_checkpoint(newest) == []
    assert validation_loss(newest) is None


def test_a_file_that_cannot_be_read_is_as_good_as_damaged(run: Path) -> None:
    newest = complete_checkpoints(run)[-1]
    part = newest / "__0_0.distcp"
    gone = part.read_bytes()
    part.unlink()
    part.symlink_to(part)  # reading it is an error of the system
    assert any("__0_0.distcp" in line for line in verify_checkpoint(newest))
    part.unlink()
    part.write_bytes(gone)
    assert verify_checkpoint(newest) == []
