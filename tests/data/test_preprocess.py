"""Preprocessing loses nothing, names what it leaves out, and writes the same bytes however it is run or interrupted."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.data.ingest import shard_writer
from himix_megatron.data.ingest.shard_writer import ShardJob
from himix_megatron.data.ingest.sources import llava
from himix_megatron.data.ingest.sources.base import Part, number_rows
from himix_megatron.data.shards import storage
from himix_megatron.data.shards.reader import ShardDataset
from pipelines import preprocess
from pipelines.cli import run_main
from pipelines.launchers import task_engine
from pipelines.preprocess import Settings
from tests.support import ROOT, skip_if_fast
from tests.support.data_fixtures import EMOJI, encoded, make, mixed_source, picture, row


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ray():
    """One Ray for this file's tests."""
    skip_if_fast("Ray")
    with task_engine.ray_started(num_workers=2):
        yield


@pytest.fixture
def source(tmp_path):
    return mixed_source(tmp_path)


def test_every_engine_and_number_of_workers_writes_the_same_bytes(source, tmp_path, ray):
    one = make(tmp_path / "one", *source)
    make(tmp_path / "two", *source, num_workers=2)
    make(tmp_path / "ray", *source, engine="ray", num_workers=2)
    wanted = contents(one.path)
    assert len(wanted) == 3 * 3 + 2  # tar, index, receipt of each shard; manifest and lock
    assert contents(tmp_path / "two") == wanted
    assert contents(tmp_path / "ray") == wanted


def test_the_real_set_through_ray(tmp_path, ray):
    options = {"engine": "ray", "num_workers": 2, "samples_per_shard": 16}
    dataset = make(tmp_path / "out", EMOJI / "instruct.json", EMOJI / "images", **options)
    assert (len(dataset), dataset.manifest.num_images, len(dataset.manifest.shards)) == (64, 60, 4)


read_llava = llava.read_llava


@dataclass
class DyingPart:
    """A part of a source; the first process that has read three rows of the second shard dies by the hardest signal."""

    part: Part
    marker: Path

    @property
    def first_row(self):
        return self.part.first_row

    @property
    def num_rows(self):
        return self.part.num_rows

    def retry(self, rows):
        return self.part.retry(rows)

    def rows(self):
        for number, outcome in self.part.rows():
            if number == 13 and not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield number, outcome


def test_a_ray_worker_that_is_killed_costs_nothing(source, tmp_path, ray, monkeypatch):
    wanted = contents(make(tmp_path / "wanted", *source).path)
    real = llava.LlavaSource.part
    monkeypatch.setattr(llava.LlavaSource, "part", lambda *a: DyingPart(real(*a), tmp_path / "died"))
    make(tmp_path / "out", *source, engine="ray", num_workers=2)
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "out") == wanted


def test_a_killed_worker_process_ends_a_local_run_which_the_next_finishes(source, tmp_path, monkeypatch):
    wanted = contents(make(tmp_path / "wanted", *source).path)
    with monkeypatch.context() as patch:
        real = llava.LlavaSource.part
        patch.setattr(llava.LlavaSource, "part", lambda *a: DyingPart(real(*a), tmp_path / "died"))
        with pytest.raises(RuntimeError, match="the same command continues"):
            make(tmp_path / "out", *source, num_workers=2)
    make(tmp_path / "out", *source)
    assert contents(tmp_path / "out") == wanted


def bad_source(folder: Path) -> tuple[Path, Path, dict[int, str]]:
    """20 rows of which some are bad. Returns: annotations, images, reason by row."""
    annotations, images = mixed_source(folder, 20)
    rows = json.loads(annotations.read_text())
    (folder / "secret.png").write_bytes(encoded(picture(), "PNG"))
    (images / "cut.jpg").write_bytes(encoded(picture(1, (200, 200)), "JPEG")[:-500])
    (images / "text.png").write_text("no picture")
    (images / "empty.png").touch()
    os.mkfifo(images / "pipe.png")
    replaced = {
        1: (row(1, "cut.jpg"), "damaged_image"),
        2: (row(2, "text.png"), "not_an_image"),
        4: (row(4, "gone.png"), "missing_image"),
        5: (row(5, ["0.jpg", "gone.png"]), "missing_image"),
        6: (row(6, "../secret.png"), "unsafe_name"),
        7: (row(7, str(folder / "secret.png")), "unsafe_name"),
        8: (row(8, "8.jpg", marks=2), "image_marks"),
        9: ({**row(9, "9.png"), "conversations": row(9, "9.png")["conversations"][::-1]}, "roles"),
        11: ("no object", "malformed"),
        12: (row(12, "empty.png"), "not_an_image"),
        13: (row(13, None, "half a pair \ud83d", "x"), "bad_text"),
        14: ({**row(14, "0.jpg"), "image": 3}, "malformed"),
        15: (row(15, "pipe.png"), "missing_image"),
        16: (row(16, "a\0b.png"), "unsafe_name"),
        17: (row(17, "x" * 5000), "missing_image"),
        18: (row(18, "."), "unsafe_name"),
    }
    for number, (bad, _) in replaced.items():
        rows[number] = bad
    annotations.write_text(json.dumps(rows))
    return annotations, images, {number: reason for number, (_, reason) in replaced.items()}


