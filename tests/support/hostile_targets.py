"""What the campaign attacks: for each entry the files it reads, made hostile. One function a target: a case in, a call out."""

from __future__ import annotations

import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from tests.support import hostile_exported, hostile_files, hostile_json
from tests.support.hostile import Call, Case
from tests.support.hostile_world import RECIPE

Change = Callable[[Case], str]
SPOILED = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError),
    *(tarfile.TarError, struct.error, pa.ArrowException),
)
"""What a change meets in a file that an earlier one has spoiled."""


def alter(case: Case, *changes: Change) -> None:
    """One to three of these changes; one that finds nothing to change any more is left out."""
    for _ in range(case.draw.choice([1, 1, 2, 3])):
        change = case.draw.choice(changes)
        try:
            case.told.append(change(case))
        except SPOILED as error:
            case.told.append(f"not changed again ({type(error).__name__})")  # an earlier change has spoiled the file


def strange(part: str) -> Change:
    """A file of a part of the world becomes something else."""
    return lambda case: hostile_files.strange_file(case.draw, case.folder / part, case.victim)


def noise(part: str) -> Change:
    """Bytes of one of its files change."""
    return lambda case: hostile_files.changed_bytes(case.draw, case.folder / part)


def tree(name: str, *, lines: bool = False, then: Callable[[Any], Any] = lambda tree: tree) -> Change:
    """A JSON file is mutated."""
    return lambda case: hostile_files.changed_json(case.draw, case.folder / name, case.folder, lines=lines, then=then)


# ---- datasets ------------------------------------------------------------------------------------------------------


def _receipt_and_manifest(case: Case) -> str:
    """The same mutated receipt in both places."""
    data = case.folder / "data"
    manifest = json.loads(hostile_files.content(data / "manifest.json"))
    shard, told = hostile_json.mutate(case.draw, manifest["shards"][0])
    manifest["shards"][0] = shard
    (data / "receipts" / "mixed-000000.json").write_bytes(hostile_json.spelled(shard, case=str(case.folder)))
    (data / "manifest.json").write_bytes(hostile_json.spelled(hostile_files.resigned(manifest), case=str(case.folder)))
    return f"shard: {'; '.join(told)}"


DATA = (
    *(tree("data/manifest.json", then=hostile_files.resigned), tree("data/manifest.json", then=hostile_files.resigned)),
    *(_receipt_and_manifest, tree("data/receipts/mixed-000000.json"), strange("data"), strange("data"), noise("data")),
    lambda case: hostile_files.changed_index(case.draw, case.folder / "data"),
    lambda case: hostile_files.changed_sample(case.draw, case.folder / "data", case.folder),
    lambda case: hostile_files.changed_column(case.draw, case.folder / "data"),
)
SHARDS = ("data/lengths", "data/.lock")
TRAIN = ("--train.steps", "1", "--run.dir", "out")


def dataset(case: Case) -> Call:
    """A dataset from somebody else."""
    case.need("data", "run")
    alter(case, *DATA)
    template = ("--data.max-text-tokens", "96")
    return case.draw.choice(
        [
            Call("tools.inspect_shards", ("data",)),
            Call("tools.inspect_shards", ("data", "--verify", "--num-workers", "1"), codes=(0, 1, 2)),
            Call("tools.inspect_shards", ("data", "--sheet", "out.png"), may_change=("out.png",)),
            Call("loader", ("data",), SHARDS, run=_loader),
            Call("loader", ("data",), SHARDS, run=_loader),
            Call("pipelines.pretrain", (RECIPE, "--data.datasets", "data", *TRAIN, *template), SHARDS, (0, 2, 3)),
            Call("pipelines.evaluate", ("run", "--data", "data", "--max-new-tokens", "2"), ("run", *SHARDS)),
            Call("pipelines.encode", (RECIPE, "--data", "data", "--out", "out", "--engine", "local"), SHARDS),
        ]
    )


def _loader() -> None:
    """A dataset, its text lengths and every sample, as training reads them."""
    from himix_megatron.data.errors import BadSampleError
    from himix_megatron.data.loading.token_counts import ImagePlaces, text_lengths
    from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset

    data = ShardDataset("data")
    places = ImagePlaces(data, "bytes", "tiny")
    lengths = text_lengths(data, "bytes", "tiny")
    if len(lengths) != len(data):
        raise AssertionError(f"{len(lengths)} lengths of {len(data)} samples")
    for sample in range(min(len(data), 50)):
        try:
            data.sample(sample)
            places.of(sample)
        except (BadSampleError, DamagedShardError) as error:  # what readers of samples are told to expect
            print(error)


def features(case: Case) -> Call:
    """A cache of features from somebody else, or one that is made on."""
    case.need("data", "features")
    manifest = tree("features/manifest.json")
    alter(
        case, manifest, manifest, tree("features/receipts/mixed-000000.json"), strange("features"), noise("features"), _features
    )
    if case.draw.random() < 0.5:
        return Call(
            "pipelines.encode", (RECIPE, "--data", "data", "--out", "features", "--engine", "local"), ("features", *SHARDS)
        )
    words = (RECIPE, "--data.datasets", "data", "--data.features", "features", *TRAIN)
    return Call("pipelines.pretrain", words, SHARDS, (0, 2, 3))


