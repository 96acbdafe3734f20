"""Every source gives the same samples for the same content, and the same bytes however it is run."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from himix_megatron.data.ingest.sources.base import SourceError, digest_id, find_repeated
from himix_megatron.data.ingest.sources.file_list import FilesSource
from himix_megatron.data.ingest.sources.llava import LlavaSource
from himix_megatron.data.ingest.sources.parquet import ParquetReader
from himix_megatron.data.ingest.sources.webdataset import TarReader
from himix_megatron.data.shards.reader import ShardDataset
from pipelines.launchers import task_engine
from pipelines.preprocess import Settings, preprocess
from tests.support import skip_if_fast
from tests.support.data_fixtures import encoded, make, mixed_source, picture, row

from .test_preprocess import contents

FORMS = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))


@pytest.fixture(scope="module")
def ray():
    skip_if_fast("Ray")
    with task_engine.ray_started(num_workers=2):
        yield


def make_from(folder: Path, source: str, *inputs: Path, **options) -> ShardDataset:
    """Preprocess any source but LLaVA's in this process."""
    options = {"engine": "local", "num_workers": 1, "samples_per_shard": 10, "name": "rows", **options}
    preprocess(Settings(source=source, input=inputs, out=folder, **options))
    return ShardDataset(folder)


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def captions(num_rows: int = 24) -> list[tuple[str, str, bytes]]:
    """(key, caption, image) of some rows, in three image formats."""
    return [(f"{i:05d}", f"Picture {i} – ok", encoded(picture(i), FORMS[i % 3][0])) for i in range(num_rows)]


