"""Feature files are plain safetensors, damage in them is one bad image, and other features are refused by name."""

from __future__ import annotations

import dataclasses
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from himix_megatron.config import Config
from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.ingest.feature_writer import FeatureJob, images_of, make_features, pack, write_manifest
from himix_megatron.data.loading import feature_cache
from himix_megatron.data.loading.feature_cache import FeatureCache, FeatureManifest, feature_key
from himix_megatron.data.loading.vision_reader import FeatureReader, PixelReader
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.data.shards.storage import LocalFolder
from tests.support.data_fixtures import mixed
from tests.support.small_runs import small_config

SHAPE = (4, 32)


def brightness(pixels: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """A tower whose features are easy to check: the image's mean, times a ramp; 1 everywhere for a blank image."""
    ramp = torch.linspace(-1, 3, SHAPE[0] * SHAPE[1]).view(SHAPE)
    computed = pixels.float().mean(dim=(1, 2, 3))[:, None, None] * ramp
    computed[blank] = 1
    return computed


def config_of(dataset: ShardDataset, folder: Path, **data: Any) -> Config:
    config = small_config(dataset.path, folder, parts=("vision_kv",))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def make_cache(dataset: ShardDataset, folder: Path, dtype: Any = "bf16") -> Config:
    """A finished cache. Returns: the settings it was made with."""
    config = config_of(dataset, folder / "run", features_dtype=dtype)
    key = feature_key(config, dataset, "a" * 64)
    for part in ("features", "receipts", "attempt"):
        (folder / part).mkdir(parents=True)
    first = FeatureJob(LocalFolder(folder), folder / "attempt", shard_format.hash_of(key), dtype, SHAPE, None)
    jobs = [first, *(dataclasses.replace(first, shard=n) for n in range(len(dataset.manifest.shards)))]
    with ThreadPoolExecutor(2) as pool:
        made = [
            make_features(job, dataset, brightness, PixelReader(config.vision, config.data.decode), batch=3, pool=pool)
            for job in jobs
        ]
    assert all(was_written for _, was_written in made)
    blank, *shards = (receipt for receipt, _ in made)
    write_manifest(
        LocalFolder(folder),
        folder / "attempt",
        FeatureManifest(1, key, *SHAPE, dataset.manifest.num_images, 0.0, blank, tuple(shards)),
    )
    return config


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    return mixed(tmp_path / "data")


@pytest.mark.parametrize("dtype", ["bf16", "fp8_token"])
def test_what_is_read_is_what_was_computed_rounded_to_the_caches_dtype(
    dtype: Any, dataset: ShardDataset, tmp_path: Path
) -> None:
    config = make_cache(dataset, tmp_path / "cache", dtype)
    cache = FeatureCache(tmp_path / "cache", dataset)
    cache.check(feature_key(config, dataset, "a" * 64))
    pixels = PixelReader(config.vision, config.data.decode)
    again = pickle.loads(pickle.dumps(cache))  # as a loader's worker gets it
    for shard in range(len(dataset.manifest.shards)):
        for i, k in images_of(dataset, shard):
            image = pixels.blanks(1)
            pixels.read_into(image[0], dataset, i, k)
            computed = brightness(image, torch.tensor([False]))
            values, scales = pack(computed, dtype)
            wanted = values.float() if scales is None else values.float() * scales[..., None]
            assert torch.equal(again.read(i, k).float(), wanted[0])
            error = (wanted - computed).norm() / computed.norm()
            assert error <= (0.004 if dtype == "bf16" else 0.04)
    assert (cache.blank().float() - 1).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", ["bf16", "fp8_token"])
def test_a_file_is_read_by_anybodys_safetensors(dtype: Any, dataset: ShardDataset, tmp_path: Path) -> None:
    make_cache(dataset, tmp_path / "cache", dtype)
    cache = FeatureCache(tmp_path / "cache", dataset)
    name = dataset.manifest.shards[0].name
    tensors = load_file(tmp_path / "cache" / feature_cache.feature_file(name))
    assert tensors["features"].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float8_e4m3fn)
    places = images_of(dataset, 0)
    assert tensors["features"].shape == (len(places), *SHAPE)
    for n, (i, k) in enumerate(places):
        stored = tensors["features"][n].float()
        if dtype != "bf16":
            stored = stored * tensors["scales"][n][:, None]
        assert torch.equal(cache.read(i, k).float(), stored)


