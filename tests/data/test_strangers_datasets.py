"""A dataset from somebody else: whatever its manifest, indexes, texts, links and files say, nothing outside it changes, and
what cannot be read is one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.loading import token_counts
from himix_megatron.data.loading.feature_cache import FeatureCache
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset
from himix_megatron.data.text.tokenizer import load_tokenizer
from tests.support.data_fixtures import mixed
from tools.inspect_shards.statistics import statistics

COLUMN = token_counts.column_of(load_tokenizer("bytes"), "tiny")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed(tmp_path_factory.mktemp("theirs"), 12).path


@pytest.fixture
def theirs(honest: Path, tmp_path: Path) -> Path:
    shutil.copytree(honest, tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of ours with a file in it."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    return tmp_path / "victim"


def unharmed(victim: Path) -> bool:
    return [(file.name, file.read_text()) for file in victim.iterdir()] == [("file", "precious")]


def sign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and give it the fingerprint of what it then says."""
    file = folder / "manifest.json"
    tree = json.loads(file.read_text())
    tree.pop("fingerprint")
    change(tree)
    file.write_text(json.dumps(tree | {"fingerprint": shard_format.hash_of(tree)}))


def write_index(folder: Path, change: Callable[[Any, Any], None]) -> None:
    """Change the first shard's tables, and every checksum of them."""
    name = ShardDataset(folder).manifest.shards[0].name
    path = folder / shard_format.shard_files(name).index
    samples, images = (table.copy() for table in shard_format.decode_index(path.read_bytes()))
    change(samples, images)
    data = shard_format.encode_index(samples, images)
    path.write_bytes(data)
    sign(folder, lambda tree: tree["shards"][0]["index"].update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data)))


@pytest.mark.parametrize("place", ["lengths", f"lengths/{COLUMN}", f"lengths/{COLUMN}/.lock"])
def test_counting_tokens_writes_through_no_link(theirs: Path, victim: Path, place: str) -> None:
    link = theirs / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim / "file" if place.endswith(".lock") else victim)
    with pytest.raises(ValueError, match=r"is a symbolic link: links below .* are not followed"):
        token_counts.text_lengths(ShardDataset(theirs), "bytes", "tiny")
    assert unharmed(victim)


def test_a_lock_that_holds_something_keeps_it(theirs: Path) -> None:
    lock = theirs / "lengths" / COLUMN / ".lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("whatever it is")
    token_counts.text_lengths(ShardDataset(theirs), "bytes", "tiny")
    assert lock.read_text() == "whatever it is"


@pytest.mark.parametrize(
    "name",
    [
        "../../victim/file",
        "/etc/passwd",
        "a/b-000000",
        "..-000000/x",
        "x\x1b[2J-000000",
        "mixed-\u0660\u0660\u0660\u0660\u0660\u0660",
    ],
)
def test_a_shards_name_that_is_no_name_is_refused(theirs: Path, name: str) -> None:
    sign(theirs, lambda tree: tree["shards"][0].update(name=name))
    with pytest.raises(ValueError, match=r"manifest\.json: shards\[0\]\.name is .*, wanted a shard's name, NAME-000000"):
        ShardDataset(theirs)


def test_a_remote_dataset_replaces_no_file_outside_its_cache(
    theirs: Path, victim: Path, tmp_path: Path, s3_client: Any
) -> None:
    data = b"content of its maker's choice"
    cache = tmp_path / "cache"
    inside = f"shards/{'../' * 3}victim/file"
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (victim / "file").rename(victim / "file.idx")
    sign(theirs, lambda tree: tree["shards"][0].update(name=f"{'../' * 3}victim/file", index=digest))
    s3_client.upload_file(str(theirs / "manifest.json"), "bucket", "sets/evil/manifest.json")
    s3_client.put_object(Bucket="bucket", Key=f"sets/evil/{inside}.idx", Body=data)
    with pytest.raises(ValueError, match="wanted a shard's name"):
        ShardDataset("s3://bucket/sets/evil", cache)
    assert (victim / "file.idx").read_text() == "precious"


@pytest.mark.parametrize("part", ["manifest.json", "shards", "shards/{}.tar", "shards/{}.idx"])
def test_links_inside_a_dataset_are_not_read(theirs: Path, victim: Path, part: str) -> None:
    place = theirs / part.format(ShardDataset(theirs).manifest.shards[0].name)
    place.rename(victim / "moved")
    place.symlink_to(victim / "moved")
    with pytest.raises(ValueError, match=f"{place} is a symbolic link: links below {theirs} are not followed"):
        ShardDataset(theirs)


def test_a_fifo_for_a_shard_is_not_waited_for(theirs: Path) -> None:
    place = theirs / shard_format.shard_files(ShardDataset(theirs).manifest.shards[0].name).tar
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(ValueError, match="is a FIFO: wanted a regular file"):
        ShardDataset(theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_samples": "5"}, 'num_samples is "5", wanted a whole number'),
        ({"num_samples": -5}, "num_samples is -5, wanted 0 to"),
        ({"num_samples": 10**30}, "num_samples is 1000000000000000000000000000000, wanted 0 to"),
        ({"num_samples": 13}, "num_samples is 13, but its shards have 12"),
        ({"num_rows": None}, "num_rows is null, wanted a whole number"),
        ({"shards": {}}, "shards is an object, wanted a list"),
        ({"shards": [5]}, r"shards\[0\] is 5, wanted an object"),
        ({"quarantined": {"x": "y"}}, 'quarantined.x is "y", wanted'),
        ({"config": [], "name": 5}, "name is 5, wanted text|config is a list"),
        ({"more": 1}, "it has a field more"),
    ],
)  # fmt: skip
def test_a_manifest_of_other_types_is_one_line(theirs: Path, change: dict[str, Any], said: str) -> None:
    sign(theirs, lambda tree: tree.update(change))
    with pytest.raises(ValueError, match=rf"{theirs}/manifest\.json: ({said})"):
        ShardDataset(theirs)


