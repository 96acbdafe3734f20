"""The text column says how long texts are and where images stand, is made once, and is never another shard's or tokenizer's."""

import errno
import json
import os
import pickle
import re
import shutil
import threading
import zlib

import numpy as np
import pytest

from himix_megatron.data.images import image_file
from himix_megatron.data.ingest.verify import verify_dataset
from himix_megatron.data.loading import token_counts
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset
from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import ByteTokenizer
from tests.support.data_fixtures import encoded, make, mixed, mixed_source, picture, row

from .test_preprocess import contents


@pytest.fixture
def dataset(tmp_path):
    return mixed(tmp_path, 24)


def files(dataset):
    return sorted((dataset.path / "lengths").rglob("*.text"))


@pytest.fixture
def marked(tmp_path):
    """Twenty samples in seven shards, no to three images each, before, in and behind what is asked and answered."""
    return make(tmp_path / "marked", *marked_source(tmp_path), samples_per_shard=3)


def marked_source(folder):
    images, annotations = folder / "pictures", folder / "marked.json"
    images.mkdir()
    (images / "0.png").write_bytes(encoded(picture(), "PNG"))
    texts = [
        ("What?", "That."),
        ("What<image>?", "This."),
        ("ü<image>", "<image>a"),
        ("<image>\n<image>a", "b", "c", "<image>d"),
    ]
    rows = [row(i, ["0.png"] * "".join(texts[i % 4]).count("<image>"), *texts[i % 4], marks=0) for i in range(20)]
    annotations.write_text(json.dumps(rows))
    return annotations, images


def as_version_1(path):
    """Leave in its place the file that there was before places were kept."""
    data = path.read_bytes()
    header = np.frombuffer(data, shard_format.LENGTHS_HEADER, count=1)[0]
    lengths = data[40 : 40 + 4 * int(header["num_samples"])]
    old = np.dtype([("magic", "S8"), ("version", "<u4"), ("num_samples", "<u4"), ("crc32", "<u4"), ("shard", "V16")])
    fields = (b"HIMIXLEN", 1, header["num_samples"], zlib.crc32(lengths), header["shard"])
    path.with_suffix(".len").write_bytes(np.array(fields, old).tobytes() + lengths)
    path.unlink()


def test_lengths_are_those_of_the_encoded_texts(dataset):
    found = token_counts.text_lengths(dataset, "bytes", "tiny")
    encoded = [chat_template.encode(dataset.text(i), ByteTokenizer(), "tiny", 10_000).ids for i in range(len(dataset))]
    assert found.tolist() == [len(ids) for ids in encoded]
    assert [file.name for file in files(dataset)] == ["rows-000000.text", "rows-000001.text", "rows-000002.text"]


def test_a_column_takes_four_bytes_a_sample_and_four_an_image(dataset):
    token_counts.text_lengths(dataset, "bytes", "tiny")
    sizes = [40 + 4 * (shard.num_samples + shard.num_images) for shard in dataset.manifest.shards]
    assert [file.stat().st_size for file in files(dataset)] == sizes


@pytest.mark.parametrize("template", ["tiny", "plain"])
def test_places_are_those_of_the_encoded_texts(marked, template):
    lengths = token_counts.text_lengths(marked, "bytes", template)
    places = token_counts.ImagePlaces(marked, "bytes", template)
    for i in np.random.default_rng(0).permutation(len(marked)).tolist():
        if lengths[i] == token_counts.UNUSABLE:
            assert places.of(i) == (0,) * marked.num_images(i) == (0, 0, 0)
        else:
            encoded_text = chat_template.encode(marked.text(i), ByteTokenizer(), template, 10_000)
            assert places.of(i) == tuple(encoded_text.image_places.tolist())
            assert len(places.of(i)) == marked.num_images(i)
    assert (lengths == token_counts.UNUSABLE).any() == (template == "plain")


def test_places_are_read_a_few_shards_at_a_time_and_go_to_workers_without_them(marked, monkeypatch):
    token_counts.text_lengths(marked, "bytes", "tiny")
    places = token_counts.ImagePlaces(marked, "bytes", "tiny")
    wanted = [places.of(i) for i in range(len(marked))]
    monkeypatch.setattr(token_counts, "MAX_OPEN_SHARDS", 2)
    few = token_counts.ImagePlaces(marked, "bytes", "tiny")
    unread = len(pickle.dumps(few))
    assert [few.of(i) for i in range(len(marked))] == wanted
    assert list(few._shards) == [5, 6]
    assert len(pickle.dumps(few)) == unread
    assert [pickle.loads(pickle.dumps(few)).of(i) for i in range(len(marked))] == wanted


def test_a_column_that_was_lost_since_is_named_in_one_line(marked):
    token_counts.text_lengths(marked, "bytes", "tiny")
    gone, damaged, *_ = files(marked)
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    places = token_counts.ImagePlaces(marked, "bytes", "tiny")
    for i, path, why in ((1, gone, "the file is gone"), (3, damaged, "its checksum does not match its content")):
        with pytest.raises(DamagedShardError, match=rf"^{re.escape(str(path))}: {why}: start the run again[^\n]*$"):
            places.of(i)


def test_columns_of_version_1_are_made_again_with_the_same_names(marked):
    wanted = token_counts.text_lengths(marked, "bytes", "tiny").tolist()
    whole = contents(marked.path)
    assert {path.parent.name for path in files(marked)} == {"9cad280f0367d66c"}  # as it was in version 1
    for path in files(marked)[:3]:
        as_version_1(path)
    assert verify_dataset(marked.path).findings == ()
    assert not whole.items() <= contents(marked.path).items()
    assert token_counts.text_lengths(ShardDataset(marked.path), "bytes", "tiny").tolist() == wanted
    assert whole.items() <= contents(marked.path).items()


