"""Streams of anybody's tars: the same batches as from shards, nothing run, damage named; and said to be inexact."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shlex
import time
from collections import Counter

import pytest
import torch
import webdataset
from braceexpand import braceexpand

from himix_megatron.data.images.decode import decode
from himix_megatron.data.loading import webdataset_stream
from himix_megatron.data.loading.loader import ReadSpec
from himix_megatron.data.loading.plan import START, DataPosition, TrainingLength
from himix_megatron.data.loading.webdataset_stream import Stream, stream_steps
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.runtime.errors import RankError
from himix_megatron.training.data_setup import make_stream
from pipelines.cli import parse
from pipelines.preprocess import Settings, preprocess
from pipelines.pretrain import with_data
from tests.support import ROOT
from tests.support.data_fixtures import VISION, data_config, encoded, mixed, picture


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 samples in 3 tars."""
    return mixed(tmp_path_factory.mktemp("mixed")).path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """4 tars of 6 samples by webdataset's own writer (PAX headers), in every form that is read."""
    folder = tmp_path_factory.mktemp("foreign")
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"set-{shard}.tar")) as tar:
            for i in range(shard * 6, shard * 6 + 6):
                text = f"Caption {i}."
                turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": text}]
                tar.write(
                    {"__key__": f"sub/{i}"}
                    | (
                        {"json": {"id": i, "conversations": turns}, "jpg": encoded(picture(i), "JPEG")},
                        {"json": {"caption": text, "url": "x"}, "PNG": encoded(picture(i), "PNG")},
                        {"txt": text, "webp": encoded(picture(i), "WEBP")},
                        {
                            "json": {"text": text},
                            "1.jpeg": encoded(picture(i + 100), "JPEG"),
                            "0.gif": encoded(picture(i), "GIF"),
                        },
                        {"txt": text, "json": {"width": 3}, "bmp": encoded(picture(i), "BMP"), "pyd": {"never": "read"}},
                        {"txt": text},
                    )[i % 6]
                )
    return folder


def opened(*patterns, seed=1, global_batch=8, images_without=1, **data) -> Stream:
    config = data_config(webdataset_urls=tuple(map(str, patterns)), **{"num_workers": 0, **data})
    return Stream(config, seed=seed, global_batch=global_batch, images_without=images_without)


def batches(stream, num_steps=6, *, micro_batch=2, place=START, **reads):
    end = TrainingLength(num_steps, None)
    return list(
        stream_steps(stream, vision_config=VISION, micro_batch=micro_batch, reads=ReadSpec(**reads), end=end, place=place)
    )


def keys(steps) -> list[str]:
    return [key for batch in steps for micro_batch in batch.micro_batches for key in micro_batch.keys]


def answers(batch) -> list[str]:
    """What the labels spell, without the token that ends it."""
    return [bytes(row[row != -100].tolist()[:-1]).decode() for m in batch.micro_batches for row in m.labels]


def test_fifty_steps_from_our_shards_hold_the_shards_samples(shards):
    dataset = ShardDataset(shards)
    number = {dataset.key(i): i for i in range(len(dataset))}
    steps = batches(opened(shards / "shards" / "rows-00000{0..2}.tar"), 50)
    assert [batch.step for batch in steps] == list(range(50))
    seen = Counter(keys(steps))
    assert seen.keys() == number.keys()
    assert max(seen.values()) - min(seen.values()) <= 1
    for batch in steps[:4]:
        images = iter(zip(batch.pixels, batch.blank, strict=True))
        for key, answer in zip(keys([batch]), answers(batch), strict=True):
            i = number[key]
            assert answer == f"It is {i}."
            for k in range(dataset.num_images(i)):
                pixels, blank = next(images)
                assert not blank
                assert torch.equal(pixels, torch.from_numpy(decode(dataset.image_bytes(i, k), VISION, "fast")))
            if not dataset.num_images(i):
                assert next(images)[1]
        assert next(images, None) is None


