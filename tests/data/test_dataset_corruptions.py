"""Hundreds of ways to damage a dataset: each is named with its shard and samples, and none is read as if it were whole.

The dataset has 3 small shards; two of them are of the same size to the byte, so that a swap cannot be told by sizes.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.ingest.verify import verify_dataset
from himix_megatron.data.loading.token_counts import make_column
from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset
from tests.support.data_fixtures import encoded, make, picture, row
from tools.inspect_shards.statistics import statistics

from .dataset_corruptions import (
    KINDS,
    MANIFEST,
    SHARDS,
    extra_files,
    flipped,
    flips_in_receipts,
    flips_in_the_manifest,
    index_of,
    members_of,
    missing_files,
    packed,
    receipt_of,
    swapped_files,
    tar_of,
)
from .test_sources import img2dataset_set, make_from, parquet_set, webdataset_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Bitmaps of one size in two shards, JPEGs and a bad row in the third, 4 rows each."""
    source = tmp_path_factory.mktemp("damage")
    images = source / "images"
    images.mkdir()
    rows = []
    for i in range(12):
        name = f"{i}.bmp" if i < 8 else f"{i}.jpg"
        (images / name).write_bytes(encoded(picture(i, (6, 5)), "BMP" if i < 8 else "JPEG"))
        rows.append(
            row(i, None if i % 4 == 1 else [name, name] if i % 4 == 2 else name, f"What is {i:02d}?", f"It is {i:02d}.")
        )
        rows[-1]["id"] = f"{i:02d}"
    (images / "11.jpg").write_bytes(b"no image")
    (source / "set.json").write_text(json.dumps(rows))
    dataset = make(source / "out", source / "set.json", images, samples_per_shard=4)
    for shard in dataset.manifest.shards:
        assert make_column(dataset.path, shard, "bytes", "tiny")
    return dataset.path


