"""The length column says how long texts are, is made once, and is never taken from another shard or tokenizer."""

import os
import shutil
import threading

import numpy as np
import pytest

from himix_megatron.data.loading import token_counts
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import ByteTokenizer
from tests.support.data_fixtures import make, mixed, mixed_source, row


@pytest.fixture
def dataset(tmp_path):
    return mixed(tmp_path, 24)


def files(dataset):
    return sorted((dataset.path / "lengths").rglob("*.len"))


def test_lengths_are_those_of_the_encoded_texts(dataset):
    found = token_counts.text_lengths(dataset, "bytes", "tiny")
    encoded = [chat_template.encode(dataset.text(i), ByteTokenizer(), "tiny", 10_000).ids for i in range(len(dataset))]
    assert found.tolist() == [len(ids) for ids in encoded]
    assert [file.name for file in files(dataset)] == ["rows-000000.len", "rows-000001.len", "rows-000002.len"]


def test_a_column_takes_four_bytes_a_sample(dataset):
    token_counts.text_lengths(dataset, "bytes", "tiny")
    assert [file.stat().st_size for file in files(dataset)] == [36 + 4 * n for n in dataset.shard_sizes()]


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
    assert shard_format.lengths_path(dataset.path, column, receipt.name).is_file()