def test_fifty_steps_from_foreign_tars(foreign):
    steps = batches(opened(foreign / "set-{0..3}.tar"), 50)
    assert steps[-1].is_last
    assert not any(batch.is_last for batch in steps[:-1])
    assert steps[-1].after == DataPosition(samples=400)
    assert set(keys(steps)) == {f"set-{i // 6}/sub/{i}" for i in range(24)}
    for batch in steps[:10]:
        assert answers(batch) == [f"Caption {key.rsplit('/', 1)[1]}." for key in keys([batch])]
        counts = [count for m in batch.micro_batches for count in m.images.per_sample]
        assert counts == [2 if int(key.rsplit("/", 1)[1]) % 6 == 3 else 1 for key in keys([batch])]
        assert int(batch.blank.sum()) == sum(int(key.rsplit("/", 1)[1]) % 6 == 5 for key in keys([batch]))
        assert not batch.bad_keys


def test_several_images_stand_by_number(foreign):
    batch = batches(opened(foreign / "set-0.tar", global_batch=6), 1, micro_batch=6)[0]
    assert keys([batch]) == [f"set-0/sub/{i}" for i in range(6)]
    for place, wanted in ((3, encoded(picture(3), "GIF")), (4, encoded(picture(103), "JPEG"))):
        assert torch.equal(batch.pixels[place], torch.from_numpy(decode(wanted, VISION, "fast")))


def test_a_stream_says_that_it_is_not_exact(foreign, caplog):
    stream_steps(
        opened(foreign / "set-0.tar"),
        vision_config=VISION,
        micro_batch=1,
        reads=ReadSpec(),
        end=TrainingLength(1, None),
        place=START,
    )
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "data.webdataset_urls is not exact" in caplog.text


def test_ranks_of_a_replica_read_the_same_stream_and_share_its_images(foreign):
    pattern = foreign / "set-{0..3}.tar"
    whole = batches(opened(pattern))
    parts = [batches(opened(pattern), image_rank=rank, image_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].pixels for part in parts]), batch.pixels)
        for part in parts:
            assert torch.equal(part[step].blank, batch.blank)
            for mine, other in zip(part[step].micro_batches, batch.micro_batches, strict=True):
                assert mine.keys == other.keys
                assert torch.equal(mine.text_ids, other.text_ids)
                assert torch.equal(mine.labels, other.labels)


def test_data_ranks_read_different_tars(foreign):
    pattern = foreign / "set-{0..3}.tar"
    for rank in range(2):
        steps = batches(opened(pattern), 6, data_rank=rank, data_size=2)
        assert all(len(m.keys) == 2 for batch in steps for m in batch.micro_batches)
        assert len(keys(steps)) == 24
        assert {int(key[4]) % 2 for key in keys(steps)} == {rank}


def test_workers_share_the_tars_and_deliver_steps_in_order(foreign):
    steps = batches(opened(foreign / "set-{0..3}.tar", num_workers=2, global_batch=6), 8)
    assert [batch.step for batch in steps] == list(range(8))
    for worker in range(2):
        assert {int(key[4]) % 2 for key in keys(steps[worker::2])} == {worker}
    assert set(Counter(keys(steps)).values()) == {2}


def test_passes_and_restarts_have_orders_of_their_own(foreign):
    stream = opened(foreign / "set-{0..3}.tar", global_batch=24)
    orders = [tuple(dict.fromkeys(key[:5] for key in keys([batch]))) for batch in batches(stream, 8)]
    assert len(set(orders)) > 3
    assert all(len(order) == 4 for order in orders)
    assert keys(batches(stream)) == keys(batches(stream))
    starts = {tuple(keys(batches(stream, 1, place=DataPosition(samples=n)))) for n in range(5)}
    assert len(starts) > 1