def test_bad_rows_are_quarantined_and_their_neighbours_are_not(tmp_path):
    annotations, images, reasons = bad_source(tmp_path)
    dataset = make(tmp_path / "out", annotations, images, max_bad_fraction=1.0)
    assert [dataset.text(i)["id"] for i in range(len(dataset))] == [f"row-{i}" for i in (0, 3, 10, 19)]
    assert dataset.image_bytes(3, 0) == (images / "19.png").read_bytes()
    found = {}
    for receipt in dataset.manifest.shards:
        lines = [json.loads(line) for line in (dataset.path / "quarantine" / f"{receipt.name}.jsonl").read_text().splitlines()]
        assert len(lines) == sum(receipt.quarantined.values())
        assert receipt.end_row - receipt.first_row == receipt.num_samples + len(lines)
        for line in lines:
            assert receipt.quarantined[line["reason"]] > 0
            assert str(tmp_path) not in line["detail"].replace(repr(str(tmp_path / "secret.png")), "")
            found[line["row"]] = line["reason"]
    assert found == reasons
    assert sum(dataset.manifest.quarantined.values()) == len(reasons)


def test_a_bad_source_is_stopped(tmp_path):
    annotations, images, _ = bad_source(tmp_path)
    with pytest.raises(ValueError, match=r"of 20 rows are bad .*missing_image: \d.*--max-bad-fraction 0\.1"):
        make(tmp_path / "out", annotations, images)
    with pytest.raises(ValueError, match="no manifest"):
        ShardDataset(tmp_path / "out")
    with pytest.raises(ValueError, match="of 24 rows are bad"):  # a wrong image folder
        make(tmp_path / "other", *mixed_source(tmp_path / "more")[:1], tmp_path)


def test_a_rerun_makes_only_what_is_missing_or_damaged(source, tmp_path):
    folder = make(tmp_path / "out", *source).path
    wanted = contents(folder)
    damage = {
        "receipts/rows-000000.json": lambda path: path.unlink(),
        "receipts/rows-000001.json": lambda path: path.write_text("{}"),
        "shards/rows-000000.tar": lambda path: path.unlink(),
        "shards/rows-000001.tar": lambda path: path.write_bytes(bytes([1]) + path.read_bytes()[1:]),
        "shards/rows-000002.idx": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "manifest.json": lambda path: path.unlink(),
    }
    for name, hurt in damage.items():
        hurt(folder / name)
        before = {path: path.stat().st_ino for path in folder.rglob("*.tar")}
        make(folder, *source)
        assert contents(folder) == wanted
        number = name[-10:-4] if "shards" in name else name[-11:-5] if "receipts" in name else "none"
        for path, inode in before.items():
            assert (path.stat().st_ino == inode) == (number not in path.name), (name, path.name)