def _features(case: Case) -> str:
    path = case.draw.choice(sorted((case.folder / "features/features").iterdir()))
    return hostile_files.changed_safetensors(case.draw, path, case.folder)


# ---- runs ----------------------------------------------------------------------------------------------------------

ASKED = ("--questions", "questions/coco_pope_x.json", "--images", "questions", "--max-new-tokens", "2")
STEP = "run/checkpoints/step-00000002"


def _signed(change: Change) -> Change:
    """A change within the checkpoint, for which its manifest vouches."""

    def both(case: Case) -> str:
        told = change(case)
        hostile_files.sign_checkpoint(case.folder / STEP)
        return f"{told} (signed)"

    return both


def _bomb(case: Case) -> str:
    """A pickle that makes a folder."""
    path = case.draw.choice([case.folder / STEP / name for name in (".metadata", "common.pt", "__0_0.distcp")])
    bomb = hostile_files.Bomb(case.victim / "pwned")
    path.write_bytes(pickle.dumps({"a": bomb} if case.draw.random() < 0.5 else bomb))
    return f"{path.name}: a pickle that runs code"


def _owner(case: Case) -> str:
    """Another launch's lock."""
    from dataclasses import asdict

    from himix_megatron.checkpoint.run_lock import LockOwner

    folder = case.folder / "run/checkpoints/attempt-000001"
    (folder / "ended").unlink()
    found, told = hostile_json.mutate(case.draw, asdict(LockOwner.here()))
    (folder / "owner.json").write_bytes(hostile_json.spelled(found, case=str(case.folder)))
    return f"owner.json: {'; '.join(told)}"


RUN = (
    *(tree("run/config.json"), tree("run/config.json"), tree("run/config.json"), strange("run"), strange("run"), noise("run")),
    *(_signed(tree(f"{STEP}/himix.json")), _signed(tree(f"{STEP}/himix.json")), tree(f"{STEP}/manifest.json")),
    *(_signed(noise(STEP)), _signed(strange(STEP)), _signed(_bomb), _signed(tree(f"{STEP}/metadata.json"))),
    *(tree("run/journal.jsonl", lines=True), tree("run/status.json"), _owner),
)


def run_folder(case: Case) -> Call:
    """A run from somebody else: asked, evaluated, converted, continued, started from."""
    case.need("run", "data", "questions")
    alter(case, *RUN)
    ask = ("--question", "Which colour?", "--image", "questions/0.png", "--max-new-tokens", "2")
    pope = ("--benchmark", "pope", *ASKED)
    train = (RECIPE, "--data.datasets", "data", "--train.steps", "3", "--run.dir")
    return case.draw.choice(
        [
            Call("pipelines.generate", ("run", *ask)),
            Call("pipelines.generate", ("run", *ask)),
            Call("pipelines.evaluate", ("run", *pope), ("run/evaluation", "run/tensorboard")),
            Call("tools.convert", ("himix-to-hf", "run", "--out", "out"), codes=(0, 1, 2)),
            Call("tools.convert", ("himix-to-authors", "run", "--out", "out"), codes=(0, 1, 2)),
            Call("pipelines.pretrain", (*train, "run"), ("run", *SHARDS), (0, 2, 3)),
            Call("pipelines.pretrain", (*train, "out", "--checkpoint.init-from", "run"), SHARDS, (0, 2, 3)),
        ]
    )


def questions(case: Case) -> Call:
    """A benchmark's files, and answers that an earlier evaluation left."""
    case.need("run", "questions")
    lines, pope = tree("questions/coco_pope_x.json", lines=True), "run/evaluation/pope"
    answers = (tree(f"{pope}/answers-000.jsonl", lines=True), tree(f"{pope}/settings.json"), tree("run/evaluation/pope.json"))
    files = (strange("questions"), noise("questions"), strange("run/evaluation"), noise("run/evaluation"))
    alter(case, lines, lines, lines, *files, *answers)
    kind = case.draw.choice(["pope", "pope", "pope", "pope", "gqa", "vqav2", "textvqa", "mme", "mmmu", "mmvet"])
    words = ("run", "--benchmark", kind, *ASKED)
    more = ("--max-bad-fraction", "1") if case.draw.random() < 0.5 else ()
    return Call("pipelines.evaluate", words + more, ("run/evaluation", "run/tensorboard"))


# ---- models --------------------------------------------------------------------------------------------------------


def _tensors(part: str) -> Change:
    return lambda case: hostile_files.changed_safetensors(case.draw, case.folder / part / "model.safetensors", case.folder)