@pytest.fixture(scope="module")
def whole(folder):
    """The dataset's files by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def samples(folder):
    """What is really in it: texts and images of every sample."""
    dataset = ShardDataset(folder)
    return [sample_of(dataset, i) for i in range(len(dataset))]


def sample_of(dataset, i):
    return dataset.text(i), [dataset.image_bytes(i, k) for k in range(dataset.num_images(i))]


def put(folder, files):
    for path, content in files.items():
        if content is None:
            (folder / path).unlink(missing_ok=True)
        else:
            (folder / path).write_bytes(content)


def check_named(error):
    assert any(name in str(error) for name in (*SHARDS, MANIFEST))


def read_all(folder, samples):
    """Every sample that can be read is the original one. Returns: whether all could be."""
    try:
        dataset = ShardDataset(folder)
    except ValueError as error:
        check_named(error)
        return False
    all_read = True
    assert len(dataset) == len(samples)
    for i, wanted in enumerate(samples):
        try:
            assert sample_of(dataset, i) == wanted
        except (BadSampleError, DamagedShardError) as error:
            check_named(error)
            all_read = False
    return all_read


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_never_read_as_whole(kind, folder, whole, samples):
    at_stake = {SHARDS[0]: 4, SHARDS[1]: 4, SHARDS[2]: 3, MANIFEST: 11}
    for number, (files, names, noticed) in enumerate(kind(folder, whole)):
        assert any(whole.get(path) != content for path, content in files.items())
        put(folder, files)
        try:
            found = {finding.name: finding.num_samples for finding in verify_dataset(folder).findings}
            assert found == {name: at_stake.get(name, 0) for name in names}, (number, sorted(files))
            assert read_all(folder, samples) != noticed, (number, sorted(files))
            num_damages = number + 1
        finally:
            put(folder, {path: whole.get(path) for path in files})
    print(f"{kind.__name__}: {num_damages} damages")


def test_there_are_at_least_400_damages_and_the_whole_set_has_none(folder, whole, samples):
    assert sum(1 for kind in KINDS for _ in kind(folder, whole)) >= 400
    report = verify_dataset(folder)
    assert (report.findings, report.foreign) == ((), ())
    assert (report.num_shards, report.num_samples, report.num_images) == (3, 11, 11)
    assert read_all(folder, samples)
    assert len(whole[tar_of(SHARDS[0])]) == len(whole[tar_of(SHARDS[1])])
    assert len(whole[index_of(SHARDS[0])]) == len(whole[index_of(SHARDS[1])])


def test_several_processes_find_the_same_and_say_it_in_order(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("himix_megatron.data.ingest.verify.FEW_BYTES", 0)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    put(copy, {tar_of(SHARDS[2]): flipped(whole[tar_of(SHARDS[2])], 600, 1), index_of(SHARDS[0]): b"", "shards/x.tar": b""})
    seen = []
    report = verify_dataset(copy, num_workers=2, progress=lambda done, total: seen.append((done, total)))
    assert report == verify_dataset(copy)
    assert [finding.name for finding in report.findings] == [SHARDS[0], SHARDS[2], "shards/x.tar"]
    assert len(seen) == 3
    assert seen == sorted(seen)
    assert seen[-1] == (report.num_bytes, report.num_bytes)


def problems_of(copy, files):
    put(copy, files)
    (finding,) = verify_dataset(copy).findings
    return str(finding)


def test_a_finding_says_what_is_wrong_in_one_line(folder, whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tar, data = tar_of(SHARDS[0]), whole[tar_of(SHARDS[0])]
    members = [(name, content) for name, _, content in members_of(folder, SHARDS[0])]
    assert problems_of(copy, {tar: packed(members[:2] + members[1:])}).startswith(
        "set-000000: 4 samples at stake: set-000000.tar is damaged; 1 members twice, the first 000000000.0; 3 of its samples "
    )
    assert "1 members without a header, the first 000000001.json" in problems_of(copy, {tar: packed(members[:2] + members[3:])})
    assert "1 extra members, the first 000000009.json" in problems_of(
        copy, {tar: packed([*members, ("000000009.json", b"{}")])}
    )
    assert "its members are not in the index's order" in problems_of(copy, {tar: packed([*members[2:], *members[:2]])})
    assert "a damaged header at byte 0" in problems_of(copy, {tar: flipped(data, 3, 0)})
    assert "1 of its samples do not match their checksums, the first 000000000" in problems_of(
        copy, {tar: flipped(data, 515, 0)}
    )
    assert "no end at byte" in problems_of(copy, {tar: data[:-512]})
    other = problems_of(copy, {tar: data, index_of(SHARDS[0]): whole[index_of(SHARDS[1])]})
    assert other == "set-000000: 4 samples at stake: set-000000.idx is damaged"


def test_files_of_others_are_named_and_do_no_harm(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    put(copy, {"README.md": b"ours", f"shards/{SHARDS[0]}.tar.idx": b"energon's"})
    for beside in (".nv-meta", "lengths", ".partial-x"):
        (copy / beside).mkdir(exist_ok=True)
        (copy / beside / "file").write_bytes(b"")
    report = verify_dataset(copy)
    assert (report.findings, report.foreign) == ((), (".partial-x/file", "README.md"))


def test_a_receipt_that_cannot_be_read_is_named_even_without_a_manifest(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    put(copy, {MANIFEST: None, receipt_of(SHARDS[1]): b"{}"})
    found = {finding.name: finding.num_samples for finding in verify_dataset(copy).findings}
    assert found[MANIFEST] == 7
    assert found[SHARDS[1]] == 0


def test_a_webdataset_that_is_not_ours_is_told_apart(folder, tmp_path):
    shutil.copytree(folder / "shards", tmp_path / "shards")
    with pytest.raises(
        ValueError, match=r"not a dataset of pipelines\.preprocess \(no manifest\.json, no receipts; 3 tar files"
    ):
        verify_dataset(tmp_path)


def test_datasets_of_every_source_are_whole_and_have_nothing_foreign(tmp_path):
    sets = {
        "parquet": parquet_set(tmp_path / "a"),
        "webdataset": webdataset_set(tmp_path / "b"),
        "img2dataset": img2dataset_set(tmp_path / "c", "webdataset"),
    }
    for source, given in sets.items():
        for _ in range(2):  # made, and looked at by a second run
            made = make_from(tmp_path / source, source, given, tokenizer="bytes", template="tiny")
        report = verify_dataset(made.path)
        assert (report.findings, report.foreign, report.num_shards) == ((), (), 3)
        assert list(statistics(made, 100).text_tokens) == [path.name for path in (made.path / "lengths").iterdir()]


def inspect(*words):
    return subprocess.run([sys.executable, "-m", "tools.inspect_shards", *words], capture_output=True, text=True, check=False)


def test_the_command_exits_0_1_or_2(folder, whole, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    done = inspect(str(copy), "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 shards, 11 samples, 11 images" in done.stdout
    put(copy, {tar_of(SHARDS[1]): flipped(whole[tar_of(SHARDS[1])], 700, 1), receipt_of(SHARDS[2]): None})
    done = inspect(str(copy), "--verify")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [SHARDS[1], SHARDS[2]]
    assert "2 of 3 shards are damaged, 7 of 11 samples at stake" in lines[2]
    done = inspect(str(tmp_path), "--verify")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


REPAIRED = {swapped_files: 1, missing_files: 1, flips_in_receipts: 2, flips_in_the_manifest: 9}
"""Every how manyth damage of a kind is repaired; of the others, every 40th."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not extra_files])
def test_running_the_preprocessing_again_repairs_what_is_damaged(kind, folder, whole):
    num_refused = 0
    damages = list(kind(folder, whole))[:: REPAIRED.get(kind, 40)]
    for files, _, _ in damages:
        put(folder, files)
        try:
            make(
                folder,
                folder.parent / "set.json",
                folder.parent / "images",
                samples_per_shard=4,
                tokenizer="bytes",
                template="tiny",
            )
            repaired = {path: (folder / path).read_bytes() for path in whole}
            assert repaired == whole, sorted(files)
        except ValueError as error:  # a flip in a hash of the source or the settings looks like another dataset's receipt
            assert kind is flips_in_receipts and "holds shards made" in str(error)  # noqa: PT017, PT018
            num_refused += 1
        finally:
            put(folder, {path: whole.get(path) for path in files})
    assert num_refused < len(damages) / 2


def test_random_bytes_anywhere_are_found(folder, whole, samples):
    random = np.random.default_rng(5)
    paths = [path for path in whole if path != ".lock"]
    for _ in range(60):
        path = paths[random.integers(len(paths))]
        data = bytearray(whole[path])
        for place in random.integers(0, len(data), 3):
            data[place] ^= int(random.integers(1, 256))
        if bytes(data) == whole[path]:
            continue
        put(folder, {path: bytes(data)})
        try:
            assert verify_dataset(folder).findings
            read_all(folder, samples)
        finally:
            put(folder, {path: whole[path]})
