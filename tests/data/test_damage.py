"""Hundreds of ways to damage a dataset: each is named with its shard and samples, and none is read as if it were whole.

A damage is the files it changes, as {path in the folder: content, or None for no file}. The dataset has 3 small shards; two of
them are of the same size to the byte, so that a swap cannot be told by sizes.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from itertools import permutations

import numpy as np
import pytest

from himix_megatron.data import schema
from himix_megatron.data.lengths import make_column
from himix_megatron.data.schema import BadSampleError
from himix_megatron.data.shards import DamagedShardError, ShardDataset
from himix_megatron.data.verify import verify_dataset

from .sets import encoded, make, picture, row

SHARDS = ["set-000000", "set-000001", "set-000002"]
MANIFEST = "manifest.json"


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


def tar_of(shard):
    return f"shards/{shard}.tar"


def index_of(shard):
    return f"shards/{shard}.idx"


def receipt_of(shard):
    return f"receipts/{shard}.json"


def lengths_of(whole, shard):
    return next(path for path in whole if path.endswith(f"{shard}.len"))


def flipped(data, place, bit):
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def members_of(folder, shard):
    with tarfile.open(folder / tar_of(shard)) as tar:
        return [(member.name, member.offset, tar.extractfile(member).read()) for member in tar]


def packed(members):
    """A tar of (name, content)."""
    blocks = [schema.tar_header(name, len(data)) + data + schema.padding(len(data)) for name, data in members]
    return b"".join(blocks) + schema.TAR_END


# Each kind yields (files, names that must be reported, whether reading must notice).


def truncations(folder, whole):
    """At every block, and inside of some."""
    for shard in SHARDS:
        data = whole[tar_of(shard)]
        for length in [*range(0, len(data), 512), *range(100, len(data), 2048)]:
            yield {tar_of(shard): data[:length]}, {shard}, True
        for length in range(0, len(whole[index_of(shard)]), 32):
            yield {index_of(shard): whole[index_of(shard)][:length]}, {shard}, True


def flips_in_headers(folder, whole):
    """Name, mode, size, time, checksum, type, magic, prefix. A reader by index does not look at headers."""
    for shard in SHARDS:
        for number, (_, offset, _) in enumerate(members_of(folder, shard)):
            for place in (0, 9, 101, 133, 146, 150, 156, 258, 346):
                yield {tar_of(shard): flipped(whole[tar_of(shard)], offset + place, number % 8)}, {shard}, False


def flips_in_contents(folder, whole):
    for shard in SHARDS:
        for number, (_, offset, data) in enumerate(members_of(folder, shard)):
            for place in (0, len(data) // 3, len(data) - 1):
                yield {tar_of(shard): flipped(whole[tar_of(shard)], offset + 512 + place, number % 8)}, {shard}, True


def flips_behind_contents(folder, whole):
    for shard in SHARDS:
        data = whole[tar_of(shard)]
        for _, offset, content in members_of(folder, shard):
            if len(content) % 512:
                yield {tar_of(shard): flipped(data, offset + 512 + len(content), 3)}, {shard}, False
        for place in (-1, -512, -1024):
            yield {tar_of(shard): flipped(data, len(data) + place, 0)}, {shard}, False


def flips_in_indexes(folder, whole):
    for shard in SHARDS:
        data = whole[index_of(shard)]
        for place in range(0, len(data), 7):
            yield {index_of(shard): flipped(data, place, place % 8)}, {shard}, True


def flips_in_receipts(folder, whole):
    for shard in SHARDS:
        data = whole[receipt_of(shard)]
        for place in range(0, len(data), 31):
            yield {receipt_of(shard): flipped(data, place, place % 8)}, {shard}, False


def damage_to_lengths(folder, whole):
    """The column of text lengths: a run that finds such a one makes it again."""
    for shard, other in zip(SHARDS, SHARDS[1:] + SHARDS[:1], strict=True):
        path = lengths_of(whole, shard)
        for place in range(0, len(whole[path]), 5):
            yield {path: flipped(whole[path], place, place % 8)}, {shard}, False
        for length in range(0, len(whole[path]), 8):
            yield {path: whole[path][:length]}, {shard}, False
        yield {path: whole[lengths_of(whole, other)]}, {shard}, False


def flips_in_the_manifest(folder, whole):
    data = whole[MANIFEST]
    for place in range(0, len(data), 61):
        yield {MANIFEST: flipped(data, place, place % 8)}, {MANIFEST}, True


def zeroed_blocks(folder, whole):
    for shard in SHARDS:
        data = whole[tar_of(shard)]
        headers = {offset for _, offset, _ in members_of(folder, shard)}
        for start in range(0, len(data) - 1024, 512):
            yield {tar_of(shard): data[:start] + bytes(512) + data[start + 512 :]}, {shard}, start not in headers


def appended_bytes(folder, whole):
    for shard in SHARDS:
        for part in (tar_of(shard), index_of(shard), receipt_of(shard)):
            for more in (b"\0", b"\n", bytes(512), whole[part]):
                yield {part: whole[part] + more}, {shard}, part != receipt_of(shard)


def missing_files(folder, whole):
    for shard in SHARDS:
        parts = [tar_of(shard), index_of(shard), receipt_of(shard)]
        for part in parts:
            yield {part: None}, {shard}, part != receipt_of(shard)
        yield dict.fromkeys(parts), {shard}, True
    yield {f"quarantine/{SHARDS[2]}.jsonl": None}, {SHARDS[2]}, False
    yield {f"quarantine/{SHARDS[2]}.jsonl": b""}, {SHARDS[2]}, False
    yield {MANIFEST: None}, {MANIFEST}, True


def swapped_files(folder, whole):
    """Each file of a shard, and all of them, for those of each other shard; one way and both ways."""
    for one, other in permutations(SHARDS, 2):
        ways = [[tar_of], [index_of], [receipt_of], [tar_of, index_of], [tar_of, index_of, receipt_of]]
        for parts in ways:
            there = {part(one): whole[part(other)] for part in parts}
            back = {part(other): whole[part(one)] for part in parts}
            yield there, {one}, parts != [receipt_of]
            if one < other:
                yield there | back, {one, other}, parts != [receipt_of]


def lost_members(folder, whole):
    for shard in SHARDS:
        members = [(name, data) for name, _, data in members_of(folder, shard)]
        for n in range(len(members)):
            yield {tar_of(shard): packed(members[:n] + members[n + 1 :])}, {shard}, True


def swapped_members(folder, whole):
    """Whole members with their neighbours; contents under each other's headers."""
    for shard in SHARDS:
        members = [(name, data) for name, _, data in members_of(folder, shard)]
        for n in range(len(members) - 1):
            (first, data), (second, others) = members[n : n + 2]
            rest = members[n + 2 :]
            yield {tar_of(shard): packed([*members[:n], (second, others), (first, data), *rest])}, {shard}, data != others
            if data != others:
                yield {tar_of(shard): packed([*members[:n], (first, others), (second, data), *rest])}, {shard}, True