def test_preprocessing_makes_columns_of_version_1_again_and_decodes_no_image(tmp_path, monkeypatch):
    source, options = marked_source(tmp_path), {"samples_per_shard": 3, "tokenizer": "bytes", "template": "tiny"}
    made = make(tmp_path / "shards", *source, **options)
    whole = contents(made.path)
    shards = {path: path.stat().st_mtime_ns for path in (made.path / "shards").iterdir()}
    for path in files(made):
        as_version_1(path)
    monkeypatch.setattr(image_file, "verify", None)
    make(made.path, *source, **options)
    assert whole.items() <= contents(made.path).items()
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_columns_of_version_1_in_a_folder_that_cannot_be_written_are_refused_with_the_command(marked, monkeypatch):
    token_counts.text_lengths(marked, "bytes", "tiny")
    as_version_1(files(marked)[0])

    def publish(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(token_counts, "publish", publish)
    command = r"preprocess with --tokenizer bytes --template tiny"
    with pytest.raises(ValueError, match=rf"no text lengths and places of images .*Read-only file system\): {command}"):
        token_counts.text_lengths(marked, "bytes", "tiny")


def test_images_without_marks_stand_before_the_text_and_a_warning_says_so(marked, monkeypatch, caplog):
    texts = token_counts._texts
    without = b'{"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]}'
    monkeypatch.setattr(token_counts, "_texts", lambda *of: ((without, key, count) for _, key, count in texts(*of)))
    token_counts.text_lengths(marked, "bytes", "tiny")
    places = token_counts.ImagePlaces(marked, "bytes", "tiny")
    assert [places.of(i) for i in range(len(marked))] == [(0,) * marked.num_images(i) for i in range(len(marked))]
    assert "marked-000000: 2 samples have another number of <image> marks than of images" in caplog.text


def test_columns_are_made_once_and_side_by_side(dataset):
    token_counts.text_lengths(dataset, "bytes", "tiny")
    made = {file: file.stat().st_mtime_ns for file in files(dataset)}
    token_counts.text_lengths(dataset, "bytes", "tiny")
    token_counts.text_lengths(dataset, "bytes", "plain")
    assert {file: file.stat().st_mtime_ns for file in files(dataset) if file in made} == made
    assert len(files(dataset)) == 2 * len(made)


def test_a_text_without_a_place_in_the_template_has_length_zero(tmp_path):
    annotations, images = mixed_source(tmp_path, 4)
    rows = [row(0, None), row(1, None, "One?", "1.", "Two?", "2."), row(2, None)]
    annotations.write_text(str(rows).replace("'", '"'))
    found = token_counts.text_lengths(make(tmp_path / "shards", annotations, images), "bytes", "plain")
    assert (found == token_counts.UNUSABLE).tolist() == [False, True, False]


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "empty", "of another shard"])
def test_a_column_that_cannot_be_trusted_is_made_again(dataset, damage):
    wanted = token_counts.text_lengths(dataset, "bytes", "tiny").tolist()
    first, second, _ = files(dataset)
    whole = first.read_bytes()
    flipped = bytes([*whole[:40], whole[40] ^ 1, *whole[41:]])
    broken = {"flipped bit": flipped, "truncated": whole[:-1], "empty": b"", "of another shard": second.read_bytes()}[damage]
    first.write_bytes(broken)
    assert token_counts.text_lengths(dataset, "bytes", "tiny").tolist() == wanted
    assert first.read_bytes() == whole


def test_a_shard_that_is_made_anew_gets_a_new_column(tmp_path):
    annotations, images = mixed_source(tmp_path, 4)
    folder = tmp_path / "shards"
    token_counts.text_lengths(make(folder, annotations, images), "bytes", "tiny")
    shutil.rmtree(folder / "receipts")
    annotations.write_text(str([row(i, None, "Longer?", "It is " + "x" * 50) for i in range(4)]).replace("'", '"'))
    assert (token_counts.text_lengths(make(folder, annotations, images), "bytes", "tiny") > 50).all()


def test_a_damaged_text_is_named_when_it_is_counted(dataset):
    tar = dataset.path / "shards" / "rows-000001.tar"
    data = bytearray(tar.read_bytes())
    data[dataset._sample(12)[1].offset + 5] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"text of rows-000001/000000012 does not match its checksum: run the preprocessing"):
        token_counts.text_lengths(dataset, "bytes", "tiny")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_cannot_be_written_says_how_to_go_on(dataset):
    dataset.path.chmod(0o555)
    with pytest.raises(ValueError, match=r"cannot be written there .*: preprocess with --tokenizer bytes --template tiny"):
        token_counts.text_lengths(dataset, "bytes", "tiny")


def test_many_at_once_count_once(dataset, monkeypatch):
    counted = []
    count = token_counts._count
    monkeypatch.setattr(token_counts, "_count", lambda *arguments: (counted.append(1), count(*arguments))[1])
    found = []
    opened = [ShardDataset(dataset.path) for _ in range(6)]
    threads = [threading.Thread(target=lambda d=d: found.append(token_counts.text_lengths(d, "bytes", "tiny"))) for d in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all((one == found[0]).all() for one in found)
    assert len(counted) == len(dataset)


def test_lengths_are_unsigned_and_whole(dataset):
    assert token_counts.text_lengths(dataset, "bytes", "tiny").dtype == np.uint32
    receipt = dataset.manifest.shards[0]
    column = token_counts.column_of(ByteTokenizer(), "tiny")
    assert (dataset.path / shard_format.lengths_file(column, receipt.name)).is_file()
