"""Training from a stream of tars: it runs at every layout, says that it is not exact, and continues."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset

from himix_megatron.config import Config
from himix_megatron.training.data_setup import prepare_inputs
from himix_megatron.training.resume import expected_checkpoint
from tests.support.datasets import COLOURS
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, small_config, train


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tars that webdataset wrote: a coloured picture, and its colour as a caption."""
    import io

    from PIL import Image

    folder = tmp_path_factory.mktemp("foreign")
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"set-{shard}.tar")) as tar:
            for i, (name, colour) in enumerate(COLOURS.items()):
                file = io.BytesIO()
                Image.new("RGB", (20, 20), colour).save(file, "PNG")
                tar.write({"__key__": f"{shard}{i}", "png": file.getvalue(), "txt": name, "cls": i})
    return str(folder / "set-{0..1}.tar")


def streaming(stream: str, run: Path, **changes: int) -> Config:
    config = small_config(Path(), run, parts=("language", "vision_kv"), **changes)
    return replace(config, data=replace(config.data, datasets=(), webdataset_urls=(stream,)))


@pytest.mark.parametrize(("layout", "num_workers"), [({"tensor": 2}, 1), ({}, 0)], ids=["tensor 2", "data 2"])
def test_fifty_steps_from_foreign_tars_learn(foreign: str, tmp_path: Path, layout: dict[str, int], num_workers: int) -> None:
    config = streaming(foreign, tmp_path, steps=50, **layout)
    config = replace(config, data=replace(config.data, num_workers=num_workers))
    run_ranks(train, 2, config, start_gloo=False)
    losses = history(tmp_path)["train/loss"]
    assert len(losses) == 50
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 1
    assert "data.webdataset_urls is not exact" in (tmp_path / "log" / "rank-000.log").read_text()


def test_steps_from_our_own_shards_continue(mixed_dataset: Path, tmp_path: Path) -> None:
    tars = str(mixed_dataset / "shards" / "mixed-00000{0..2}.tar")
    for steps in (5, 50):
        run_ranks(train, 1, streaming(tars, tmp_path, steps=steps), start_gloo=False)
    assert len(history(tmp_path)["train/loss"]) == 50
    config = streaming(tars.replace("..2", "..1"), tmp_path, steps=60)
    changed = r"cannot resume .* \(step 50\): data\.webdataset_urls changed from .* changes the data order"
    with pytest.raises(ValueError, match=changed):
        expected_checkpoint(config, prepare_inputs(config, 1).plan)


def test_a_stream_needs_steps_and_a_tar_for_each_data_rank(foreign: str, tmp_path: Path) -> None:
    config = streaming(foreign, tmp_path)
    with pytest.raises(ValueError, match=r"data\.webdataset_urls names 2 tars for 4 data-parallel ranks"):
        prepare_inputs(config, 4)
    with pytest.raises(ValueError, match=r"data\.webdataset_urls has no end, .* give --train\.steps"):
        prepare_inputs(replace(config, train=replace(config.train, steps=None)), 1)
