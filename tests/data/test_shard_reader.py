"""The shard contract: what is written is what is read, by us and by others; what is damaged is named, never read as whole."""

import json
import os
import pickle
import tarfile

import pytest
import webdataset

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.ingest.shard_writer import load_receipt, verify_shard
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset
from himix_megatron.data.shards.shard_format import Receipt
from himix_megatron.data.shards.storage import LocalFolder
from tests.support.data_fixtures import EMOJI, make, mixed, mixed_source


@pytest.fixture
def dataset(tmp_path):
    return mixed(tmp_path)


def source_of(tmp_path):
    return json.loads((tmp_path / "rows.json").read_text()), tmp_path / "images"


def test_every_sample_comes_back_unchanged(dataset, tmp_path):
    rows, images = source_of(tmp_path)
    assert len(dataset) == len(rows) == 24
    for i, row in enumerate(rows):
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        assert dataset.text(i) == {"id": row["id"], "conversations": row["conversations"]}
        assert dataset.num_images(i) == len(names)
        assert [dataset.image_bytes(i, k) for k in range(len(names))] == [(images / name).read_bytes() for name in names]
        assert all(dataset.image_size(i, k) == (40, 30) for k in range(len(names)))
        assert dataset.key(i) == f"rows-{i // 10:06d}/{i:09d}"
    for outside in (-1, 24):
        with pytest.raises(IndexError):
            dataset.text(outside)
    with pytest.raises(IndexError):
        dataset.image_bytes(3, 0)  # text only


def test_the_real_set_comes_back(tmp_path):
    dataset = make(tmp_path / "out", EMOJI / "instruct.json", EMOJI / "images", samples_per_shard=25)
    rows = json.loads((EMOJI / "instruct.json").read_text())
    assert (len(dataset), dataset.manifest.num_images, dataset.manifest.quarantined) == (64, 60, {})
    for i, row in enumerate(rows):
        assert dataset.text(i)["conversations"] == row["conversations"]
        if "image" in row:
            assert dataset.image_bytes(i, 0) == (EMOJI / "images" / row["image"]).read_bytes()


def test_webdataset_reads_the_same_samples(dataset):
    tars = sorted(str(path) for path in (dataset.path / "shards").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:09d}" for i in range(24)]
    for i, sample in enumerate(samples):
        assert json.loads(sample["json"]) == dataset.text(i)
        suffixes = [f"{k}.{'jpg' if (i % 2 == 0 or k) else 'png'}" for k in range(dataset.num_images(i))]
        assert [sample[suffix] for suffix in suffixes] == [dataset.image_bytes(i, k) for k in range(len(suffixes))]


