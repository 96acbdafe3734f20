"""Preprocessing from and to S3, against moto's server on this machine: the same bytes as on disk."""

import dataclasses
import json
from pathlib import Path

import pytest

from himix_megatron.data.images import image_file
from himix_megatron.data.loading.loader import ReadSpec, StepReader
from himix_megatron.data.loading.plan import Datasets, SamplingPlan, TrainingLength
from himix_megatron.data.loading.token_counts import ImagePlaces, text_lengths
from himix_megatron.data.shards.reader import ShardDataset
from pipelines.launchers import task_engine
from pipelines.preprocess import Settings, preprocess
from tests.support.data_fixtures import VISION, data_config, make, mixed_source

from .test_preprocess import command, contents
from .test_sources import img2dataset_set, make_from, parquet_set, webdataset_set
from .test_token_counts import as_version_1


def upload(store, folder: Path, place: str) -> str:
    store.put(f"{folder}/", place, recursive=True)
    return f"s3://{place}"


def stored(store, place: str) -> dict[str, bytes]:
    """Every object below a prefix."""
    return {path.removeprefix(f"{place}/"): store.cat_file(path) for path in store.find(place)}


def local(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name != ".lock"}


def test_llava_rows_are_read_from_s3_and_written_there(tmp_path, s3):
    annotations, images = mixed_source(tmp_path / "raw")
    rows = json.loads(annotations.read_text())
    rows[5]["image"], rows[7]["image"], rows[8]["image"] = "gone.png", "../../etc/passwd", "."
    annotations.write_text(json.dumps(rows))
    (images / rows[0]["image"]).write_bytes(b"")
    wanted = local(make(tmp_path / "here", annotations, images, max_bad_fraction=1.0).path)
    raw = upload(s3, tmp_path / "raw", "bucket/raw")
    options = {"engine": "local", "num_workers": 1, "samples_per_shard": 10, "max_bad_fraction": 1.0}
    settings = Settings(annotations=f"{raw}/rows.json", images=f"{raw}/images", out="s3://bucket/out", **options)
    manifest = preprocess(settings)
    assert stored(s3, "bucket/out") == wanted
    assert manifest.quarantined == {"missing_image": 1, "not_an_image": 5, "unsafe_name": 2}


@pytest.mark.parametrize(
    ("source", "write"),
    [
        ("parquet", parquet_set),
        ("webdataset", webdataset_set),
        ("img2dataset", lambda folder: img2dataset_set(folder, "webdataset")),
        ("img2dataset", lambda folder: img2dataset_set(folder, "files")),
    ],
    ids=["parquet", "webdataset", "img2dataset tar", "img2dataset files"],
)
def test_large_files_are_read_from_s3_in_pieces(tmp_path, s3, source, write, request):
    write(tmp_path / "in")
    here = make_from(tmp_path / "here", source, tmp_path / "in")
    place = upload(s3, tmp_path / "in", f"bucket/{request.node.callspec.id.replace(' ', '-')}")
    there = make_from(tmp_path / "there", source, place)
    # snapshots on S3 are named by their ETag, so receipts differ; what was read does not
    assert {shard.tar for shard in there.manifest.shards} == {shard.tar for shard in here.manifest.shards}


def test_a_rerun_on_s3_makes_only_what_is_missing_or_damaged(tmp_path, s3):
    annotations, images = mixed_source(tmp_path)
    settings = Settings(
        annotations=annotations, images=images, out="s3://bucket/rerun", engine="local", num_workers=1, samples_per_shard=10
    )
    preprocess(settings)
    wanted = stored(s3, "bucket/rerun")

    def versions():
        return {path: s3.info(path)["LastModified"] for path in s3.find("bucket/rerun/shards")}

    before = versions()
    s3.rm_file("bucket/rerun/receipts/rows-000000.json")
    tar = s3.cat_file("bucket/rerun/shards/rows-000001.tar")
    s3.pipe_file("bucket/rerun/shards/rows-000001.tar", bytes([tar[0] ^ 1]) + tar[1:])
    s3.rm_file("bucket/rerun/manifest.json")
    preprocess(settings)
    assert stored(s3, "bucket/rerun") == wanted
    after = versions()
    assert before["bucket/rerun/shards/rows-000002.tar"] == after["bucket/rerun/shards/rows-000002.tar"]
    with pytest.raises(ValueError, match="another --samples-per-shard"):
        preprocess(
            Settings(
                annotations=annotations,
                images=images,
                out="s3://bucket/rerun",
                engine="local",
                num_workers=1,
                samples_per_shard=9,
            )
        )