def hugging_face(case: Case) -> Call:
    """Folders of a language model and a tower."""
    case.need("language", "vision")
    for part in case.draw.choice([("language",), ("vision",), ("language", "vision")]):
        config = tree(f"{part}/config.json")
        alter(case, config, config, config, _tensors(part), _tensors(part), strange(part), noise(part))
    more = ("--vision-kv-init", "from-text") if case.draw.random() < 0.2 else ()
    words = ("hf-to-himix", "--language", "language", "--vision", "vision", "--out", "out", *more)
    return Call("tools.convert", words, codes=(0, 1, 2))


def authors(case: Case) -> Call:
    """Weights in the published layout."""
    case.need("authors")
    config = tree("authors/config.json")
    alter(case, config, config, _tensors("authors"), _tensors("authors"), strange("authors"), noise("authors"))
    return Call("tools.convert", ("authors-to-himix", "authors", "--out", "out"), codes=(0, 1, 2))


def tokenizer(case: Case) -> Call:
    """A folder with a tokenizer."""
    case.need("exported", "source", "run")
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.json", "config.json", "generation_config.json")
    alter(case, *(tree(f"exported/{name}") for name in names), strange("exported"), noise("exported"))
    if case.draw.random() < 0.4:
        return Call("tools.convert", ("himix-to-hf", "run", "--out", "out", "--tokenizer", "exported"), codes=(0, 1, 2))
    words = ("--annotations", "source/rows.json", "--images", "source/images", "--tokenizer", "exported", "--template", "tiny")
    return Call("pipelines.preprocess", (*words, *PREPROCESS))


# ---- sources -------------------------------------------------------------------------------------------------------

PREPROCESS = ("--out", "out", "--engine", "local", "--num-workers", "1", "--max-bad-fraction", "1")


def sources(case: Case) -> Call:
    """Raw files for preprocess."""
    kind = case.draw.choice(["llava", "parquet", "webdataset", "img2dataset", "img2dataset files"])
    part = {"llava": "source", "parquet": "parquet", "img2dataset files": "crawl"}.get(kind, "tars")
    case.need(part)
    strange_or_noise = (strange(part), noise(part))
    words: tuple[str, ...] = ("--source", kind.split()[0], "--input", part)
    if kind == "llava":
        rows = tree("source/rows.json")
        alter(case, rows, rows, rows, strange("source/images"), *strange_or_noise)
        words = ("--annotations", "source/rows.json", "--images", "source/images")
    elif kind == "parquet":
        change = _parquet
        alter(case, change, change, change, *strange_or_noise)
    elif kind == "img2dataset files":
        rows = tree(f"crawl/00000/0000{case.draw.randrange(8)}.json")
        alter(case, rows, strange("crawl/00000"), strange("crawl/00000"), noise("crawl"))
    else:
        alter(case, _tar, _tar, _tar, *strange_or_noise)
    if case.draw.random() < 0.2:
        words += ("--tokenizer", "bytes", "--template", "tiny")
    return Call("pipelines.preprocess", (*words, *PREPROCESS))


def _parquet(case: Case) -> str:
    return hostile_files.changed_parquet(case.draw, case.folder / "parquet" / "rows.parquet")


def _tar(case: Case) -> str:
    return hostile_files.changed_tar(case.draw, case.folder / "tars" / "part-000.tar", case.folder)


def made_on(case: Case) -> Call:
    """A folder of shards to which preprocess is asked to add what is missing."""
    case.need("source", "data")
    (case.folder / "data" / "manifest.json").unlink()
    alter(case, tree("data/receipts/mixed-000000.json"), strange("data"), strange("data"), noise("data"))
    words = ("--annotations", "source/rows.json", "--images", "source/images", "--name", "mixed", "--samples-per-shard", "16")
    return Call("pipelines.preprocess", (*words, "--out", "data", "--engine", "local", "--num-workers", "1"), ("data",))


def stream(case: Case) -> Call:
    """Training from tars."""
    case.need("tars")
    alter(case, _tar, _tar, _tar, strange("tars"), noise("tars"))
    words = (RECIPE, "--data.webdataset-urls", "tars/part-000.tar", *TRAIN)
    return Call("pipelines.pretrain", words, codes=(0, 2, 3))


def exported(case: Case) -> Call:
    """The exported processor and model, given what they do not expect."""
    told, run = hostile_exported.attack(case.draw, case.world / "exported")
    case.told.append(told)
    return Call("exported", (), codes=(0, 2), run=lambda: (run(), None)[1])


TARGETS: dict[str, tuple[Callable[[Case], Call], int]] = {
    "dataset": (dataset, 22),
    "run folder": (run_folder, 22),
    "sources": (sources, 16),
    "models": (hugging_face, 9),
    "authors' weights": (authors, 4),
    "tokenizer": (tokenizer, 5),
    "questions": (questions, 8),
    "features": (features, 6),
    "made on": (made_on, 4),
    "stream": (stream, 6),
    "exported": (exported, 10),
}
"""What a case can be, and how often of all. `serve` comes on its own: hostile_http.py."""
