"""The tower runs once over a dataset; training on its features reads no image, runs no tower, and goes the same way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.config import Config
from himix_megatron.data.ingest.feature_writer import images_of, pack
from himix_megatron.data.loading import feature_cache
from himix_megatron.data.loading.feature_cache import FeatureCache
from himix_megatron.data.loading.image_table import ImageTable
from himix_megatron.data.loading.vision_reader import PixelReader
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import ShardDataset
from pipelines.cli import split_recipe_flags
from pipelines.encode import Encoder, Settings, encode, main
from tests.support.data_fixtures import mixed
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, native, small_config, train


def settings_of(data: Path, folder: Path, **changes: Any) -> Config:
    return small_config(data, folder, parts=("vision_kv",), text_only_vision="zero_image", steps=4, **changes)


@pytest.fixture(scope="module")
def cache(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the mixed dataset, made by Ray actors."""
    folder = tmp_path_factory.mktemp("cache")
    manifest = encode(settings_of(mixed_dataset, folder), Settings(data=str(mixed_dataset), out=folder, num_workers=2))
    assert manifest.num_images == ShardDataset(mixed_dataset).manifest.num_images
    assert 0 < manifest.relative_error < 0.004
    return folder


def assert_equals_online(config: Config, dataset: ShardDataset, folder: Path) -> None:
    """Every image's features in a cache are the tower's, rounded, and those of images that it gives different sizes too."""
    from himix_megatron.model.towers import build_tower

    vision = config.vision
    tower = build_tower(vision, seed=config.train.seed, dtype=torch.float32)
    found, reader = FeatureCache(folder, dataset), PixelReader(vision, config.data.decode)

    def rounded(pixels: torch.Tensor, images: ImageTable, blank: bool = False) -> list[torch.Tensor]:
        with torch.no_grad():
            online = tower.features(pixels, torch.full((len(images),), blank), images.sizes)
        values, scales = pack(online, config.data.features_dtype)
        stored = values if scales is None else values.float() * scales[:, None]
        assert (stored - online).norm() <= (0.004 if scales is None else 0.04) * online.norm()
        return images.split(stored)

    for shard in range(len(dataset.manifest.shards)):
        places = images_of(dataset, shard)
        images = ImageTable.of(vision, [[vision.input_size(*dataset.image_size(*place)) for place in places]])
        pixels = reader.blanks(images)
        for place, into in zip(places, images.split(pixels), strict=True):
            reader.read_into(into, dataset, *place)
        for place, wanted in zip(places, rounded(pixels, images), strict=True):
            assert torch.equal(found.read(*place), wanted)
    blank = ImageTable.of(vision, [[vision.blank_size]])
    assert torch.equal(found.blank(), rounded(reader.blanks(blank), blank, blank=True)[0])


def test_cached_features_equal_online_ones_rounded(mixed_dataset: Path, cache: Path) -> None:
    assert_equals_online(settings_of(mixed_dataset, cache), ShardDataset(mixed_dataset), cache)