def test_tars_are_plain_with_fixed_metadata(dataset):
    for path in sorted((dataset.path / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert tar.pax_headers == {}
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode, member.uname, member.gname) == (0, 0, 0, 0o644, "", "")
            assert member.isreg()
    data = path.read_bytes()
    assert data[257:265] == b"ustar\x0000"
    names = [member.name for member in members]
    assert names[:4] == ["000000020.json", "000000020.0.jpg", "000000021.json", "000000022.json"]  # 21 is text only
    assert names[4:6] == ["000000022.0.jpg", "000000022.1.jpg"]


def test_the_index_is_small(tmp_path):
    dataset = make(tmp_path / "out", EMOJI / "align.json", EMOJI / "images")
    for shard in dataset.manifest.shards:
        assert shard.index.bytes <= 64 * shard.num_samples
    assert shard_format.IMAGE_RECORD.itemsize == 24
    assert shard_format.SAMPLE_RECORD.itemsize + shard_format.IMAGE_RECORD.itemsize <= 64


def test_the_manifest_adds_up(dataset):
    manifest = json.loads((dataset.path / "manifest.json").read_text())
    assert manifest["num_samples"] == sum(shard["num_samples"] for shard in manifest["shards"]) == 24
    assert manifest["num_images"] == 24 - 4 + 4
    assert manifest["fingerprint"] == dataset.fingerprint
    for shard in dataset.manifest.shards:
        assert shard == load_receipt(LocalFolder(dataset.path), Receipt, shard.name)
        assert verify_shard(LocalFolder(dataset.path), shard) == []


def test_nothing_written_tells_where_or_when(tmp_path):
    dataset = mixed(tmp_path)
    for path in dataset.path.rglob("*.json"):
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_folder_without_manifest_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json.*python -m pipelines\.preprocess --source llava") as caught:
        ShardDataset(tmp_path / "nothing")
    assert "nothing" in str(caught.value)


def test_a_changed_manifest_is_refused(dataset):
    path = dataset.path / "manifest.json"
    text = path.read_text()
    for changed in (
        text.replace('"num_rows": 24', '"num_rows": 25'),
        text[:-40],
        text.replace('"schema_version": 1', ""),
        "[]",
    ):
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            ShardDataset(dataset.path)


def test_missing_and_truncated_shards_are_refused_by_name(dataset):
    tar = dataset.path / "shards" / "rows-000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"rows-000001\.tar has \d+ bytes, not"):
        ShardDataset(dataset.path)
    tar.unlink()
    with pytest.raises(ValueError, match=r"rows-000001\.tar is missing: run the preprocessing again"):
        ShardDataset(dataset.path)


def test_a_flipped_bit_in_any_member_is_found_when_read(dataset):
    tar = dataset.path / "shards" / "rows-000000.tar"
    whole = tar.read_bytes()
    found = 0
    with tarfile.open(tar) as opened:
        members = opened.getmembers()[:6]
    for member in members:
        data = bytearray(whole)
        data[member.offset_data + member.size // 2] ^= 4
        tar.write_bytes(data)
        opened = ShardDataset(dataset.path)
        i = int(member.name[:9])
        read = opened.text if member.name.endswith("json") else lambda n, o=opened: o.image_bytes(n, 0)
        with pytest.raises(BadSampleError, match=f"rows-000000/{i:09d}"):
            read(i)
        found += 1
        assert verify_shard(LocalFolder(dataset.path), opened.manifest.shards[0]) == [
            "rows-000000.tar is damaged (10 samples at stake)"
        ]
    assert found == 6


def test_a_damaged_index_is_fatal_and_named(dataset):
    index = dataset.path / "shards" / "rows-000002.idx"
    data = bytearray(index.read_bytes())
    for place in (0, 9, 30, len(data) - 1):
        data[place] ^= 1
        index.write_bytes(data)
        with pytest.raises(DamagedShardError, match=r"rows-000002\.idx: .*\(4 samples at stake\)"):
            ShardDataset(dataset.path).text(20)
        data[place] ^= 1


def test_an_open_dataset_can_be_sent_to_another_process(dataset):
    dataset.text(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.text(23) == dataset.text(23)
    assert copy.fingerprint == dataset.fingerprint


def test_few_files_are_kept_open(dataset, monkeypatch):
    monkeypatch.setattr("himix_megatron.data.shards.reader.MAX_OPEN_SHARDS", 1)
    for i in (0, 10, 20, 0, 10):
        assert dataset.text(i)["id"] == f"row-{i}"
        assert len(dataset._tars) == 1


def test_another_source_or_config_gives_another_fingerprint(tmp_path):
    annotations, images = mixed_source(tmp_path)
    prints = {make(tmp_path / str(size), annotations, images, samples_per_shard=size).fingerprint for size in (8, 12)}
    prints.add(make(tmp_path / "named", annotations, images, samples_per_shard=8, name="other").fingerprint)
    again = make(tmp_path / "again", annotations, images, samples_per_shard=8).fingerprint
    assert len(prints) == 3
    assert again in prints


def test_tar_headers_are_tarfiles_own():
    for member, size in (("000000000.json", 0), ("000000012.0.jpg", 1), ("k" * 96 + ".png", 123_456_789), ("a.b", 8**11 - 1)):
        info = tarfile.TarInfo(member)
        info.size, info.mode, info.mtime = size, 0o644, 0
        assert shard_format.tar_header(member, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def test_a_file_of_another_length_is_not_hashed(tmp_path):
    """It may be as long as a file system has numbers for."""
    dataset = mixed(tmp_path, 12)
    receipt = dataset.manifest.shards[0]
    os.truncate(dataset.path / "shards" / f"{receipt.name}.idx", 1 << 42)
    assert verify_shard(LocalFolder(dataset.path), receipt) == [f"{receipt.name}.idx is damaged (10 samples at stake)"]
