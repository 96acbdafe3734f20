"""A run folder from somebody else, its manifest signed anew: nothing in it is run, waited for, or taken for what it is not."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from himix_megatron.checkpoint.manifest import complete_checkpoints, find_checkpoint, verify_checkpoint, write_manifest
from himix_megatron.checkpoint.snapshot import opened
from himix_megatron.checkpoint.torch_metadata import check_metadata
from himix_megatron.config import Config
from himix_megatron.runtime.durable_files import FileDigest, file_digest
from tests.support.interrupted_saves import saving_config
from tests.support.ranks import run_ranks
from tests.support.small_runs import train


@pytest.fixture(scope="module")
def trained(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; its distributed optimizer's state is in the checkpoint."""
    run = tmp_path_factory.mktemp("trained")
    run_ranks(train, 1, saving_config(mixed_dataset, run, steps=1, layout={"distributed_optimizer": True}), start_gloo=False)
    return run


@pytest.fixture
def step(trained: Path, tmp_path: Path) -> Path:
    """The checkpoint of a copy of it."""
    shutil.copytree(trained, tmp_path / "run")
    return complete_checkpoints(tmp_path / "run")[-1]


def sign(folder: Path) -> None:
    files = {path.name: FileDigest(0, "0" * 64) for path in folder.iterdir()}
    files |= {name: file_digest(folder / name) for name in files if (folder / name).is_file()}
    files.pop("manifest.json")
    write_manifest(folder, files)


class Bomb:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, folder: Path):
        self.path = folder.parent.parent.parent / "OPENED"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def bomb(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(folder)))