@pytest.mark.parametrize("digest", [5, None, "x", "F" * 64, "0" * 63, {}])
def test_a_digest_of_another_form_is_one_line(theirs: Path, digest: Any) -> None:
    sign(theirs, lambda tree: tree["shards"][0]["tar"].update(sha256=digest))
    with pytest.raises(ValueError, match=r"shards\[0\]\.tar\.sha256 is .*, wanted"):
        ShardDataset(theirs)


def points_behind_the_tar(samples: Any, images: Any) -> None:
    samples["offset"][0] = 2**64 - 1
    samples["size"][0] = 2**32 - 1


def points_before_the_tar(samples: Any, images: Any) -> None:
    images["offset"][0] = 0


def is_larger_than_the_tar(samples: Any, images: Any) -> None:
    images["size"][-1] = 2**32 - 1


def has_images_that_are_not_there(samples: Any, images: Any) -> None:
    samples["num_images"][-1] = 2**32 - 1


def has_images_of_no_size(samples: Any, images: Any) -> None:
    images["width"][0] = 0


INDEXES = [
    points_behind_the_tar, points_before_the_tar, is_larger_than_the_tar, has_images_that_are_not_there, has_images_of_no_size,
]  # fmt: skip


@pytest.mark.parametrize("change", INDEXES)
def test_an_index_that_points_elsewhere_is_damaged(theirs: Path, change: Callable[[Any, Any], None]) -> None:
    write_index(theirs, change)
    dataset = ShardDataset(theirs)
    for act in (lambda: dataset.sample(0), dataset.image_counts, lambda: dataset.sum_over_images(np.add)):
        with pytest.raises(DamagedShardError, match=r"points out of|has no pixels"):
            act()
    for act in (lambda: token_counts.text_lengths(dataset, "bytes", "tiny"), lambda: statistics(dataset, 4)):
        with pytest.raises(ValueError, match=r"points out of|has no pixels"):
            act()


def test_more_samples_than_the_index_holds_are_refused(theirs: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["shards"][0]["num_samples"] += 1
        tree["num_samples"] += 1

    sign(theirs, change)
    with pytest.raises(DamagedShardError, match=r"it has 10 samples and .* images, not those of its receipt"):
        ShardDataset(theirs).sample(0)


@pytest.mark.parametrize(
    "text", [b"[" * 40, b"{}", b'{"conversations": 5}', b'{"conversations": [{"from": "human"}]}', b"\xff"]
)
def test_a_text_of_another_form_is_a_bad_sample(theirs: Path, text: bytes) -> None:
    name = ShardDataset(theirs).manifest.shards[0].name
    tar = theirs / shard_format.shard_files(name).tar

    def change(samples: Any, images: Any) -> None:
        with tar.open("r+b") as file:
            file.seek(int(samples["offset"][0]))
            file.write(text)
        samples["size"][0] = len(text)
        samples["crc32"][0] = zlib.crc32(text)

    write_index(theirs, change)
    dataset = ShardDataset(theirs)
    with pytest.raises(BadSampleError, match="malformed"):
        dataset.text(0)
    assert token_counts.text_lengths(dataset, "bytes", "tiny")[0] == token_counts.UNUSABLE


@pytest.mark.parametrize(
    "change",
    [
        {"width": -1}, {"width": "x"}, {"tokens_per_image": 0}, {"blank": None}, {"shards": [{}]}, {"key": []}, {"key": {}},
        {"num_images": 1.5}, {"relative_error": []}, {"more": 1},
    ],
)  # fmt: skip
def test_a_cache_of_features_of_other_types_is_one_line(theirs: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    dataset = ShardDataset(theirs)
    digest = {"bytes": 0, "sha256": "0" * 64}
    receipt = {
        "features_version": 1, "name": "blank", "key_hash": "", "source": "", "num_images": 1, "damaged": [],
        "squared_error": 0.0, "squared": 1.0, "file": digest,
    }  # fmt: skip
    tree: dict[str, Any] = {
        "features_version": 1, "key": {"dataset": dataset.fingerprint, "data.features_dtype": "bf16"}, "tokens_per_image": 9,
        "width": 4, "num_images": 1, "relative_error": 0.0, "blank": receipt, "shards": [receipt | {"name": "../../x"}],
    }  # fmt: skip
    (tmp_path / "cache").mkdir()

    def refused(tree: dict[str, Any], said: str) -> None:
        text = json.dumps(tree | {"fingerprint": shard_format.hash_of(tree)})
        (tmp_path / "cache" / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=rf"cache/manifest\.json: .*{said}"):
            FeatureCache(tmp_path / "cache", dataset)

    refused(tree, "its files are not those of the shards of")
    refused(tree | change, "wanted|is missing|it has a field")


def test_a_deep_manifest_is_one_line(theirs: Path) -> None:
    (theirs / "manifest.json").write_text('{"schema_version": 1, "config": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json: no JSON that can be read"):
        ShardDataset(theirs)