def added_members(folder, whole):
    """A second copy, a stranger and a member of another name, at every place."""
    for shard in SHARDS:
        members = [(name, data) for name, _, data in members_of(folder, shard)]
        for n, (name, data) in enumerate(members):
            yield {tar_of(shard): packed([*members[:n], members[n], *members[n:]])}, {shard}, True
            yield {tar_of(shard): packed([*members[:n], ("000000099.json", b"{}"), *members[n:]])}, {shard}, True
            yield {tar_of(shard): packed([*members[:n], ("../" + name, data), *members[n + 1 :]])}, {shard}, False


def extra_files(folder, whole):
    yield {"shards/set-000003.tar": whole[tar_of(SHARDS[0])]}, {"shards/set-000003.tar"}, False
    yield {"shards/set-000003.idx": whole[index_of(SHARDS[0])]}, {"shards/set-000003.idx"}, False
    yield {"receipts/set-000003.json": whole[receipt_of(SHARDS[0])]}, {"receipts/set-000003.json"}, False
    yield {f"quarantine/{SHARDS[0]}.jsonl": b'{"row": 0}\n'}, {SHARDS[0]}, False
    yield {"shards/notes.txt": b"mine"}, {"shards/notes.txt"}, False


KINDS = [
    *(truncations, flips_in_headers, flips_in_contents, flips_behind_contents, flips_in_indexes, flips_in_receipts),
    damage_to_lengths,
    *(flips_in_the_manifest, zeroed_blocks, appended_bytes, missing_files, swapped_files, lost_members, swapped_members),
    *(added_members, extra_files),
]


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


def test_several_processes_find_the_same_and_say_it_in_order(folder, whole, tmp_path):
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