def changed(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def bytes_for_a_tensor(folder: Path) -> None:
    """What torch opens as bytes is a pickle, and this one says that it is as large as the tensor was."""
    opened, content = io.BytesIO(), (folder / "__0_0.distcp").read_bytes()
    torch.save(Bomb(folder), opened)
    (folder / "__0_0.distcp").write_bytes(content + opened.getvalue())

    def change(metadata: Metadata) -> None:
        key = "embedding.word_embeddings.weight"
        size, metadata.state_dict_metadata[key] = metadata.state_dict_metadata[key].size, BytesStorageMetadata()
        metadata.state_dict_metadata[key].size = size
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", len(content), len(opened.getvalue()))

    changed(folder, change)


def elsewhere(folder: Path) -> None:
    changed(folder, lambda metadata: next(iter(metadata.storage_data.values())).__dict__.update(relative_path="/dev/zero"))


class Patch:
    """Sets an attribute of a class of torch, as the second part of a state does."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (BytesStorageMetadata, (), (None, {"size": 1}))


def patch(folder: Path) -> None:
    changed(folder, lambda metadata: setattr(metadata, "planner_data", Patch()))


def loads(config: Config) -> list[str]:
    """What generation, evaluation and serving say, which load a run by one function; conversion; a run that goes on or starts
    from it."""
    from himix_megatron.distributed.topology import shutdown_distributed
    from pipelines.evaluate import start
    from tools.conversions import himix_to_authors
    from tools.convert import HimixToAuthors

    initial = replace(config, run=replace(config.run, dir=f"{config.run_dir}-next"))
    initial = replace(initial, checkpoint=replace(config.checkpoint, init_from=str(config.run_dir)))
    found = []
    for load in (
        lambda: start(config, find_checkpoint(str(config.run_dir))),
        lambda: himix_to_authors(HimixToAuthors(checkpoint=config.run_dir, out=Path(f"{config.run_dir}-out"))),
        lambda: train(config),
        lambda: train(initial),
    ):
        try:
            load()
            found.append("loaded")
        except ValueError as error:
            found.append(str(error))
        if torch.distributed.is_initialized():
            shutdown_distributed()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return found


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        (bomb, "it names pathlib.Path.touch"),
        (bytes_for_a_tensor, "embedding.word_embeddings.weight is no tensor"),
        (elsewhere, "it looks for a tensor in /dev/zero"),
        (patch, "the state of metadata.BytesStorageMetadata is no dict"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([])), ".metadata is not what a save writes"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), ".metadata is not what a save writes"),
    ],
    ids=["bomb", "bytes for a tensor", "elsewhere", "patch", "list", "empty"],
)
def test_no_pickle_of_a_checkpoint_is_run(
    mixed_dataset: Path, step: Path, tmp_path: Path, attack: Callable[[Path], Any], says: str
) -> None:
    attack(step)
    sign(step)
    if attack not in (bomb, bytes_for_a_tensor):
        assert says in "; ".join(verify_checkpoint(step))
        return
    config = saving_config(mixed_dataset, tmp_path / "run", steps=2, layout={"distributed_optimizer": True})
    (found,) = run_ranks(loads, 1, config, start_gloo=False)
    assert not (tmp_path / "OPENED").exists()
    assert len(found) == 4
    assert all(says in line and "\n" not in line for line in found), found


def test_common_state_that_is_another_pickle_is_one_line(mixed_dataset: Path, step: Path, tmp_path: Path) -> None:
    torch.save(Bomb(step), step / "common.pt")
    sign(step)
    config = saving_config(mixed_dataset, tmp_path / "run", steps=2, layout={"distributed_optimizer": True})
    (found,) = run_ranks(loads, 1, config, start_gloo=False)
    assert not (tmp_path / "OPENED").exists()
    assert all("step-00000001: common.pt holds more than numbers" in line and "\n" not in line for line in found), found


@pytest.mark.parametrize("name", [".metadata", "common.pt", "himix.json", "__0_0.distcp", "manifest.json"])
def test_what_is_no_file_is_not_waited_for(step: Path, name: str) -> None:
    for make in (os.mkfifo, Path.mkdir):
        shutil.rmtree(step / name) if (step / name).is_dir() else (step / name).unlink()
        make(step / name)
        if name != "manifest.json":
            sign(step)
        assert f"{name} is" in "; ".join(verify_checkpoint(step))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"position": None}, "position is null, wanted an object"),
        ({"position": {"step": -1, "place": {}, "data": {}}}, "position.step is -1, wanted 0 or more"),
        ({"position": {"step": "1", "place": {}, "data": {}}}, 'position.step is "1", wanted a whole number'),
        ({"position": {"step": 1, "place": {"day": 1}, "data": {}}}, "it has a field position.place.day"),
        ({"parts": "language"}, 'parts is "language", wanted a list'),
        ({"architecture": []}, "architecture is a list, wanted an object"),
        ({"tower": "../../../victim"}, "tower is .*, wanted HASH.safetensors"),
        ({"tower": 5}, "tower is 5, wanted text"),
        ({"validation_loss": "low"}, "validation_loss is .*, wanted a number"),
        ({"architecture": {"x": json.loads("[" * 200 + "]" * 200)}}, "more than 100 lists or objects in each other"),
        ({"more": 1}, "it has a field more"),
    ],
)
def test_a_description_of_another_shape_is_one_line(step: Path, change: dict[str, Any], says: str) -> None:
    path = step / "himix.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    sign(step)
    with pytest.raises(ValueError, match=f"himix.json: .*{says}"):
        find_checkpoint(str(step))


@pytest.mark.parametrize("name", ["himix.json", "manifest.json"])
def test_a_file_that_is_too_deep_is_one_line(step: Path, name: str) -> None:
    (step / name).write_text("[" * 100_000)
    if name != "manifest.json":
        sign(step)
    with pytest.raises(ValueError, match=f"{name}.*too many lists or objects in each other"):
        find_checkpoint(str(step))


PAIRS = b"N\x94" + b"".join(b"h%c\x86\x94" % number for number in range(60))
"""A pair of a pair of ..., both sides the same one: walking through it takes 2^60 steps."""


@pytest.mark.parametrize(
    "data",
    [b"}%bNs." % PAIRS, b"}(%bNu." % PAIRS, b"ctorch.serialization\n_get_layout\n%b\x85R." % PAIRS, b"\x8f(%b\x90." % PAIRS],
)
def test_a_pickle_that_never_ends_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + data)
    with pytest.raises(ValueError, match="is not what a save writes, and is not opened"):
        check_metadata(tmp_path / ".metadata", ())


def test_only_ascii_digits_name_a_step(step: Path) -> None:
    shutil.copytree(step, step.with_name("step-0000000٣"))
    assert complete_checkpoints(step.parent.parent) == [step]


def test_a_checkpoint_without_metadata_is_one_line(step: Path) -> None:
    (step / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"step-0+1 cannot be loaded: it has no \.metadata"), opened(step):
        pass