@pytest.mark.parametrize("row_number", [0, 9, 14, 23])
def test_an_interrupted_run_is_finished_by_the_next(source, tmp_path, monkeypatch, row_number):
    wanted = contents(make(tmp_path / "wanted", *source).path)

    def interrupted(row, images, follow_links):
        if row["id"] == f"row-{row_number}":
            raise KeyboardInterrupt
        return read_llava(row, images, follow_links)

    monkeypatch.setattr(llava, "read_llava", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", *source)
    assert not list((tmp_path / "out").glob(".partial-*"))
    with pytest.raises(ValueError, match="no manifest"):
        ShardDataset(tmp_path / "out")
    monkeypatch.setattr(llava, "read_llava", read_llava)
    make(tmp_path / "out", *source)
    assert contents(tmp_path / "out") == wanted


def test_what_a_killed_run_left_is_swept(source, tmp_path):
    wanted = contents(make(tmp_path / "wanted", *source).path)
    left = tmp_path / "out" / ".partial-killed"
    left.mkdir(parents=True)
    (left / "rows-000000.tar").write_bytes(b"half")
    make(tmp_path / "out", *source)
    assert contents(tmp_path / "out") == wanted


def test_a_straggler_of_a_killed_run_cannot_publish(source, tmp_path):
    folder = make(tmp_path / "out", *source).path
    wanted = contents(folder)
    attempt = folder / ".partial-old"
    attempt.mkdir()
    row = json.loads(source[0].read_text())[0]

    class Swept:
        first_row, num_rows = 0, 10

        def rows(self):
            for number in range(self.num_rows):
                if number == 5:
                    shutil.rmtree(attempt)
                # other content than the shard has
                yield from number_rows([llava.read_llava(row, str(source[1]))], number, {number})

    job = ShardJob(storage.LocalFolder(folder), attempt, "rows-000000", "c", "s")
    with pytest.raises(FileNotFoundError):
        shard_writer.write_shard(job, Swept())
    assert contents(folder) == wanted


@pytest.mark.parametrize(
    ("link", "refused"),
    [(".lock", True), ("shards", True), ("lengths/0123", True), (".partial-x", False), ("shards/rows-000000.tar", False)],
)
def test_links_in_out_lead_to_no_file_of_ours(source, tmp_path, link, refused):
    """A folder that somebody else made, or a shared disk."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / ".x.text.1").write_text("precious")
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(victim / ".x.text.1" if link.endswith((".lock", ".tar")) else victim)
    if refused:
        with pytest.raises(ValueError, match=r"is a symbolic link: links below .* are not followed"):
            make(out, *source)
    else:
        assert len(make(out, *source)) == 24
    assert contents(victim) == {".x.text.1": b"precious"}


def test_a_named_pipe_among_the_receipts_is_replaced(source, tmp_path):
    folder = make(tmp_path / "out", *source).path
    wanted = contents(folder)
    for name in ("receipts/rows-000000.json", "shards/rows-000001.tar"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    make(folder, *source)
    assert contents(folder) == wanted


@pytest.mark.parametrize("num_missing", [1, 20])
def test_images_that_come_later_are_in_the_next_run(source, tmp_path, num_missing):
    """Missing ones below --max-bad-fraction and above it, and a damaged one that was replaced; only theirs is written again."""
    images = source[1]
    wanted = contents(make(tmp_path / "wanted", *source).path)
    names = sorted(path.name for path in images.iterdir())
    away = ["13.png", *(name for name in names if name not in ("0.jpg", "13.png", "14.jpg"))][:num_missing]
    for name in away:
        (images / name).rename(tmp_path / name)
    whole = (images / "14.jpg").read_bytes()
    (images / "14.jpg").write_bytes(whole[:-20])
    if num_missing > 1:
        with pytest.raises(ValueError, match=r"--max-bad-fraction 0\.1 .* for missing or damaged images: put these in place"):
            make(tmp_path / "out", *source)
    else:
        make(tmp_path / "out", *source)
        before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.tar")}
        assert make(tmp_path / "out", *source).manifest.quarantined == {"damaged_image": 1, "missing_image": 1}
        assert {path: path.stat().st_ino for path in before} == before
    for name in away:
        (tmp_path / name).rename(images / name)
    (images / "14.jpg").write_bytes(whole)
    make(tmp_path / "out", *source)
    assert contents(tmp_path / "out") == wanted
    if num_missing == 1:
        after = {path: path.stat().st_ino for path in before}
        assert [path.stem for path in before if before[path] != after[path]] == ["rows-000001"]


def test_the_last_line_counts_what_was_left_out_and_moves_no_cursor(source, tmp_path, monkeypatch, capsys):
    (source[1] / "13.png").unlink()
    out = tmp_path / "out\x1b[2J"
    words = ["--annotations", source[0], "--images", source[1], "--out", out, "--engine", "local", "--num-workers", "1"]
    monkeypatch.setattr(sys, "argv", ["preprocess", *map(str, words)])
    preprocess.main()
    said = capsys.readouterr().out
    assert "23 samples, 23 images, 1 shards; left out: missing_image: 1 (see " in said
    assert said.endswith("; 1 for missing or damaged images: put these in place and run the same command again\n")
    assert "\x1b" not in said


def test_links_are_followed_by_flag_only_and_a_linked_image_folder_always(source, tmp_path):
    annotations, images = source
    wanted = contents(make(tmp_path / "wanted", *source).path)
    (tmp_path / "link").symlink_to(images)
    for name in ("13.png", "16.jpg"):
        (images / name).rename(tmp_path / name)
        (images / name).symlink_to(tmp_path / name)
    dataset = make(tmp_path / "out", annotations, tmp_path / "link", max_bad_fraction=0.5)
    assert dataset.manifest.quarantined == {"missing_image": 2}
    assert (
        "13.png' is a symbolic link, or behind one: --follow-links"
        in (dataset.path / "quarantine/rows-000001.jsonl").read_text()
    )
    make(tmp_path / "out", annotations, tmp_path / "link", follow_links=True)
    assert contents(tmp_path / "out") == wanted


def write_to_a_full_disk(number):
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


@pytest.mark.parametrize("engine", ["ray", "local", "actor"])
def test_a_full_disk_under_a_worker_is_one_line(engine, capsys, ray):
    def main():
        if engine == "actor":  # as pipelines.encode has them
            import ray

            with task_engine.own_errors():
                ray.get(ray.remote(write_to_a_full_disk).remote(0))
        with task_engine.engine_started(engine, 2) as workers:
            list(workers.run(write_to_a_full_disk, [(0,)]))

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == "error: No space left on device: make room on the disk, and run the same command again\n"


@pytest.mark.parametrize(
    ("out", "words"), [("o" * 300, "File name too long"), ("file/x", "Not a directory"), ("out", "File too large")]
)
def test_a_place_that_cannot_be_written_is_one_line(source, tmp_path, out, words):
    (tmp_path / "file").touch()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1] if out != "out" else 10_000
    done = command(
        *("--annotations", source[0], "--images", source[1], "--out", tmp_path / out, "--engine", "local"),
        *("--num-workers", "2", "--samples-per-shard", "10"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_two_runs_do_not_write_one_folder(source, tmp_path):
    with (
        preprocess.attempt_in(str(tmp_path / "out"), preprocess.PARTS),
        pytest.raises(ValueError, match="another run is writing it"),
    ):
        make(tmp_path / "out", *source)


def test_a_folder_with_another_dataset_is_not_overwritten(source, tmp_path):
    folder = make(tmp_path / "out", *source).path
    with pytest.raises(ValueError, match="--samples-per-shard"):
        make(folder, *source, samples_per_shard=7)
    rows = json.loads(source[0].read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(ValueError, match="another annotation file"):
        make(folder, *source)


def test_lines_of_json_are_read_as_a_list_is(source, tmp_path):
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in json.loads(source[0].read_text())) + "\n")
    dataset, other = make(tmp_path / "a", *source), make(tmp_path / "b", lines, source[1])
    for shard, same in zip(dataset.manifest.shards, other.manifest.shards, strict=True):
        assert shard.tar == same.tar


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard is 0"),
        ({"num_workers": 0}, "--num-workers is 0"),
        ({"max_bad_fraction": 1.5}, "--max-bad-fraction is 1.5"),
        ({"max_bad_fraction": float("nan")}, "--max-bad-fraction is nan"),
        ({"name": "a/b"}, "give --name"),
        ({"annotations": Path("two words.json")}, "give --name"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"annotations": Path("a.json"), "images": Path("i"), "out": Path("o"), **change})


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pipelines.preprocess", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def test_the_users_mistakes_are_one_line_and_exit_code_2(source, tmp_path):
    (tmp_path / "broken.json").write_text("[{]")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for annotations, images, words in (
        (tmp_path / "gone.json", source[1], "gone.json: no such file"),
        (source[0], tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path / "broken.json", source[1], "no JSON: Expecting property name"),
        (tmp_path / "object.json", source[1], "not a list of rows"),
        (tmp_path / "deep.json", source[1], "too many lists or objects"),
    ):
        done = command("--annotations", annotations, "--images", images, "--out", tmp_path / "out", "--engine", "local")
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_of_the_readme(source, tmp_path):
    """With a Ray of its own, which is gone afterwards."""
    out = tmp_path / "out"
    done = command("--source", "llava", "--annotations", source[0], "--images", source[1], "--out", out, "--num-workers", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 24 samples, 24 images, 1 shards\n"
    assert "rows/s, 0 s left, 0 quarantined" in done.stderr
    assert len(ShardDataset(out)) == 24