def test_ray_and_one_process_write_the_same_bytes(mixed_dataset: Path, cache: Path, tmp_path: Path) -> None:
    encode(settings_of(mixed_dataset, tmp_path), Settings(data=str(mixed_dataset), out=tmp_path / "c", engine="local"))
    names = sorted(path.relative_to(cache) for path in cache.rglob("*") if path.is_file() and path.name != ".lock")
    assert len(names) == 2 * 4 + 2  # features and receipts of 3 shards and the blank image, manifest, tower
    for name in names:
        assert (cache / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def test_run_again_it_makes_only_what_is_missing_or_damaged(mixed_dataset: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(cache, folder)
    names = [receipt.name for receipt in ShardDataset(mixed_dataset).manifest.shards]
    files = [(folder / feature_cache.feature_file(name)) for name in names]
    before = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    content = bytearray(files[1].read_bytes())
    content[-20] ^= 1
    files[1].write_bytes(content)
    (folder / "manifest.json").unlink()
    encode(settings_of(mixed_dataset, tmp_path), Settings(data=str(mixed_dataset), out=folder, engine="local"))
    assert [file.read_bytes() for file in files] == [(cache / feature_cache.feature_file(name)).read_bytes() for name in names]
    assert files[2].stat().st_mtime_ns == before[2]
    assert (folder / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


@pytest.mark.parametrize(("tower", "dtype"), [("tiny", "bf16"), ("tiny_native", "bf16"), ("tiny_native", "fp8_token")])
def test_an_interrupted_run_leaves_no_cache_and_is_finished_by_the_next(
    tower: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = mixed(tmp_path / "data", sizes=((40, 30), (8, 64), (100, 20), (64, 64)))
    config, out = settings_of(dataset.path, tmp_path), tmp_path / "c"
    config = replace(config, data=replace(config.data, features_dtype=dtype), vision=replace(config.vision, tower=tower))
    settings = Settings(data=str(dataset.path), out=out, engine="local")
    encode(config, replace(settings, out=tmp_path / "whole"))
    forward, calls = Encoder._features, iter(range(9))

    def interrupted(self: Encoder, *given: Any) -> torch.Tensor:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return forward(self, *given)

    monkeypatch.setattr(Encoder, "_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(config, settings)
    with pytest.raises(ValueError, match="holds no finished features"):
        FeatureCache(out, dataset)
    kept = sorted((out / "features").iterdir())
    assert len(kept) == 2  # the blank image and the first shard
    before = [file.stat().st_mtime_ns for file in kept]
    encode(config, settings)
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    assert not list(out.glob(".partial-*"))
    assert_equals_online(config, dataset, out)


def test_other_features_are_not_overwritten(mixed_dataset: Path, cache: Path) -> None:
    config = settings_of(mixed_dataset, cache)
    config = replace(config, vision=replace(config.vision, resize="crop"))
    with pytest.raises(ValueError, match="holds features of another dataset, tower, preprocessing or dtype"):
        encode(config, Settings(data=str(mixed_dataset), out=cache, engine="local"))


def without_images(data: Path, folder: Path) -> Path:
    """A copy of a dataset in which no image can be read any more; the texts are whole."""
    shutil.copytree(data, folder)
    dataset = ShardDataset(data)
    for number, receipt in enumerate(dataset.manifest.shards):
        tar = folder / shard_format.shard_files(receipt.name).tar
        content = tar.read_bytes()
        for place in images_of(dataset, number):
            image = dataset.image_bytes(*place)
            content = content.replace(image, bytes(len(image)))
        tar.write_bytes(content)
    return folder


def train_without_a_tower(config: Config) -> None:
    """Train with a tower that cannot run."""
    from himix_megatron.model.towers.tiny import TinyTower
    from himix_megatron.model.towers.tiny_native import TinyNativeTower

    def forward(*_: Any) -> None:
        raise AssertionError("the tower runs")

    TinyTower.forward = forward  # type: ignore[assignment]
    TinyNativeTower.features = forward  # type: ignore[assignment]
    train(config)


@pytest.fixture(scope="module")
def shapes_cache(shapes_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of images of different sizes."""
    folder = tmp_path_factory.mktemp("shapes-cache")
    config = native(settings_of(shapes_dataset, folder))
    encode(config, Settings(data=str(shapes_dataset), out=folder, engine="local"))
    return folder


@pytest.mark.parametrize(
    ("layout", "shape"),
    [({}, "fixed"), ({"pipeline": 2}, "fixed"), ({"pipeline": 2}, "native")],
    ids=["one rank", "two stages", "two stages, images of different sizes"],
)
def test_align_on_features_reads_no_image_and_runs_no_tower(
    layout: dict[str, Any], shape: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    names = ("mixed_dataset", "cache") if shape == "fixed" else ("shapes_dataset", "shapes_cache")
    dataset, cache = map(request.getfixturevalue, names)
    online = settings_of(dataset, tmp_path / "online", **layout)
    online = online if shape == "fixed" else native(online)
    ranks = 2 if layout else 1
    run_ranks(train, ranks, online, start_gloo=False)
    blind = without_images(dataset, tmp_path / "blind")
    data = replace(online.data, datasets=(str(blind),), features=(str(cache),))
    data = replace(data, validation_path=str(blind), validation_features=str(cache))
    cached = replace(online, data=data, run=replace(online.run, dir=str(tmp_path / "cached")))
    run_ranks(train_without_a_tower, ranks, cached, start_gloo=False)
    found, wanted = history(tmp_path / "cached"), history(tmp_path / "online")
    assert found["data/bad_samples"] == [0] * 4
    # The rounding to bf16 is all that differs.
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], abs=1e-4)
    assert found["validation/loss"]


def test_features_of_another_towers_weights_are_refused(mixed_dataset: Path, cache: Path, tmp_path: Path) -> None:
    config = settings_of(mixed_dataset, tmp_path / "run")
    config = replace(
        config, data=replace(config.data, features=(str(cache),)), train=replace(config.train, seed=config.train.seed + 1)
    )
    with pytest.raises(RuntimeError, match=r"ValueError: data\.features: .* was made by a tower with other weights"):
        run_ranks(train, 1, config, start_gloo=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_trained_tower_can_be_encoded_with(mixed_dataset: Path, tmp_path: Path) -> None:
    """Its weights lie in the checkpoint's tensors, not in a file of their own."""
    first = replace(settings_of(mixed_dataset, tmp_path / "first"))
    first = replace(first, train=replace(first.train, trainable_parts=("tower", "vision_kv")))
    run_ranks(train, 1, first, start_gloo=False)
    second = settings_of(mixed_dataset, tmp_path / "second", initial=tmp_path / "first")
    out = tmp_path / "cache"
    run_ranks(encode, 1, second, Settings(data=str(mixed_dataset), out=out, engine="local"), start_gloo=False)
    second = replace(second, data=replace(second.data, features=(str(out),)))
    run_ranks(train_without_a_tower, 1, second, start_gloo=False)
    tower = next((tmp_path / "second" / "towers").iterdir())
    assert tower.name == next((out / "towers").iterdir()).name


def test_the_command_line_takes_the_trainings_flags(
    mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert split_recipe_flags(["tiny_align", "--out", "x", "--train.steps", "3", "--data", "y", "--data.decode=fast"]) == (
        ["tiny_align", "--train.steps", "3", "--data.decode=fast"],
        ["--out", "x", "--data", "y"],
    )
    program = [sys.executable, "-m", "pipelines.encode"]
    words = ["tiny_align", "--data", str(mixed_dataset), "--engine", "local", "--data.features-dtype", "fp8_token"]
    done = subprocess.run([*program, *words, "--out", str(tmp_path / "c")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fp8_token features, relative error" in done.stdout
    monkeypatch.setattr(sys, "argv", ["encode", *words])
    with pytest.raises(ValueError, match=r"^--out must be given"):
        main()