def test_ray_workers_write_to_s3(tmp_path, s3):
    annotations, images = mixed_source(tmp_path)
    wanted = local(make(tmp_path / "here", annotations, images).path)
    with task_engine.ray_started(num_workers=2):
        preprocess(Settings(annotations=annotations, images=images, out="s3://bucket/ray", num_workers=2, samples_per_shard=10))
    assert stored(s3, "bucket/ray") == wanted


def test_mistakes_with_s3_are_one_line(tmp_path, s3, monkeypatch):
    annotations, images = mixed_source(tmp_path)
    out = ("--out", tmp_path / "out", "--engine", "local", "--num-workers", 1)
    for arguments, words in (
        (("--annotations", "s3://bucket/no.json", "--images", images), "s3://bucket/no.json: no such file"),
        (("--annotations", annotations, "--images", "s3://bucket/nothing"), "s3://bucket/nothing: no such folder"),
        (("--annotations", annotations, "--images", "s3://nobucket/nothing"), "s3://nobucket/nothing: no such folder"),
        (("--source", "webdataset", "--input", "s3://bucket/no.tar"), "s3://bucket/no.tar: no such folder"),
    ):
        done = command(*arguments, *out)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = command("--source", "webdataset", "--input", "s3://bucket/x.tar", *out)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "127.0.0.1:9" in done.stderr


def test_text_lengths_are_counted_on_the_way_to_s3_and_read_from_there(tmp_path, s3):
    annotations, images = mixed_source(tmp_path)
    options = {"engine": "local", "num_workers": 1, "samples_per_shard": 10}
    settings = Settings(annotations=annotations, images=images, out="s3://bucket/counted", **options)
    preprocess(settings)
    remote = ShardDataset("s3://bucket/counted", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"counted has no text lengths .*: preprocess with --tokenizer bytes --template tiny"):
        text_lengths(remote, "bytes", "tiny")
    preprocess(dataclasses.replace(settings, tokenizer="bytes", template="tiny"))
    here = make(tmp_path / "here", annotations, images)
    assert text_lengths(remote, "bytes", "tiny").tolist() == text_lengths(here, "bytes", "tiny").tolist()
    before = stored(s3, "bucket/counted")
    preprocess(dataclasses.replace(settings, tokenizer="bytes", template="tiny"))
    assert stored(s3, "bucket/counted") == before


def test_columns_of_version_1_on_s3_are_refused_until_preprocessing_has_made_them_again(tmp_path, s3, monkeypatch):
    source = mixed_source(tmp_path)
    column = {"tokenizer": "bytes", "template": "tiny"}
    here = make(tmp_path / "here", *source, **column)
    whole = local(here.path)
    for path in (here.path / "lengths").rglob("*.text"):
        as_version_1(path)
    upload(s3, here.path, "bucket/old")
    remote = ShardDataset("s3://bucket/old", cache_dir=tmp_path / "cache")
    command = "preprocess with --tokenizer bytes --template tiny"
    with pytest.raises(ValueError, match=rf"^s3://bucket/old has no .*rows-000000: there is no file[^\n]*: {command}$"):
        text_lengths(remote, "bytes", "tiny")
    monkeypatch.setattr(image_file, "verify", None)  # no image is decoded again
    make_remote = {"engine": "local", "num_workers": 1, "samples_per_shard": 10, **column}
    preprocess(Settings(annotations=source[0], images=source[1], out="s3://bucket/old", **make_remote))
    stored_now = {name: data for name, data in stored(s3, "bucket/old").items() if Path(name).suffix not in ("", ".len")}
    assert stored_now == whole
    text_lengths(remote, "bytes", "tiny")
    places = ImagePlaces(remote, "bytes", "tiny")
    assert [places.of(i) for i in range(len(remote))] == [(2,) * remote.num_images(i) for i in range(len(remote))]


def test_a_plan_over_s3_reads_a_few_shards_at_a_time(tmp_path, s3):
    annotations, images = mixed_source(tmp_path, 60)
    preprocess(
        Settings(
            annotations=annotations, images=images, out="s3://bucket/plan", engine="local", num_workers=1,
            samples_per_shard=5, tokenizer="bytes", template="tiny",
        )
    )  # fmt: skip
    config = data_config(datasets=("s3://bucket/plan",), shuffle_shards=3)
    datasets = Datasets([ShardDataset("s3://bucket/plan", cache_dir=tmp_path / "cache")], config, VISION)
    plan = SamplingPlan(datasets, config, seed=1, global_batch=6, images_without=0)
    assert plan.shuffle == "shards"
    reader = StepReader(plan, vision_config=VISION, micro_batch=2, reads=ReadSpec())
    keys = [key for step in plan.steps(TrainingLength(None, 60)) for m in reader[step].micro_batches for key in m.keys]
    assert len(set(keys)) == 60
    shards = [key.split("/")[0] for key in keys]
    assert all(len(set(shards[first : first + 15])) <= 3 for first in range(0, 60, 15))
