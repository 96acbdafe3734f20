"""Feature files are plain safetensors, damage in them is one bad image, and other features are refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from himix_megatron.config import Config, VisionConfig
from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.ingest.feature_writer import Encode, FeatureJob, images_of, make_features, pack
from himix_megatron.data.ingest.shard_writer import write_record
from himix_megatron.data.loading import feature_cache
from himix_megatron.data.loading.feature_cache import FeatureCache, FeatureManifest, feature_key
from himix_megatron.data.loading.image_table import ImageTable, Size
from himix_megatron.data.loading.vision_reader import FeatureReader, PixelReader
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset
from himix_megatron.data.shards.storage import LocalFolder
from tests.support.data_fixtures import EMOJI, make, mixed
from tests.support.small_runs import small_config

SIZES = ((40, 30), (8, 64), (100, 20), (5, 5), (64, 64))
BOTH = pytest.mark.parametrize("tower", ["tiny", "tiny_native"])
"""A tower of fixed squares, and one that gives images different numbers of tokens."""


def brightness(vision: VisionConfig) -> Encode:
    """A tower whose features are easy to check: the image's mean, times a ramp; 1 everywhere for a blank image."""

    def encode(pixels: torch.Tensor, blank: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
        images, parts = ImageTable.of(vision, [sizes]), []
        for n, image in enumerate(images.split(pixels)):
            ramp = torch.linspace(-1, 3, images.tokens[n] * vision.hidden_size).view(images.tokens[n], -1)
            parts.append(torch.ones_like(ramp) if blank[n] else image.float().mean() * ramp)
        return torch.cat(parts)

    return encode


def config_of(dataset: ShardDataset, folder: Path, tower: str = "tiny", **data: Any) -> Config:
    config = small_config(dataset.path, folder, parts=("vision_kv",))
    vision = dataclasses.replace(config.vision, tower=tower, image_size=16 if tower == "tiny" else 32)
    return dataclasses.replace(config, vision=vision, data=dataclasses.replace(config.data, **data))


def tokens_of(dataset: ShardDataset, shard: int, vision: VisionConfig) -> list[int]:
    """Of each image of a shard."""
    sizes = [dataset.image_size(*place) for place in images_of(dataset, shard)]
    return [vision.num_tokens(vision.input_size(*size)) for size in sizes]


def write_cache(
    dataset: ShardDataset, folder: Path, vision: VisionConfig, key: dict[str, Any], encode: Encode, key_hash: str
) -> None:
    """A finished cache, encoded three images at a time, or more where they are small."""
    for part in ("features", "receipts", "attempt"):
        (folder / part).mkdir(parents=True)
    shape = (vision.max_tokens_per_image if vision.has_fixed_size else None, vision.hidden_size)
    first = FeatureJob(LocalFolder(folder), folder / "attempt", key_hash, key["data.features_dtype"], shape, None)
    jobs = [first, *(dataclasses.replace(first, shard=n) for n in range(len(dataset.manifest.shards)))]
    reader, most = PixelReader(vision, "fast"), 3 * vision.max_tokens_per_image
    with ThreadPoolExecutor(2) as pool:
        made = [make_features(job, dataset, encode, reader, max_tokens=most, pool=pool) for job in jobs]
        assert all(was_written for _, was_written in made)
        again = [make_features(job, dataset, encode, reader, max_tokens=most, pool=pool) for job in jobs]
        assert again == [(receipt, False) for receipt, _ in made]
    blank, *shards = (receipt for receipt, _ in made)
    whole = (blank.features_version, key, *shape, dataset.manifest.num_images, 0.0, blank, tuple(shards))
    write_record(LocalFolder(folder), folder / "attempt", shard_format.MANIFEST, FeatureManifest(*whole))


def make_cache(dataset: ShardDataset, folder: Path, dtype: Any = "bf16", tower: str = "tiny") -> Config:
    """A cache of what `brightness` encodes. Returns: the settings it was made with."""
    config = config_of(dataset, folder / "run", tower, features_dtype=dtype)
    key = feature_key(config, dataset, "a" * 64)
    write_cache(dataset, folder, config.vision, key, brightness(config.vision), shard_format.hash_of(key))
    return config


@pytest.fixture
def dataset(tmp_path: Path) -> ShardDataset:
    return mixed(tmp_path / "data", sizes=SIZES)


@BOTH
@pytest.mark.parametrize("dtype", ["bf16", "fp8_token"])
def test_what_is_read_is_what_was_computed_rounded_to_the_caches_dtype(
    dtype: Any, tower: str, dataset: ShardDataset, tmp_path: Path
) -> None:
    config = make_cache(dataset, tmp_path / "cache", dtype, tower)
    cache = FeatureCache(tmp_path / "cache", dataset)
    cache.check(feature_key(config, dataset, "a" * 64))
    pixels, vision, found = PixelReader(config.vision, config.data.decode), config.vision, set()
    again = pickle.loads(pickle.dumps(cache))  # as a loader's worker gets it
    for shard in range(len(dataset.manifest.shards)):
        for i, k in images_of(dataset, shard):
            images = ImageTable.of(vision, [[vision.input_size(*dataset.image_size(i, k))]])
            image = pixels.blanks(images)
            pixels.read_into(images.split(image)[0], dataset, i, k)
            computed = brightness(vision)(image, torch.tensor([False]), images.sizes)
            values, scales = pack(computed, dtype)
            wanted = values.float() if scales is None else values.float() * scales[..., None]
            assert torch.equal(again.read(i, k).float(), wanted)
            error = (wanted - computed).norm() / computed.norm()
            assert error <= (0.004 if dtype == "bf16" else 0.04)
            found.add(len(wanted))
    assert len(found) == (1 if tower == "tiny" else 4)
    assert cache.blank().shape == (vision.num_tokens(vision.blank_size), vision.hidden_size)
    assert (cache.blank().float() - 1).abs().max() <= 1e-6


@BOTH
@pytest.mark.parametrize("dtype", ["bf16", "fp8_token"])
def test_a_file_is_read_by_anybodys_safetensors(dtype: Any, tower: str, dataset: ShardDataset, tmp_path: Path) -> None:
    vision = make_cache(dataset, tmp_path / "cache", dtype, tower).vision
    cache = FeatureCache(tmp_path / "cache", dataset)
    name = dataset.manifest.shards[0].name
    tensors = load_file(tmp_path / "cache" / feature_cache.feature_file(name))
    assert tensors["features"].dtype == (torch.bfloat16 if dtype == "bf16" else torch.float8_e4m3fn)
    places, lengths = images_of(dataset, 0), tokens_of(dataset, 0, vision)
    if tower == "tiny":
        assert cache.manifest.features_version == 1
        assert tensors["features"].shape == (len(places), 4, vision.hidden_size)
    else:
        assert (cache.manifest.features_version, cache.manifest.tokens_per_image) == (2, None)
        assert tensors["features"].shape == (sum(lengths), vision.hidden_size)
        assert tensors["lengths"].tolist() == lengths
    stored = tensors["features"].float()
    if dtype != "bf16":
        stored = stored * tensors["scales"][..., None]
    for place, wanted in zip(places, stored.view(-1, vision.hidden_size).split(lengths), strict=True):
        assert torch.equal(cache.read(*place).float(), wanted)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        ("bf16", "3ea142dda01b9c102c31c1747a8106420649e20ab84926247ce33b6dfeff2a03"),
        ("fp8_token", "c08ef976ab539dfecab10471696e683867489cb885babe1245d4d102e6b8bf16"),
    ],
)
def test_the_bytes_of_version_1_stay_what_they_are(dtype: Any, wanted: str, tmp_path: Path) -> None:
    """Caches that users have were written so. The features are numbers that every CPU computes alike."""
    dataset = make(tmp_path / "data", EMOJI / "align.json", EMOJI / "images", samples_per_shard=30)
    vision, done = config_of(dataset, tmp_path).vision, 0

    def counting(pixels: torch.Tensor, blank: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
        nonlocal done
        images = torch.arange(done, done + len(blank))[:, None, None]
        done += len(blank)
        values = ((images * 7 + torch.arange(4)[:, None] * 5 + torch.arange(32)) % 37 - 18).float()
        values[..., 0] = 448
        return values.flatten(0, 1)

    write_cache(dataset, tmp_path / "cache", vision, {"data.features_dtype": dtype}, counting, "k" * 64)
    files = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert len(files) == 7
    assert hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() == wanted


def test_fp8_keeps_zeros_and_the_largest_value() -> None:
    computed = torch.tensor([[0.0, 0.0], [-1000.0, 1.0]])
    for dtype in ("fp8_token",):
        values, scales = pack(computed, dtype)
        assert scales is not None
        back = values.float() * scales[..., None]
        assert back.isfinite().all()
        assert back[0].tolist() == [0.0, 0.0]
        assert back[1, 0] == pytest.approx(-1000)


def flip_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@BOTH
def test_one_flipped_bit_is_one_bad_image(tower: str, dataset: ShardDataset, tmp_path: Path) -> None:
    vision = make_cache(dataset, tmp_path / "cache", tower=tower).vision
    file = tmp_path / "cache" / feature_cache.feature_file(dataset.manifest.shards[0].name)
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    flip_bit(file, length + sum(tokens_of(dataset, 0, vision)[:2]) * vision.hidden_size * 2 + 5)  # in the third image
    cache = FeatureCache(tmp_path / "cache", dataset)
    for n, place in enumerate(images_of(dataset, 0)):
        if n == 2:
            with pytest.raises(BadSampleError, match="do not match their checksum"):
                cache.read(*place)
        else:
            cache.read(*place)


@pytest.mark.parametrize(("tower", "place"), [("tiny", 30), ("tiny_native", 30), ("tiny_native", -8), ("tiny_native", -9)])
def test_a_file_whose_images_cannot_be_placed_is_named(tower: str, place: int, dataset: ShardDataset, tmp_path: Path) -> None:
    """A flipped bit in the header, and in the table of the images' lengths."""
    make_cache(dataset, tmp_path / "cache", tower=tower)
    file = tmp_path / "cache" / feature_cache.feature_file(dataset.manifest.shards[0].name)
    flip_bit(file, place)
    cache = FeatureCache(tmp_path / "cache", dataset)
    for image in images_of(dataset, 0)[:2]:
        with pytest.raises(DamagedShardError, match=rf"{file.name} is damaged: its header is not that of \d+ images with"):
            cache.read(*image)
    cache.read(*images_of(dataset, 1)[0])


@BOTH
def test_an_image_that_could_not_be_decoded_is_bad_when_it_is_read(tower: str, dataset: ShardDataset, tmp_path: Path) -> None:
    """A rank reads a shard's images; the damaged one stays as it was, blank."""
    places = images_of(dataset, 0)
    data = dataset.image_bytes(*places[1])
    tar = dataset.path / shard_format.shard_files(dataset.manifest.shards[0].name).tar
    tar.write_bytes(tar.read_bytes().replace(data, bytes(len(data))))
    vision = make_cache(dataset, tmp_path / "cache", tower=tower).vision
    cache = FeatureCache(tmp_path / "cache", dataset)
    assert cache.manifest.shards[0].damaged == (1,)
    stored = load_file(tmp_path / "cache" / feature_cache.feature_file(dataset.manifest.shards[0].name))["features"]
    images = ImageTable.of(vision, [[vision.input_size(*dataset.image_size(*place)) for place in places]])
    parts = images.split(stored.view(-1, vision.hidden_size))
    assert [n for n, part in enumerate(parts) if not part.any()] == [1]
    reader = FeatureReader([cache], torch.float32)
    found = reader.blanks(images)
    assert (found.shape, found.dtype) == ((sum(images.tokens), vision.hidden_size), torch.float32)
    for n, (place, into) in enumerate(zip(places, images.split(found), strict=True)):
        if n == 1:
            with pytest.raises(BadSampleError, match="could not be decoded"):
                reader.read_into(into, dataset, *place)
            assert (into == int(tower == "tiny")).all()  # zeros for a size that is not the blank image's
        else:
            reader.read_into(into, dataset, *place)
            assert torch.equal(into, parts[n].float())
    with pytest.raises(ValueError, match=rf"has {images.tokens[0]} tokens of image 0 of .*, but here the tower gives it 7"):
        reader.read_into(torch.zeros(7, vision.hidden_size), dataset, *places[0])


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
    wider = replace(config.vision, num_layers=3)
    several = replace(config, vision=replace(wider, feature_layers=(-3, -1)))
    cache.manifest.key["vision.num_layers"] = 3
    assert several.vision.feature_width == 2 * wider.hidden_size
    refused(several, r"vision\.feature_layers -1, but here it is -3 -1: use --vision\.feature-layers -1, or encode")
    cache.check(feature_key(replace(config, vision=replace(wider, feature_layers=(-1,))), dataset))
    cache.manifest.key["vision.feature_layer"] = [-3, -1]
    cache.check(feature_key(several, dataset))
    refused(
        replace(config, vision=wider), r"vision\.feature_layers -3 -1, but here it is -1: use --vision\.feature-layers -3 -1"
    )
    swapped = replace(config, vision=replace(wider, feature_layers=(-1, -3)))
    refused(swapped, r"vision\.feature_layers -3 -1, but here it is -1 -3")
    cache.manifest.key.update({"vision.num_layers": config.vision.num_layers, "vision.feature_layer": -1})
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
    manifest.write_text(whole.replace('"features_version": 1', '"features_version": 3'))
    with pytest.raises(ValueError, match=r"manifest\.json: features_version is 3, wanted one of 1, 2"):
        FeatureCache(tmp_path / "cache", dataset)
    manifest.write_text(whole)
    file = tmp_path / "cache" / feature_cache.feature_file(dataset.manifest.shards[1].name)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"has \d+ bytes, not \d+: run pipelines\.encode again"):
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
