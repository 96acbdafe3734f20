"""Datasets on S3: read as local ones are, through a cache that stays below its cap, whoever dies or reads at the same time."""

from __future__ import annotations

import multiprocessing
import pickle
import random
from pathlib import Path

import pytest

from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset
from himix_megatron.data.shards.storage import locked
from tests.support.data_fixtures import mixed

URL = "s3://bucket/sets/mixed"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """64 samples in 7 shards of different lengths."""
    return mixed(tmp_path_factory.mktemp("mixed"), 64)


@pytest.fixture
def bucket(s3_client, local):
    """The dataset on S3."""
    for path in local.path.rglob("*"):
        if path.is_file():
            s3_client.upload_file(str(path), "bucket", f"sets/mixed/{path.relative_to(local.path)}")
    return s3_client


@pytest.fixture(scope="module")
def largest(local):
    """Bytes of the largest shard."""
    return max(shard.tar.bytes for shard in local.manifest.shards)


def cached(folder: Path) -> list[str]:
    """Shards that are in the cache, by number."""
    return sorted(path.stem[-1] for path in folder.glob("*/shards/*.tar"))


def num_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/shards/*.tar*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def assert_same(remote: ShardDataset, local: ShardDataset, order: list[int]) -> None:
    for i in order:
        assert remote.sample(i) == local.sample(i)
        assert remote.key(i) == local.key(i)


def test_a_dataset_on_s3_is_the_local_one(bucket, local, tmp_path):
    remote = ShardDataset(URL, cache_dir=tmp_path)
    assert (remote.is_remote, local.is_remote) == (True, False)
    assert remote.fingerprint == local.fingerprint
    assert remote.image_counts().tolist() == local.image_counts().tolist()
    assert cached(tmp_path) == []  # planning reads no shard
    assert_same(remote, local, list(range(64)))
    assert cached(tmp_path) == list("0123456")
    bucket.delete_object(Bucket="bucket", Key="sets/mixed/shards/rows-000003.tar")
    again = pickle.loads(pickle.dumps(remote))
    assert_same(again, local, [35])  # from the cache


def test_file_urls_are_local(local):
    opened = ShardDataset(local.path.as_uri())
    assert not opened.is_remote
    assert opened.path == local.path
    assert_same(opened, local, [0, 63])


@pytest.mark.parametrize("url", ["http://host/set", "gs://bucket/set", "pipe:// touch x"])
def test_other_schemes_are_refused(url):
    with pytest.raises(ValueError, match=r"is not read; wanted a path, file:///PATH or s3://BUCKET/KEY"):
        ShardDataset(url)


def test_a_url_without_a_dataset_is_refused_with_the_remedy(bucket, tmp_path):
    with pytest.raises(ValueError, match=r"s3://bucket/nothing is not a shard dataset .*pipelines\.preprocess"):
        ShardDataset("s3://bucket/nothing", cache_dir=tmp_path)


def test_missing_credentials_are_one_line(bucket, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(OSError, match=r"s3://bucket/sets/mixed/manifest\.json cannot be read: .*credentials"):
        ShardDataset(URL, cache_dir=tmp_path)
    s3fs.S3FileSystem.clear_instance_cache()


def test_the_shards_used_longest_ago_make_room(bucket, local, largest, tmp_path):
    remote = ShardDataset(URL, cache_dir=tmp_path, cache_bytes=2 * largest)
    for sample, kept in ((0, "0"), (10, "01"), (5, "01"), (20, "02"), (30, "23"), (0, "03")):
        assert_same(remote, local, [sample])
        assert cached(tmp_path) == list(kept)
        assert num_bytes(tmp_path) <= 2 * largest


def test_a_reader_keeps_the_shard_that_another_needs_the_room_of(bucket, local, largest, tmp_path):
    first, second = (ShardDataset(URL, cache_dir=tmp_path, cache_bytes=largest) for _ in range(2))
    assert_same(first, local, [0])
    assert_same(second, local, [10])
    assert cached(tmp_path) == ["1"]
    assert_same(first, local, list(range(10)))  # shard 0 is deleted, and still open
    assert cached(tmp_path) == ["1"]
    assert_same(first, local, [20])
    assert len(first._tars) == 1  # what is deleted is closed with the next opening: the disk has its room back


def test_a_shard_larger_than_the_cache_is_refused_at_once(bucket, largest, tmp_path):
    with pytest.raises(ValueError, match=r"shards/rows-00000\d\.tar has .* GiB, more than the .* raise --data\.cache-gib"):
        ShardDataset(URL, cache_dir=tmp_path, cache_bytes=largest - 1)


def test_a_damaged_shard_on_s3_is_named_and_not_kept(bucket, local, tmp_path):
    data = bytearray((local.path / "shards/rows-000002.tar").read_bytes())
    data[700] ^= 1
    bucket.put_object(Bucket="bucket", Key="sets/mixed/shards/rows-000002.tar", Body=bytes(data))
    remote = ShardDataset(URL, cache_dir=tmp_path)
    with pytest.raises(DamagedShardError, match=r"rows-000002\.tar is not the file .* \(10 samples at stake\)"):
        remote.text(20)
    bucket.put_object(Bucket="bucket", Key="sets/mixed/shards/rows-000002.tar", Body=bytes(data[:-512]))
    with pytest.raises(DamagedShardError, match=r"rows-000002\.tar"):
        remote.text(20)
    assert num_bytes(tmp_path) == 0
    bucket.delete_object(Bucket="bucket", Key="sets/mixed/shards/rows-000002.tar")
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/sets/mixed/shards/rows-000002\.tar"):
        remote.text(20)
    assert_same(remote, local, [10, 30])


def test_a_damaged_or_missing_index_on_s3_is_refused_when_opened(bucket, local, tmp_path):
    data = bytearray((local.path / "shards/rows-000002.idx").read_bytes())
    data[40] ^= 1
    bucket.put_object(Bucket="bucket", Key="sets/mixed/shards/rows-000002.idx", Body=bytes(data))
    with pytest.raises(ValueError, match=r"rows-000002\.idx is not the file that the manifest names"):
        ShardDataset(URL, cache_dir=tmp_path)
    bucket.delete_object(Bucket="bucket", Key="sets/mixed/shards/rows-000002.idx")
    with pytest.raises(ValueError, match=r"rows-000002\.idx"):
        ShardDataset(URL, cache_dir=tmp_path)


def test_what_a_killed_process_left_takes_no_room(bucket, local, largest, tmp_path):
    remote = ShardDataset(URL, cache_dir=tmp_path, cache_bytes=largest)
    left = remote.path / "shards" / "rows-000005.tar.partial"
    with left.open("wb") as file:
        file.truncate(largest)
    assert_same(remote, local, [0])
    assert not left.exists()
    with left.open("wb") as file:
        file.truncate(largest)
    assert_same(remote, local, [50])
    assert cached(tmp_path) == ["5"]


def _read_at_random(arguments: tuple[Path, Path, int, int]) -> int:
    """In another process: read samples in a random order. Returns: the most that was in the cache."""
    folder, cache_dir, cache_bytes, seed = arguments
    local, remote = ShardDataset(folder), ShardDataset(URL, cache_dir=cache_dir, cache_bytes=cache_bytes)
    most = 0
    for i in random.Random(seed).choices(range(64), k=60):
        assert_same(remote, local, [i])
        with locked(cache_dir, "lock"):  # else a file that is renamed, or makes room for another, may be counted twice
            most = max(most, num_bytes(cache_dir))
    return most


def test_processes_share_the_cache_and_its_cap(bucket, local, largest, tmp_path):
    """Four readers, room for two shards: every fetch has to wait for another's room."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        most = pool.map(_read_at_random, [(local.path, tmp_path, 2 * largest, seed) for seed in range(4)], chunksize=1)
    assert max(most) <= 2 * largest
    assert max(most) > largest