def parquet_set(folder: Path) -> Path:
    """Captions in two files of small row groups, in Hugging Face's layout."""
    folder.mkdir()
    rows = [{"image": {"bytes": data, "path": f"{key}.x"}, "text": text, "key": key} for key, text, data in captions()]
    for number, part in enumerate((rows[:15], rows[15:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"part-{number}.parquet", row_group_size=4)
    return folder


def webdataset_set(folder: Path, form: int = tarfile.PAX_FORMAT) -> Path:
    """The same as two tars."""
    members = [
        member
        for key, text, data in captions()
        for member in ((f"{key}.{FORMS[int(key) % 3][1]}", data), (f"{key}.txt", text.encode()))
    ]
    write_tar(folder / "0.tar", members[:30], form)
    write_tar(folder / "1.tar", members[30:], form)
    return folder


def img2dataset_set(folder: Path, layout: str) -> Path:
    """The same as img2dataset leaves it, in each of its layouts; row 7 could not be downloaded."""
    folder.mkdir()
    facts = [{"caption": text, "key": key, "status": "success", "error_message": None} for key, text, _ in captions()]
    facts[7] |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
    images = [None if fact["status"] != "success" else data for fact, (_, _, data) in zip(facts, captions(), strict=True)]
    plain = [fact for fact, data in zip(facts, images, strict=True) if data]
    if layout == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{**f, "jpg": d} for f, d in zip(facts, images, strict=True)]), folder / "00000.parquet"
        )
        return folder
    pq.write_table(pa.Table.from_pylist(facts), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    members = [
        (f"{fact['key']}.{suffix}", data)
        for fact, image in zip(facts, images, strict=True)
        if image
        for suffix, data in (("jpg", image), ("json", json.dumps(fact).encode()), ("txt", fact["caption"].encode()))
    ]
    assert len(members) == 3 * len(plain)
    if layout == "webdataset":
        write_tar(folder / "00000.tar", members)
    else:
        (folder / "00000").mkdir()
        for name, data in members:
            (folder / "00000" / name).write_bytes(data)
    return folder


SOURCES = {
    "parquet": ("parquet", parquet_set),
    "webdataset": ("webdataset", webdataset_set),
    "gnu tar": ("webdataset", lambda folder: webdataset_set(folder, tarfile.GNU_FORMAT)),
    "img2dataset tar": ("img2dataset", lambda folder: img2dataset_set(folder, "webdataset")),
    "img2dataset parquet": ("img2dataset", lambda folder: img2dataset_set(folder, "parquet")),
    "img2dataset files": ("img2dataset", lambda folder: img2dataset_set(folder, "files")),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_samples_are_those_of_the_source(tmp_path, kind):
    source, write = SOURCES[kind]
    dataset = make_from(tmp_path / "out", source, write(tmp_path / "in"))
    wanted = [item for i, item in enumerate(captions()) if source != "img2dataset" or i != 7]
    found = []
    for i in range(len(dataset)):
        text = dataset.text(i)
        assert text["conversations"][0] == {"from": "human", "value": "<image>"}
        found.append((text["id"], text["conversations"][1]["value"], dataset.image_bytes(i, 0)))
    assert found == wanted
    assert dataset.manifest.quarantined == ({"download_failed": 1} if kind == "img2dataset parquet" else {})


@pytest.mark.parametrize("kind", SOURCES)
def test_a_shard_is_the_same_from_every_engine(tmp_path, kind, ray):
    source, write = SOURCES[kind]
    raw = write(tmp_path / "in")
    wanted = contents(make_from(tmp_path / "one", source, raw).path)
    make_from(tmp_path / "ray", source, raw, engine="ray", num_workers=2)
    assert contents(tmp_path / "ray") == wanted
    if kind in ("parquet", "webdataset"):
        make_from(tmp_path / "two", source, raw, num_workers=2)
        assert contents(tmp_path / "two") == wanted


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_rerun_of_any_source_makes_only_what_is_missing(tmp_path, kind):
    source, write = SOURCES[kind]
    raw = write(tmp_path / "in")
    folder = make_from(tmp_path / "out", source, raw).path
    wanted = contents(folder)
    kept = {path: path.stat().st_ino for path in folder.rglob("*.tar")}
    (folder / "receipts/rows-000001.json").unlink()
    (folder / "manifest.json").unlink()
    make_from(folder, source, raw)
    assert contents(folder) == wanted
    assert [path.stat().st_ino == inode for path, inode in sorted(kept.items())] == [True, False, True]


def test_another_content_of_a_source_is_another_source(tmp_path):
    raw = webdataset_set(tmp_path / "in")
    folder = make_from(tmp_path / "out", "webdataset", raw).path
    write_tar(raw / "1.tar", [("x.jpg", captions()[0][2]), ("x.txt", b"x")])
    with pytest.raises(ValueError, match="other --input files"):
        make_from(folder, "webdataset", raw)


def test_our_own_shards_can_be_cut_again(tmp_path):
    """With several images, text-only rows, ids and conversations as they were."""
    first = make(tmp_path / "first", *mixed_source(tmp_path))
    again = make_from(tmp_path / "again", "webdataset", first.path / "shards", samples_per_shard=7)
    assert len(again.manifest.shards) == 4
    for i in range(len(first)):
        assert again.text(i) == first.text(i)
        assert again.num_images(i) == first.num_images(i)
        for k in range(first.num_images(i)):
            assert again.image_bytes(i, k) == first.image_bytes(i, k)


def test_parquet_holds_conversations_as_structs_and_as_json_with_lists_of_images(tmp_path):
    images = [encoded(picture(i), "PNG") for i in range(2)]
    rows = [row(0, ["a", "b"]), row(1, None), row(2, "a")]
    columns = {
        "id": [5, 6, 6],
        "images": [images, [], images[:1]],
        "conversations": [item["conversations"] for item in rows],
    }
    pq.write_table(pa.table(columns), tmp_path / "structs.parquet")
    columns["conversations"] = [json.dumps(turns) for turns in columns["conversations"]]
    pq.write_table(pa.table(columns), tmp_path / "json.parquet")
    for name in ("structs", "json"):
        dataset = make_from(tmp_path / name, "parquet", tmp_path / f"{name}.parquet")
        assert [dataset.text(i)["id"] for i in range(3)] == [5, 6, "6@2"]
        assert [dataset.text(i)["conversations"] for i in range(3)] == [item["conversations"] for item in rows]
        assert [dataset.num_images(i) for i in range(3)] == [2, 0, 1]
        assert dataset.image_bytes(0, 1) == images[1]


def test_columns_of_other_names_are_given_by_flags_and_listed_in_errors(tmp_path):
    pq.write_table(pa.table({"pic": [encoded(picture(), "PNG")], "alt": ["A picture"], "n": [1]}), tmp_path / "a.parquet")
    dataset = make_from(
        tmp_path / "out", "parquet", tmp_path / "a.parquet", image_column="pic", text_column="alt", id_column="n"
    )
    assert dataset.text(0)["id"] == 1
    for flags, message in (
        ({}, "name its text with --text-column; it has the columns pic, alt, n"),
        ({"text_column": "alt"}, "name its images with --image-column; it has the columns pic, alt, n"),
        ({"text_column": "alt", "image_column": "jpg"}, "--image-column jpg: .* has the columns pic, alt, n"),
        ({"text_column": "n", "image_column": "pic"}, "--text-column n: .* it is int64, neither text nor turns"),
        ({"text_column": "alt", "image_column": "n"}, "--image-column n: .* it is int64, which holds no image bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            make_from(tmp_path / "other", "parquet", tmp_path / "a.parquet", **flags)


def test_ids_are_unique_or_made_so_by_row_number(tmp_path):
    rows = [row(i, None) for i in range(8)]
    ids = ["a", "a", None, 7, "7", "a@1", "2", "b"]
    for item, name in zip(rows, ids, strict=True):
        item["id"] = name
    del rows[2]["id"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = make(tmp_path / "out", tmp_path / "rows.json", tmp_path, samples_per_shard=3)
    found = [dataset.text(i)["id"] for i in range(8)]
    # row 5 spells what row 1 became; row 6 what stands in for row 2's missing id
    assert found == ["a", "a@1", "2", 7, "7@4", "a@1@5", "2@6", "b"]
    assert len(set(map(str, found))) == 8


def test_ids_never_collide_whatever_they_look_like():
    draw = np.random.default_rng(0)
    for _ in range(200):
        ids = [
            f"{'ab'[draw.integers(2)]}{''.join(f'@{draw.integers(12)}' for _ in range(draw.integers(3)))}" for _ in range(12)
        ]
        digests = [digest_id(name) for name in ids]
        repeated = find_repeated(
            np.array([digest.hash for digest in digests], np.uint64),
            np.array([digest.numbered for digest in digests], np.int64),
        )
        final = [f"{name}@{i}" if late else name for i, (name, late) in enumerate(zip(ids, repeated, strict=True))]
        assert len(set(final)) == 12, ids


def habit(name: str) -> tuple[dict, dict[str, bytes]]:
    """A row as mix665k has them, and its files."""
    base = picture(3, (40, 30))
    palette = picture(1, mode="RGBA").quantize(16)
    palette.info["transparency"] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a GIF called .jpg": encoded(base.quantize(16), "GIF"),
        "a PNG called .jpg": encoded(base, "PNG"),
        "CMYK": encoded(base.convert("CMYK"), "JPEG"),
        "palette with alpha": encoded(palette, "PNG", transparency=0),
        "EXIF rotation": encoded(base, "JPEG", exif=exif),
        "grey with alpha": encoded(picture(2, mode="LA"), "PNG"),
    }
    if name in files:
        return row(0, "x.jpg"), {"x.jpg": files[name]}
    jpeg = encoded(base, "JPEG")
    if name == "mark at the end":
        item = row(0, "x.jpg", "What is it?\n<image>", "A thing.", marks=0)
    elif name == "mark in the middle of a later turn":
        item = row(0, "x.jpg", "Hello.", "Hello.", "This <image> here?", "Yes.", marks=0)
    elif name == "several images":
        return row(0, ["x.jpg", "sub/y.jpg", "x.jpg"]), {"x.jpg": jpeg, "sub/y.jpg": jpeg}
    elif name == "text only, image is null":
        return {**row(0, None), "image": None, "model": ""}, {}
    else:
        assert name == "text only"
        return row(0, None), {}
    return item, {"x.jpg": jpeg}


HABITS = {
    "a GIF called .jpg": ("gif", (40, 30)),
    "a PNG called .jpg": ("png", (40, 30)),
    "CMYK": ("jpg", (40, 30)),
    "palette with alpha": ("png", (40, 30)),
    "EXIF rotation": ("jpg", (30, 40)),
    "grey with alpha": ("png", (40, 30)),
    "mark at the end": ("jpg", (40, 30)),
    "mark in the middle of a later turn": ("jpg", (40, 30)),
    "several images": ("jpg", (40, 30)),
    "text only, image is null": None,
    "text only": None,
}


@pytest.mark.parametrize("name", HABITS)
@pytest.mark.parametrize("check", ["decode", "header"])
def test_the_habits_of_real_sets_are_kept_as_they_are(tmp_path, name, check):
    item, files = habit(name)
    for file, data in files.items():
        (tmp_path / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / file).write_bytes(data)
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "rows.json").write_text(json.dumps([item]))
    dataset = make(tmp_path / "out", tmp_path / "rows.json", tmp_path / "images", max_bad_fraction=0.0, check=check)
    assert dataset.text(0)["conversations"] == item["conversations"]
    names = item.get("image") or []
    names = [names] if isinstance(names, str) else names
    assert [dataset.image_bytes(0, k) for k in range(dataset.num_images(0))] == [files[file] for file in names]
    with tarfile.open(next((dataset.path / "shards").glob("*.tar"))) as tar:
        suffixes = [member.split(".")[-1] for member in tar.getnames()[1:]]
    if HABITS[name]:
        assert suffixes == [HABITS[name][0]] * len(names)
        assert dataset.image_size(0, 0) == HABITS[name][1]


def test_a_header_check_finds_what_is_no_image_and_lets_damaged_ones_pass(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(encoded(picture(1, (200, 200)), "JPEG")[:-500])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "rows.json").write_text(json.dumps([row(0, "cut.jpg"), row(1, "text.jpg")]))
    arguments = (tmp_path / "rows.json", tmp_path)
    assert make(tmp_path / "a", *arguments, max_bad_fraction=1.0).manifest.quarantined == {
        "damaged_image": 1,
        "not_an_image": 1,
    }
    loose = make(tmp_path / "b", *arguments, max_bad_fraction=1.0, check="header")
    assert loose.manifest.quarantined == {"not_an_image": 1}
    with pytest.raises(ValueError, match="another --check"):
        make(loose.path, *arguments, max_bad_fraction=1.0)


def test_text_lengths_are_counted_in_the_same_pass_and_survive_a_rerun(tmp_path, ray):
    source = mixed_source(tmp_path)
    plain = contents(make(tmp_path / "plain", *source).path)
    counted = make(tmp_path / "counted", *source, tokenizer="bytes", template="tiny")
    with_ray = make(tmp_path / "ray", *source, tokenizer="bytes", template="tiny", engine="ray", num_workers=2)
    wanted = contents(counted.path)
    assert contents(with_ray.path) == wanted
    columns = [name for name in wanted if name.startswith("lengths")]
    assert len(columns) == 3
    assert {name: data for name, data in wanted.items() if name not in columns} == plain
    (counted.path / columns[0]).unlink()
    (counted.path / columns[1]).with_name(".rows.text.77").write_bytes(b"left by a killed worker")
    make(counted.path, *source, tokenizer="bytes", template="tiny")
    assert contents(counted.path) == wanted
    make(plain_path := tmp_path / "plain", *source, tokenizer="bytes", template="tiny")  # added later
    assert contents(plain_path) == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "parquet"}, "--input must be given: --source parquet reads --input"),
        ({"annotations": "a.json"}, "--images must be given"),
        ({"annotations": "a.json", "images": "i", "input": ("x",)}, "--input belongs to another source"),
        ({"source": "webdataset", "input": ("x",), "images": "i"}, "--images belongs to another source"),
        ({"source": "webdataset", "input": ("x",), "id_column": "i"}, "--id-column belongs to --source parquet"),
        ({"source": "webdataset", "input": ("pipe:cat /etc/passwd",)}, "--input pipe:cat /etc/passwd: `pipe:` is not read"),
        ({"source": "webdataset", "input": ("https://x/y.tar",)}, "`https:` is not read"),
        ({"source": "webdataset", "input": ("simplecache::s3://x/y.tar",)}, "`simplecache:` is not read"),
        ({"source": "webdataset", "input": ("file://host/y.tar",)}, "file:///PATH"),
        ({"annotations": "a.json", "images": "gs://b/i"}, "--images gs://b/i: `gs:` is not read"),
        ({"annotations": "a.json", "images": "i", "out": "ftp://x/y"}, "--out ftp://x/y: `ftp:` is not read"),
        ({"annotations": "a.json", "images": "i", "tokenizer": "bytes"}, "both --tokenizer and --template"),
        ({"annotations": "a.json", "images": "i", "tokenizer": "bytes", "template": "x"}, "--template is x: wanted one of"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"out": "o", **settings})


