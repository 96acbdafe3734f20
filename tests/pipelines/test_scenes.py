"""Rendered scenes are a real, balanced, repeatable image-text set, and are made once however many ask."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from himix_megatron.data.shards.reader import ShardDataset
from pipelines.scenes import SceneSettings, ensure_scene_data, write_corpus
from pipelines.worlds.drawing import COLOURS
from pipelines.worlds.shapes import IMAGE_SIZE, PLACES, QUESTIONS, SHAPES, Scene, pictures
from tests.support import ROOT

SMALL = SceneSettings(num_train=40, num_heldout=9)
EVERY = len(COLOURS) * len(SHAPES) * len(PLACES)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_corpus(tmp_path / name, SceneSettings(num_train=12, num_heldout=3, seed=seed))
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert _files(tmp_path / "a") != _files(tmp_path / "c")


def test_shapes_are_what_they_were_before_there_were_other_worlds(tmp_path: Path) -> None:
    """Else folders that were rendered long ago would be made again, and figures would no longer compare."""
    folder = ensure_scene_data(tmp_path / "scenes", SceneSettings(num_train=12, num_heldout=3))
    rows = b"".join((folder / "corpus" / f"{split}.json").read_bytes() for split in ("align", "instruct", "heldout"))
    pixels = b"".join(np.asarray(scene.render(f"{number}")).tobytes() for number, scene in enumerate(pictures(60, "x", False)))
    assert hashlib.sha256(rows).hexdigest()[:16] == "6d1d1265a8177d5f"
    assert hashlib.sha256(pixels).hexdigest()[:16] == "9f28367daac66b42"
    assert (folder / "scenes.json").read_text() == '{"format": 1, "num_train": 12, "num_heldout": 3, "seed": 0}\n'


def test_another_world_has_a_folder_of_its_own_and_rows_that_say_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = SceneSettings(num_train=4, num_heldout=8, world="text")
    folder = ensure_scene_data(settings=settings)
    assert folder == tmp_path / "data" / "scenes-text"
    rows = json.loads((folder / "corpus" / "heldout.json").read_text())
    assert {row["id"].split("/")[1].split("-")[0] for row in rows} == {"place", "side", "beside", "largest"}
    assert [ShardDataset(folder / "heldout").text(number)["id"] for number in range(8)] == [row["id"] for row in rows]
    with pytest.raises(ValueError, match=r"scenes.world .*words.* shapes, relations, counting, text"):
        SceneSettings(world="words")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds scenes made with .*'world': 'text'"):
        ensure_scene_data(folder, SceneSettings(num_train=4, num_heldout=8))


def test_every_combination_comes_equally_often() -> None:
    counts = Counter(pictures(2 * EVERY, "x", False))
    assert set(counts.values()) == {2}
    assert len(counts) == EVERY == 360


def test_no_answer_can_be_guessed_from_question_or_prevalence() -> None:
    for values, what in ((COLOURS, "colour"), (SHAPES, "shape"), (PLACES, "place")):
        counts = Counter(getattr(scene, what) for scene in pictures(EVERY, "x", False))
        assert max(counts.values()) / EVERY <= 1 / len(values) + 1e-9


def test_rows_are_llava_rows_about_what_is_in_the_image(tmp_path: Path) -> None:
    write_corpus(tmp_path, SMALL)
    rows = {split: json.loads((tmp_path / f"{split}.json").read_text()) for split in ("align", "instruct", "heldout")}
    assert [len(rows[split]) for split in rows] == [40, 40, 9]
    answers: dict[str, str] = {}
    for row in rows["align"]:
        question, caption = row["conversations"]
        assert question["value"].count("<image>") == 1
        answers[row["image"]] = caption["value"]
    turns = Counter(len(row["conversations"]) // 2 for row in rows["instruct"])
    assert set(turns) == {1, 2}
    for row in rows["instruct"]:
        conversation = row["conversations"]
        assert sum(turn["value"].count("<image>") for turn in conversation) == 1
        assert [turn["from"] for turn in conversation] == ["human", "gpt"] * (len(conversation) // 2)
        assert all(turn["value"] in answers[row["image"]] for turn in conversation[1::2])
    assert {len(row["conversations"]) for row in rows["heldout"]} == {2}
    asked = Counter(row["conversations"][0]["value"].removeprefix("<image>\n") for row in rows["heldout"])
    assert asked == dict.fromkeys(QUESTIONS.values(), 3)
    assert not {row["image"] for row in rows["heldout"]} & answers.keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_has_its_colour_and_is_at_its_place(shape: str) -> None:
    third = IMAGE_SIZE / 3
    for number, place in enumerate(PLACES):
        for colour, rgb in COLOURS.items():
            picture = np.asarray(Scene(colour, shape, place).render(f"{number}")).astype(float)
            painted = np.abs(picture - np.array(rgb)).sum(-1) < 90
            assert painted.sum() > 20
            row, column = (np.mean(index) // third for index in painted.nonzero())
            assert PLACES[int(row) * 3 + int(column)] == place


def test_an_image_is_a_plain_jpeg_that_varies_in_size_position_and_ground(tmp_path: Path) -> None:
    write_corpus(tmp_path, SceneSettings(num_train=1, num_heldout=1))
    with Image.open(tmp_path / "images" / "train-00000.jpg") as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (IMAGE_SIZE, IMAGE_SIZE))
    scene = Scene("red", "circle", "centre")
    varied = [np.asarray(scene.render(seed)) for seed in "abcd"]
    assert len({picture.tobytes() for picture in varied}) == 4
    assert len({(picture[..., 0] > 180).sum() for picture in varied}) > 1


def test_datasets_are_made_once_and_hold_every_row(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "scenes"
    data = ensure_scene_data(folder, SMALL)
    before = {name: (folder / name).stat().st_mtime_ns for name in _files(folder)}
    assert ensure_scene_data(folder, SMALL) == data
    assert {name: (folder / name).stat().st_mtime_ns for name in _files(folder)} == before
    for path, num in ((data / "align", 40), (data / "instruct", 40), (data / "heldout", 9)):
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["num_samples"] == manifest["num_images"] == num
    assert [path.name for path in folder.parent.iterdir() if path.name.endswith(".partial")] == []


def _ensure(folder: str) -> None:
    ensure_scene_data(Path(folder), SMALL)


def test_several_at_once_make_it_once_and_a_killed_attempts_remains_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".scenes.partial" / "align").mkdir(parents=True)
    (tmp_path / ".scenes.partial" / "align" / "manifest.json").write_text("{")
    context = multiprocessing.get_context("spawn")
    callers = [context.Process(target=_ensure, args=(str(tmp_path / "scenes"),)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert [caller.exitcode for caller in callers] == [0, 0, 0]
    alone = ensure_scene_data(tmp_path / "alone", SMALL)
    assert _files(tmp_path / "scenes") == _files(alone)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"is no folder of rendered scenes .*give another, or delete it"):
        ensure_scene_data(tmp_path, SMALL)
    assert _files(tmp_path) == {"mine.txt": b"precious"}
    ensure_scene_data(tmp_path / "scenes", SMALL)
    with pytest.raises(ValueError, match=r"holds scenes made with .*'num_train': 40"):
        ensure_scene_data(tmp_path / "scenes", SceneSettings(num_train=41, num_heldout=9))


def test_the_command_writes_a_corpus_and_refuses_a_full_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.scenes", "--out", str(tmp_path / "out"), "--scenes.num-train", "5"]
    root = ROOT
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "out" / "images").glob("train-*.jpg"))) == 5
    again = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert again.returncode == 2
    assert again.stderr == f"error: --out {tmp_path / 'out'} is there and not empty: choose another folder\n"
