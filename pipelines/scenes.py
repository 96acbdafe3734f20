"""Real image-text sets that anybody can make in seconds, of four worlds (pipelines/worlds): shapes, relations, counting, text.

Written as LLaVA data is: JPEG files, and JSON lists of conversations. `align.json` has captions, `instruct.json` questions
and answers (one or two turns), `heldout.json` one question each about images that training never saw; but for shapes, also
about combinations that it never saw, and the kind of question stands in the row's id: `heldout-00000/left`. No answer can be
guessed from the question; each world says what chance is. Every byte is a function of the settings.

    python -m pipelines.scenes --out data/my-scenes
    python -m pipelines.scenes --out data/my-text --scenes.world text
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from himix_megatron.config import Count, check_known, check_limits
from himix_megatron.data.shards.storage import locked
from himix_megatron.runtime import typed_json
from pipelines import preprocess
from pipelines.cli import parse_settings, run_main
from pipelines.worlds import counting, relations, shapes, text
from pipelines.worlds.drawing import Picture, Question
from pipelines.worlds.tokenizer import write_tokenizer

log = logging.getLogger(__name__)

WORLDS: dict[str, Callable[[int, str, bool], Sequence[Picture]]] = {
    world.__name__.rpartition(".")[2]: world.pictures for world in (shapes, relations, counting, text)
}
"""What makes a number of pictures from a seed, held out or not."""
CAPTION_PROMPT = "What is this?"

FORMATS = {"relations": 2, "counting": 2}
"""A world's changes when the same settings give other bytes; 1 before it ever did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSettings:
    """Settings of a corpus of rendered scenes."""

    num_train: Count = 7200
    """Number of images in the training splits; align and instruct describe the same ones."""
    num_heldout: Count = 360
    """Number of images in the held-out split, one question each."""
    seed: int = 0
    """Seed of all random choices."""
    world: Literal["shapes", "relations", "counting", "text"] = "shapes"
    """What is to be seen and asked. shapes: one, its colour and place; relations: what is where, left of, the largest;
    counting: how many of a colour, to 9; text: what is written, where, which number is the largest."""

    def __post_init__(self) -> None:
        check_limits(self, "scenes")
        check_known("scenes.world", self.world, WORLDS)

    @property
    def turns(self) -> tuple[int, int]:
        """Least and largest number of questions about an image in training; of four, earlier ones name some of what is seen."""
        return {"shapes": (1, 2), "counting": (1, 1)}.get(self.world, (4, 4))