@pytest.mark.parametrize(
    "url", ["pipe:touch OUT", "pipe:cat x.tar | touch OUT", "http://host/x.tar", "https://host/x.tar", "gs://b/x", "hdfs:x"]
)
def test_other_schemes_are_refused_and_nothing_is_run(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"data\.webdataset_urls .* is not read; wanted a path, file:///PATH or s3://BUCKET/KEY"
    ):
        opened(url.replace("OUT", str(tmp_path / "made")))
    assert not any(tmp_path.iterdir())


def test_a_missing_tar_and_too_few_tars_are_one_line(foreign):
    with pytest.raises(ValueError, match=r"set-9\.tar: no such file"):
        opened(foreign / "set-{3,9}.tar")
    with pytest.raises(ValueError, match=r"names 1 tar for 2 data-parallel ranks: wanted one or more for each"):
        batches(opened(foreign / "set-0.tar"), data_size=2)
    with pytest.raises(ValueError, match=r"global batch \(8\) is not a multiple of 1 data-parallel ranks x 3"):
        batches(opened(foreign / "set-0.tar"), micro_batch=3)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_pickles_are_never_loaded(tmp_path, caplog):
    with webdataset.TarWriter(str(tmp_path / "bad.tar"), encoder=False) as tar:
        for i in range(6):
            bomb = pickle.dumps(Bomb(tmp_path / "made"))
            members = {"txt": b"Text.", "pyd": bomb, "pickle": bomb, "pth": bomb, "cls": b"3", "npy": bomb, "jpg": bomb}
            tar.write({"__key__": str(i), **members})
    steps = batches(opened(tmp_path / "bad.tar", global_batch=6), 2)
    assert not (tmp_path / "made").exists()
    assert len(steps[0].bad_keys) == 6  # a pickle under an image's name is no image
    counts = re.search(r"neither text nor images were not read: (.*)", caplog.text)[1]
    assert json.loads(counts.replace("'", '"')) == dict.fromkeys(("cls", "npy", "pickle", "pth", "pyd"), 6)


def test_links_and_devices_are_not_followed(foreign, tmp_path):
    import tarfile

    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "0.txt"), (tarfile.LNKTYPE, "1.txt"), (tarfile.CHRTYPE, "2.txt")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(member)
    with pytest.raises(RankError, match=r"no usable sample in 1 tars \(links\.tar"):
        batches(opened(tmp_path / "links.tar"))