def test_fp8_keeps_zeros_and_the_largest_value() -> None:
    computed = torch.tensor([[[0.0, 0.0], [-1000.0, 1.0]]])
    for dtype in ("fp8_token",):
        values, scales = pack(computed, dtype)
        assert scales is not None
        back = values.float() * scales[..., None]
        assert back.isfinite().all()
        assert back[0, 0].tolist() == [0.0, 0.0]
        assert back[0, 1, 0] == pytest.approx(-1000)


def test_one_flipped_bit_is_one_bad_image(dataset: ShardDataset, tmp_path: Path) -> None:
    make_cache(dataset, tmp_path / "cache")
    file = tmp_path / "cache" / feature_cache.feature_file(dataset.manifest.shards[0].name)
    places = images_of(dataset, 0)
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[length + 2 * SHAPE[0] * SHAPE[1] * 2 + 5] ^= 1  # in the third image
    file.write_bytes(content)
    cache = FeatureCache(tmp_path / "cache", dataset)
    for n, place in enumerate(places):
        if n == 2:
            with pytest.raises(BadSampleError, match="do not match their checksum"):
                cache.read(*place)
        else:
            cache.read(*place)


def test_an_image_that_could_not_be_decoded_is_bad_when_it_is_read(dataset: ShardDataset, tmp_path: Path) -> None:
    i, k = images_of(dataset, 0)[1]
    data = dataset.image_bytes(i, k)
    tar = shard_format.shard_paths(dataset.path, dataset.manifest.shards[0].name).tar
    tar.write_bytes(tar.read_bytes().replace(data, bytes(len(data))))
    make_cache(dataset, tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache", dataset)
    assert cache.manifest.shards[0].damaged == (1,)
    with pytest.raises(BadSampleError, match="could not be decoded"):
        cache.read(i, k)
    reader = FeatureReader([cache], torch.float32)
    assert reader.blanks(2).shape == (2, *SHAPE)
    assert reader.blanks(2).dtype == torch.float32


def test_features_of_another_kind_are_refused_by_the_name_of_what_differs(dataset: ShardDataset, tmp_path: Path) -> None:
    config = make_cache(dataset, tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache", dataset)

    def refused(changed: Config, match: str, tower: str = "a" * 64) -> None:
        with pytest.raises(ValueError, match=match):
            cache.check(feature_key(changed, dataset, tower))

    replace = dataclasses.replace
    refused(
        replace(config, vision=replace(config.vision, resize="crop")),
        r"made with vision\.resize square, but here it is crop: use --vision\.resize square, or encode again",
    )
    refused(replace(config, vision=replace(config.vision, image_size=24)), r"vision\.image_size 16, but here it is 24")
    mean = (0.1, 0.2, 0.3)
    refused(replace(config, vision=replace(config.vision, pixel_mean=mean)), r"--vision\.pixel-mean 0\.5 0\.5 0\.5")
    refused(replace(config, data=replace(config.data, features_dtype="fp8_token")), r"--data\.features-dtype bf16")
    refused(replace(config, data=replace(config.data, decode="exact")), r"--data\.decode fast")
    refused(replace(config, train=replace(config.train, precision="bf16")), r"train\.precision fp32")
    refused(config, r"by a tower with other weights \(tower aaaaaaaaaaaa, here bbbbbbbbbbbb\)", tower="b" * 64)
    other = mixed(tmp_path / "other", num_rows=12)
    with pytest.raises(ValueError, match="was made of another dataset"):
        FeatureCache(tmp_path / "cache", other)


def test_an_unfinished_or_changed_cache_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    make_cache(dataset, tmp_path / "cache")
    manifest = tmp_path / "cache" / "manifest.json"
    whole = manifest.read_text()
    changed = json.loads(whole)
    changed["key"]["tower"] = "b" * 64
    manifest.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="fingerprint does not match"):
        FeatureCache(tmp_path / "cache", dataset)
    manifest.write_text(whole)
    file = tmp_path / "cache" / feature_cache.feature_file(dataset.manifest.shards[1].name)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"is missing or incomplete: run pipelines\.encode again"):
        FeatureCache(tmp_path / "cache", dataset)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"holds no finished features \(no manifest\.json\): make them with .* --out"):
        FeatureCache(tmp_path / "cache", dataset)


def test_settings_that_contradict_features_are_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.features names 2 folders for 1 datasets"):
        config_of(dataset, tmp_path, features=("a", "b"))
    config = config_of(dataset, tmp_path, features=("a",))
    with pytest.raises(ValueError, match="here the tower trains"):
        dataclasses.replace(config, train=dataclasses.replace(config.train, trainable_parts=("tower",)))