def write_corpus(folder: Path, settings: SceneSettings) -> None:
    """Write `images/*.jpg`, `align.json`, `instruct.json` and `heldout.json` into a folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    train = _write_images(folder, "train", settings.num_train, settings)
    heldout = _write_images(folder, "heldout", settings.num_heldout, settings)
    rng = random.Random(f"{settings.seed}/questions")
    rows = {
        "align": [
            _row(name, [Question(CAPTION_PROMPT, picture.caption)], image_last=rng.random() < 0.5) for name, picture in train
        ],
        "instruct": [_row(name, rng.sample(picture.questions, rng.randint(*settings.turns))) for name, picture in train],
        # One of its questions in turn (of shapes: colour, shape and place): balanced to one.
        "heldout": [
            _row(name, [picture.questions[number % len(picture.questions)]], with_kind=True)
            for number, (name, picture) in enumerate(heldout)
        ],
    }
    for split, conversations in rows.items():
        (folder / f"{split}.json").write_text(json.dumps(conversations, indent=1) + "\n")


def _write_images(folder: Path, split: str, num: int, settings: SceneSettings) -> list[tuple[str, Picture]]:
    """The pictures of a split by image name; chroma is kept at full resolution, since colour is what is asked for."""
    seed = settings.seed
    pictures = WORLDS[settings.world](num, f"{seed}/{split}", split == "heldout")
    named = [(f"{split}-{number:05d}.jpg", picture) for number, picture in enumerate(pictures)]
    for name, picture in named:
        picture.render(f"{seed}/{name}").save(folder / "images" / name, quality=92, subsampling=0)
    return named


def _row(image: str, turns: list[Question], image_last: bool = False, with_kind: bool = False) -> dict[str, Any]:
    """One LLaVA conversation; the image mark is at the start or the end of the first question."""
    conversation = []
    for number, turn in enumerate(turns):
        question = turn.text
        if number == 0:
            question = f"{question}\n<image>" if image_last else f"<image>\n{question}"
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    kind = f"/{turns[0].kind}" if with_kind and turns[0].kind else ""
    return {"id": image.removesuffix(".jpg") + kind, "image": image, "conversations": conversation}


def ensure_scene_data(folder: Path | None = None, settings: SceneSettings | None = None) -> Path:
    """Shard datasets of rendered scenes in `folder`, made on the first call: `align`, `instruct`, `heldout`, and `corpus`.
    Returns: the folder, absolute; None: data/scenes, of other worlds than shapes data/scenes-WORLD.

    Any number of processes may call it at once: one renders, the others wait; a killed one leaves nothing that is used.
    Raises: ValueError when the folder holds something else, or scenes of other settings.
    """
    settings = settings or SceneSettings()
    suffix = "" if settings.world == "shapes" else f"-{settings.world}"
    folder = (folder or Path(f"data/scenes{suffix}")).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not _is_complete(folder, settings):
        with locked(folder.parent, f".{folder.name}.lock"):
            if not _is_complete(folder, settings):  # another process may have made it while we waited
                _make_datasets(folder, settings)
    return folder


def ensure_tokenizer(folder: Path = Path("data/scenes-tokenizer")) -> Path:
    """The tokenizer of the worlds (pipelines/worlds/tokenizer.py), made on the first call like `ensure_scene_data`'s folder."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, f".{folder.name}.lock"):
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_tokenizer(partial)
            os.rename(partial, folder)
    return folder


def _description(settings: SceneSettings) -> dict[str, int | str]:
    described = {"format": FORMATS.get(settings.world, 1), **dataclasses.asdict(settings)}
    if settings.world == "shapes":  # which folders from before the other worlds do not name
        del described["world"]
    return described


def _is_complete(folder: Path, settings: SceneSettings) -> bool:
    """Whether the datasets are there. Raises: ValueError when something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    marker = folder / "scenes.json"
    if not marker.is_file():
        raise ValueError(f"{folder} is no folder of rendered scenes (no scenes.json): give another, or delete it")
    found, wanted = typed_json.read(marker), _description(settings)
    if found != wanted:
        raise ValueError(f"{folder} holds scenes made with {found}, wanted {wanted}: give another folder, or delete it")
    return True


def _make_datasets(folder: Path, settings: SceneSettings) -> None:
    """Render and preprocess beside the folder, then rename: what bears the final name is whole."""
    log.info("rendering %d scenes into %s", settings.num_train + settings.num_heldout, folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    corpus = partial / "corpus"
    write_corpus(corpus, settings)
    for split in ("align", "instruct", "heldout"):
        # In this process: a few seconds' work, and this may be a rank of a training run that must start no Ray.
        preprocess.preprocess(
            preprocess.Settings(
                annotations=corpus / f"{split}.json",
                images=corpus / "images",
                out=partial / split,
                engine="local",
                num_workers=1,
                max_bad_fraction=0.0,
            )
        )
    (partial / "scenes.json").write_text(json.dumps(_description(settings)) + "\n")
    os.rename(partial, folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Command:
    """Write a corpus of rendered scenes: JPEG files and LLaVA JSON."""

    out: Path
    """Folder to write; it must be empty or missing."""
    scenes: SceneSettings = dataclasses.field(default_factory=SceneSettings)


def main() -> None:
    """The command line."""
    command = parse_settings(_Command, sys.argv[1:], "python -m pipelines.scenes", __doc__)
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise ValueError(f"--out {command.out} is there and not empty: choose another folder")
    write_corpus(command.out, command.scenes)
    print(f"{command.out}: {command.scenes.num_train} training and {command.scenes.num_heldout} held-out images")


if __name__ == "__main__":
    run_main(main)