def damaged(source, target, how: str) -> None:
    data = bytearray(source.read_bytes())
    if how == "half":
        del data[len(data) // 2 // 512 * 512 + 100 :]
    elif how == "at a header":
        del data[len(data) // 2 // 512 * 512 :]
    elif how == "without its end":
        del data[len(data.rstrip(b"\0")) // 512 * 512 + 512 :]
    elif how == "flipped header":
        place = data.find(b"sub/3", 3 * 512)
        data[place + 1] ^= 16
    else:
        data[:] = os.urandom(5000)
    target.write_bytes(data)


@pytest.mark.parametrize("how", ["half", "at a header", "without its end", "flipped header", "noise"])
def test_a_damaged_tar_is_named_and_the_others_go_on(foreign, tmp_path, caplog, how):
    damaged(foreign / "set-0.tar", tmp_path / "set-8.tar", how)
    steps = batches(opened(foreign / "set-1.tar", tmp_path / "set-8.tar"), 6)
    assert f"{tmp_path / 'set-8.tar'} is damaged after" in caplog.text
    assert "(damaged so far: 1)" in caplog.text
    assert {f"set-1/sub/{i}" for i in range(6, 12)} <= set(keys(steps))
    for batch in steps:
        assert answers(batch) == [f"Caption {key.rsplit('/', 1)[1]}." for key in keys([batch])]
    if how != "without its end":
        assert len(set(keys(steps))) < 12


def test_an_undamaged_tar_is_not_called_damaged(foreign, shards, caplog):
    batches(opened(foreign / "set-{0..3}.tar", shards / "shards" / "rows-00000{0..2}.tar"), 12)
    assert "is damaged" not in caplog.text.replace("where a tar is damaged", "")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_damaged_tars_are_an_error(foreign, tmp_path, num_workers):
    damaged(foreign / "set-0.tar", tmp_path / "x.tar", "noise")
    with pytest.raises(RankError, match=r"no usable sample in 1 tars \(x\.tar"):
        batches(opened(tmp_path / "x.tar", num_workers=num_workers))


def test_samples_without_use_are_left_out_up_to_the_tolerance(tmp_path, caplog):
    hostile = [
        {"jpg": b"no text"},
        {"json": b"[" * 100_000},
        {"json": b'{"conversations": 3}'},
        {"json": b"\xff\xfe"},
        {"txt": b"\xff"},
        {"json": b"[1]"},
        {"json": b'{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}'},
    ]
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as tar:
        for i, members in enumerate([{"txt": b"good"}, *hostile]):
            tar.write({"__key__": f"{i}", **members})
    steps = batches(opened(tmp_path / "x.tar", global_batch=2), 1)
    assert set(keys(steps)) == {"x/0"}
    for i in range(1, 8):
        assert f"x/{i} is left out: " in caplog.text
    with pytest.raises(
        RankError, match=r"11 of \d+ samples of data\.webdataset_urls are bad, more than data\.max_bad_fraction"
    ):
        batches(opened(tmp_path / "x.tar", global_batch=2), 6)


def test_a_sample_beyond_the_limits_is_left_out_and_its_neighbours_are_not(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(webdataset_stream, "MAX_SAMPLE_BYTES", 20_000)
    image = encoded(picture(), "JPEG")
    beyond = [
        {"txt": b"x" * ((4 << 20) + 1)},
        {"txt": b"Large.", "0.bmp": bytes(15_000), "1.bmp": bytes(15_000)},
        {"txt": b"Many.", **{f"{n}.bmp": b"" for n in range(257)}},
    ]
    with webdataset.TarWriter(str(tmp_path / "x.tar"), encoder=False) as tar:
        for i, members in enumerate([{"txt": b"good", "jpg": image}, *beyond]):
            tar.write({"__key__": f"{i}", **members})
            tar.write({"__key__": f"{i}.9{'9' * 5000}", "jpg": image})  # KEY.99...9.jpg is an image of no sample
            tar.write({"__key__": f"good{i}", "txt": b"good", "jpg": image})
    steps = batches(opened(tmp_path / "x.tar", global_batch=5), 1, micro_batch=5)
    assert set(keys(steps)) == {"x/0", *(f"x/good{i}" for i in range(4))}
    for i, reason in enumerate(("oversized_text", "oversized_image", "too_many_images"), 1):
        assert f"x/{i} is left out: {reason}" in caplog.text
    assert "is damaged after" not in caplog.text


def test_a_stream_reads_the_conversations_that_preprocessing_does(tmp_path):
    """Where a row says two things, one rule says which counts."""
    image, turns = encoded(picture(), "JPEG"), [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    rows = [
        {"txt": b"Of the text.", "json": {"caption": "Of the JSON."}},
        {"json": {"caption": "", "text": "Text."}},
        {"txt": b"Of the text.", "json": {"conversations": turns}},
    ]
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as tar:
        for i, members in enumerate(rows):
            tar.write({"__key__": f"{i}", "jpg": image, **members})
    preprocess(Settings(source="webdataset", input=(tmp_path / "x.tar",), out=tmp_path / "out", engine="local", num_workers=1))
    dataset = ShardDataset(tmp_path / "out")
    wanted = [dataset.text(i)["conversations"][-1]["value"] for i in range(len(dataset))]
    (batch,) = batches(opened(tmp_path / "x.tar", global_batch=3), 1, micro_batch=3)
    assert answers(batch) == wanted == ["Of the text.", "Text.", "It."]


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "{0..999999999}.tar",
            "{a,b}" * 40,
            "{0..9999}/{0..9999}.tar",
            "{" * 3000 + "}" * 3000,
            "{a,b,{0..99999}{0..99999}}",
            "{a..z}" * 8,
        ),
        *("{0.." + "9" * 5000 + "}", "{" * 21 + "a,b" + "}" * 21, "\\{{0..1000001}.tar", "{a,b,\\{c}" * 40),
    ],
)
def test_braces_that_stand_for_too_many_names_are_refused_at_once(pattern):
    began = time.monotonic()
    with pytest.raises(
        ValueError, match=r"^data\.webdataset_urls .*: more than 1000000 names, or braces too deep in each other"
    ):
        opened(pattern)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "pattern",
    ["x.tar", "{0..9}", "{9..-3}.tar", "{a..e}{x,y}", "{a,b{0..2},{c,d}e}", "{one}", "{,x}{000..099}", "s{1,2}/{{a,b},c}"],
)
def test_names_are_counted_as_they_are_made(pattern, monkeypatch):
    names = list(braceexpand(pattern))
    monkeypatch.setattr(webdataset_stream, "MAX_TARS", len(names))
    assert list(webdataset_stream._names(pattern)) == names
    monkeypatch.setattr(webdataset_stream, "MAX_TARS", len(names) - 1)
    with pytest.raises(ValueError, match="names"):
        webdataset_stream._names(pattern)


def test_the_documented_command_streams(foreign, tmp_path, monkeypatch):
    """As it stands in docs/data.md: nothing is rendered, and its tars are what is read."""
    text = (ROOT / "docs" / "data.md").read_text().replace("\\\n", "")
    (line,) = (line for line in text.splitlines() if "--data.webdataset-urls" in line)
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "pipelines.pretrain"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tars").mkdir()
    for number in range(100):
        (tmp_path / "tars" / f"part-{number:03d}.tar").symlink_to(foreign / f"set-{number % 4}.tar")
    config = with_data(parse(words[3:]))
    assert [path.name for path in tmp_path.iterdir()] == ["tars"]
    steps = batches(make_stream(config, 1), 1, micro_batch=config.micro_batch)
    assert len(keys(steps)) == config.global_batch


def test_long_texts_are_cut_or_dropped(foreign):
    pattern = foreign / "set-0.tar"
    assert batches(opened(pattern, max_text_tokens=10), 1)[0].num_cut == 8
    with pytest.raises(RankError, match=r"no usable sample|more than data\.max_bad_fraction"):
        batches(opened(pattern, max_text_tokens=10, overlong="drop"), 1)


def test_a_stream_from_s3_is_the_local_one(foreign, s3_client):
    for shard in range(2):
        s3_client.upload_file(str(foreign / f"set-{shard}.tar"), "bucket", f"sets/set-{shard}.tar")
    remote, local = batches(opened("s3://bucket/sets/set-{0..1}.tar")), batches(opened(foreign / "set-{0..1}.tar"))
    assert keys(remote) == keys(local)
    assert all(torch.equal(mine.pixels, other.pixels) for mine, other in zip(remote, local, strict=True))


def test_what_must_stay_is_named(foreign):
    one, other = opened(foreign / "set-0.tar").fingerprint_fields(), opened(foreign / "set-1.tar").fingerprint_fields()
    assert [name for name in one if one[name] != other[name]] == ["data.webdataset_urls"]
    assert json.dumps(one)


def test_reading_leaves_the_random_state_alone(foreign):
    torch.manual_seed(3)
    wanted = torch.get_rng_state()
    for workers in (0, 1):
        for _ in itertools.islice(batches(opened(foreign / "set-0.tar", num_workers=workers), 2), 1):
            assert torch.equal(torch.get_rng_state(), wanted)