def test_missing_inputs_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, place, message in (
        ("webdataset", tmp_path / "gone", "gone: no such folder"),
        ("webdataset", tmp_path / "empty", r"empty: no \.tar files in it"),
        ("parquet", tmp_path / "gone.parquet", r"gone\.parquet: no such folder"),
        ("img2dataset", tmp_path / "empty", r"empty: no \.parquet files in it"),
    ):
        with pytest.raises(ValueError, match=message):
            make_from(tmp_path / "out", source, place)
    write_tar(tmp_path / "none.tar", [])
    with pytest.raises(ValueError, match=r"none\.tar: no rows in it"):
        make_from(tmp_path / "out", "webdataset", tmp_path / "none.tar")


def test_file_urls_are_local_places(tmp_path):
    raw = webdataset_set(tmp_path / "with space")
    make_from(f"file://{tmp_path}/out", "webdataset", f"file://{tmp_path}/with%20space")
    assert contents(tmp_path / "out") == contents(make_from(tmp_path / "plain", "webdataset", raw).path)


def test_every_cut_of_a_tar_is_an_error_that_names_it_and_counts_what_came_before(tmp_path):
    whole = write_tar(
        tmp_path / "x.tar", [(f"{i}.{kind}", bytes(700)) for i in range(4) for kind in ("jpg", "txt")]
    ).read_bytes()
    sample_bytes = 2 * (512 + 1024)
    end = 4 * sample_bytes + 512  # the end mark's first block says that nothing is missing
    for size in range(0, end, 512):
        (tmp_path / "x.tar").write_bytes(whole[:size])
        # of the last sample that is there, nobody knows whether it was to have more members
        count = max(0, -(-size // sample_bytes) - 1) if size else 0
        with pytest.raises(SourceError, match=r"x\.tar: it is cut.*, after \d whole samples$") as caught:
            TarReader().scan(str(tmp_path / "x.tar"))
        assert abs(int(str(caught.value).split()[-3]) - count) <= 1
    (tmp_path / "x.tar").write_bytes(whole[:end])
    assert TarReader().scan(str(tmp_path / "x.tar")).num_rows == 4


def test_every_flipped_bit_of_a_tar_header_is_an_error_or_still_the_same_samples(tmp_path):
    """A header's checksum covers all of it: nothing is lost or renamed in silence."""
    whole = write_tar(
        tmp_path / "x.tar", [(f"{i}.{kind}", bytes(700)) for i in range(2) for kind in ("jpg", "txt")]
    ).read_bytes()
    header = 3 * 512  # the second member's
    for bit in range(0, 512 * 8, 7):
        data = bytearray(whole)
        data[header + bit // 8] ^= 1 << bit % 8
        (tmp_path / "x.tar").write_bytes(data)
        try:
            scan = TarReader().scan(str(tmp_path / "x.tar"))
            said = ""
        except SourceError as error:
            said = str(error)
        assert "no tar header at byte 1536" in said if said else scan.offsets.tolist() == [0, 6 * 512]


def test_what_travels_to_a_task_is_a_reference(tmp_path):
    """A thousand rows of images travel as a few hundred bytes."""
    raw = {"parquet": parquet_set(tmp_path / "p") / "part-0.parquet", "webdataset": webdataset_set(tmp_path / "w") / "0.tar"}
    for reader, place in ((ParquetReader(), raw["parquet"]), (TarReader(), raw["webdataset"])):
        source = FilesSource(reader, [str(place)], [reader.scan(str(place))])
        assert len(pickle.dumps(source.part(0, source.num_rows))) < 1000 < place.stat().st_size / 3


def test_files_without_rows_and_shards_of_many_files_lose_nothing(tmp_path):
    counts, image = (0, 3, 0, 0, 1, 5, 0), captions(1)[0][2]
    keys = [[f"{number}-{i}" for i in range(count)] for number, count in enumerate(counts)]
    for number, some in enumerate(keys):
        members = [member for key in some for member in ((f"{key}.jpg", image), (f"{key}.txt", b"A picture."))]
        write_tar(tmp_path / "in" / f"{number}.tar", members)
    for size in (1, 2, 4, 9, 100):
        dataset = make_from(tmp_path / f"out-{size}", "webdataset", tmp_path / "in", samples_per_shard=size)
        assert [dataset.text(i)["id"] for i in range(len(dataset))] == [key for some in keys for key in some]


def test_a_file_that_was_made_huge_is_refused_before_it_is_read_through(tmp_path):
    """A terabyte of zeros takes no room on a disk, and half an hour to read."""
    tar = write_tar(tmp_path / "a.tar", [("0.json", b'{"caption": "a"}'), ("0.png", encoded(picture(), "PNG"))])
    parquet = next(parquet_set(tmp_path / "parquet").glob("*.parquet"))
    annotations, images = mixed_source(tmp_path / "llava", 3)
    for path in (tar, parquet, annotations):
        os.truncate(path, 1 << 40)
    with pytest.raises(SourceError, match=r"a\.tar: \d{13} bytes follow its end mark, more than programs fill up with"):
        TarReader().scan(str(tar))
    with pytest.raises(SourceError, match=r"parquet.*: "):
        ParquetReader().scan(str(parquet))
    with pytest.raises(SourceError, match="has 1099511627776 bytes: at most 4294967296 are read"):
        LlavaSource(str(annotations), str(images))
