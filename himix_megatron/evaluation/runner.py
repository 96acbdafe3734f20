"""Ask a benchmark's questions and score the answers; stop it at any time, and the same command asks what is missing.

Flows in: question files (questions.py), images, a model that answers; out: RUN/evaluation/NAME/ with every answer as it
came (answers-000.jsonl for each data-parallel rank) and the official answer files, RUN/evaluation/NAME.json with the figures,
and TensorBoard points. An answer counts again when its question is asked as before, of the same checkpoint and settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..data.errors import BadSampleError
from ..data.images.decode import decode
from ..data.text import chat_template
from ..data.text.tokenizer import load_tokenizer
from ..inference.generator import Answerer, Prompt
from ..runtime import typed_json
from ..runtime.durable_files import append_synced, publish
from ..runtime.log import clock
from ..runtime.untrusted_files import folder_below, open_below, read_below
from . import questions as read
from .scoring import gqa, mme, mmmu, mmvet, pope, textvqa, vqav2
from .scoring.base import Answered, Question, Tally
from .scoring.bootstrap import with_intervals

logger = logging.getLogger(__name__)


MAX_IMAGE_BYTES = 256 << 20
BATCHES_APART = 20
"""Replicas wait for each other after this many batches: at the end, hours apart, the wait could outlast the ranks' timeout."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One of the paper's seven."""

    read: Callable[[Path, Path | None], list[Question]]
    """Questions and annotations, as files or folders, to questions."""
    files: Callable[[Sequence[Answered]], dict[str, str]]
    """Official answer files: names and contents."""
    max_new_tokens: int
    """An answer that goes on longer is cut. Source: lmms-eval's task files, and LLaVA's scripts for MM-Vet."""
    tallies: Callable[[Sequence[Answered]], list[Tally]] | None = None
    figures: Callable[[Mapping[str, float]], dict[str, float]] | None = None
    """None: scored elsewhere."""
    elsewhere: str = "the right answers are not public"
    """Why there are no figures, and who has them."""


BENCHMARKS = {
    "vqav2": Benchmark(
        read.vqav2, vqav2.files, 16, vqav2.tallies, vqav2.figures, "without --annotations: submit to the VQA server on EvalAI"
    ),
    "gqa": Benchmark(read.gqa, gqa.files, 16, gqa.tallies, gqa.figures),
    "textvqa": Benchmark(read.textvqa, textvqa.files, 16, textvqa.tallies, textvqa.figures),
    "pope": Benchmark(read.pope, pope.files, 16, pope.tallies, pope.figures),
    "mme": Benchmark(read.mme, mme.files, 16, mme.tallies, mme.figures),
    "mmmu": Benchmark(read.mmmu_rows, mmmu.files, 128, mmmu.tallies, mmmu.figures),
    "mmvet": Benchmark(read.mmvet, mmvet.files, 1024, elsewhere="a GPT-4 judge scores MM-Vet: hand it mmvet_results.json"),
}


Bad = tuple[str | int, str]
"""A question that cannot be asked, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be asked, read and checked before any rank waits for another."""

    name: str
    """Of the results: RUN/evaluation/NAME."""
    benchmark: Benchmark
    questions: list[Question]
    images: Path
    """Folder of the questions' images."""
    max_new_tokens: int
    batch_questions: int
    max_bad_fraction: float


def read_questions(kind: str, questions: Path, annotations: Path | None, most: int | None) -> list[Question]:
    """A benchmark's questions, at most `most`. Raises: ValueError if the files are not this benchmark's."""
    for path in (questions, *([annotations] if annotations else [])):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    try:
        found = BENCHMARKS[kind].read(questions, annotations)[:most]
        times_by_id = Counter(question.id for question in found)
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{questions} is not this benchmark's file: {type(error).__name__}: {error}") from None
    if not found:
        raise ValueError(f"{questions} holds no questions")
    identifier, times = times_by_id.most_common(1)[0]
    if times > 1:
        raise ValueError(f"{questions} has {times} questions with the id {identifier}: ids must be unique")
    # What has no place in the answer file (half of an MME image's questions, say) is found before hours of asking.
    BENCHMARKS[kind].files([(question, "") for question in found])
    return found


def image_folder(kind: str, questions: Path, images: Path | None) -> Path:
    """Where the images are; MME's lie beside its questions. Raises: ValueError if that is not known."""
    folder = questions if images is None and kind == "mme" and questions.is_dir() else images
    if folder is None or not folder.is_dir():
        raise ValueError("--images must be given: the folder of the images" if folder is None else f"{folder}: no such folder")
    return folder


def check_images(job: Job) -> None:
    """Raises: ValueError where more images cannot be read than may be, as far as shows without reading them."""
    faults: dict[str, str] = {}
    for file in dict.fromkeys(file for q in job.questions for file in q.images):
        try:
            open_below(job.images, file).close()
        except (OSError, ValueError) as error:
            faults[file] = f"{file} is missing" if isinstance(error, FileNotFoundError) else str(error)
    found = ((q.id, [faults[file] for file in q.images if file in faults]) for q in job.questions)
    check_bad(job, [(identifier, reasons[0]) for identifier, reasons in found if reasons])


def check_bad(job: Job, bad: Sequence[Bad]) -> None:
    """Raises: ValueError where more questions cannot be asked than may be."""
    if len(bad) > job.max_bad_fraction * len(job.questions):
        examples = "; ".join(f"{identifier}: {reason}" for identifier, reason in bad[:3])
        raise ValueError(
            f"{len(bad)} of {len(job.questions)} questions have an image in {job.images} that cannot be read, more than "
            f"--max-bad-fraction {job.max_bad_fraction}: {examples}"
        )


# ---- answers on disk -----------------------------------------------------------------------------------------------


class AnswerFolder:
    """RUN/evaluation/NAME: the settings, and the answers so far. Rank 0 reads; one rank of each replica writes its own file."""

    def __init__(self, run_dir: Path, name: str):
        self.run_dir, self.folder = run_dir, run_dir / "evaluation" / name

    def begin(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Answers there are under the same settings, by `asked`; under other ones they are removed, and it is said which."""
        path = self.folder / "settings.json"
        folder_below(self.run_dir, f"evaluation/{self.folder.name}")
        before = typed_json.read_object(path) if path.is_file() else None
        files = sorted(self.folder.glob("answers-*.jsonl"))
        if before != settings:
            if before is not None and files:
                names = [name for name in settings if before.get(name) != settings[name]]
                changed = ", ".join(f"{name} (was {before.get(name)}, is {settings[name]})" for name in names)
                logger.warning("%s: starting anew, the answers there are of another %s", self.folder, changed)
            for file in files:
                file.unlink()
            publish(path, (json.dumps(settings, indent=2) + "\n").encode())
            return {}
        found: dict[str, str] = {}
        for file in files:
            # What follows the last line break is half a line that a killed run left; the next answer must not join it.
            whole, _, rest = read_below(self.folder, file.name).rpartition(b"\n")
            if rest:
                os.truncate(file, len(whole) + 1 if whole else 0)
            rows = [typed_json.parse_object(line, str(file)) for line in whole.splitlines()]
            found |= {str(row.get("asked")): str(row.get("answer")) for row in rows}
        return found

    def append(self, data_rank: int, answers: Sequence[tuple[Question, str]]) -> None:
        """Add answers, on the disk when this returns."""
        rows = ({"id": question.id, "asked": asked(question), "answer": answer} for question, answer in answers)
        append_synced(self.folder / f"answers-{data_rank:03d}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def asked(question: Question) -> str:
    """What stands for a question as it is asked: its id, prompt and images."""
    text = json.dumps([question.id, question.prompt, question.images])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def settings_of(job: Job, config: Config, checkpoint: Path) -> dict[str, Any]:
    """Whatever changes answers to the same questions. Layout, batch size and number of ranks do not."""
    written = (checkpoint / "himix.json").stat().st_mtime
    return {
        "checkpoint": checkpoint.name,
        # A retrained run has checkpoints of the same names: when this one was written tells it apart.
        "checkpoint written": datetime.fromtimestamp(written, UTC).isoformat(),
        "precision": config.train.precision,
        "text_only": config.model.text_only_vision,
        "tokenizer": load_tokenizer(config.data.tokenizer).fingerprint,
        "template": config.data.template,
        "images": str(job.images.resolve()),
        "resize": f"{config.vision.resize} {config.vision.interpolation} {config.vision.image_size}",
        "max_new_tokens": job.max_new_tokens,
    }


# ---- asking --------------------------------------------------------------------------------------------------------


def collect(job: Job, run_dir: Path, config: Config, checkpoint: Path, answerer: Answerer) -> tuple[dict[str, str], list[Bad]]:
    """Ask what has no answer yet; every rank calls it. Returns, on rank 0: all answers by `asked`, and what cannot be asked."""
    topology = answerer.topology
    store = AnswerFolder(run_dir, job.name)
    known = store.begin(settings_of(job, config, checkpoint)) if topology.rank == 0 else {}
    # One rank decides, so that all ask for the same; and none writes before the folder is ready.
    box: list[Any] = [[number for number, question in enumerate(job.questions) if asked(question) not in known]]
    torch.distributed.broadcast_object_list(box, src=0)
    missing = [job.questions[number] for number in box[0]]
    logger.info("%s: %d questions, %d answered before", job.name, len(job.questions), len(job.questions) - len(missing))
    replicas: list[Any] = [None] * topology.data_size
    torch.distributed.all_gather_object(replicas, ask(job, missing, config, answerer, store), group=topology.data)
    for answers, _ in replicas:
        known |= answers
    return known, [item for _, bad in replicas for item in bad]


def ask(
    job: Job, questions: Sequence[Question], config: Config, answerer: Answerer, store: AnswerFolder
) -> tuple[dict[str, str], list[Bad]]:
    """This replica's share of the questions. Returns: its answers by `asked`, and what could not be asked."""
    topology, tokenizer = answerer.topology, load_tokenizer(config.data.tokenizer)
    stops = chat_template.end_of_turn(tokenizer, config.data.template)
    mine = questions[topology.data_rank :: topology.data_size]
    answers: dict[str, str] = {}
    bad: list[Bad] = []
    started = time.perf_counter()
    longest = -(-len(questions) // topology.data_size)  # every replica makes the same rounds
    for turn, first in enumerate(range(0, longest, job.batch_questions), 1):
        batch, prompts = [], []
        for question in mine[first : first + job.batch_questions]:
            try:
                pictures = tuple(
                    decode(read_below(job.images, file, MAX_IMAGE_BYTES), config.vision) for file in question.images
                )
            except (BadSampleError, OSError, ValueError) as error:
                bad.append((question.id, str(error)))
                logger.warning("%s: question %s cannot be asked: %s", job.name, *bad[-1])
                continue
            turns = chat_template.with_marks([{"from": "human", "value": question.prompt}], len(pictures))
            text = chat_template.prompt({"conversations": turns}, tokenizer, config.data.template)
            prompts.append(Prompt(text.ids, pictures, text.image_places))
            batch.append(question)
        said = answerer.answer(prompts, stops, job.max_new_tokens) if prompts else []
        new = [(question, tokenizer.decode(ids).strip()) for question, ids in zip(batch, said, strict=True)]
        if topology.replica_rank == 0:
            store.append(topology.data_rank, new)
        answers |= {asked(question): answer for question, answer in new}
        done = min(first + job.batch_questions, longest)
        remaining = (time.perf_counter() - started) * (longest - done) / done
        logger.info("%s: %d/%d questions of each replica, remaining %s", job.name, done, longest, clock(remaining))
        if turn % BATCHES_APART == 0:
            torch.distributed.barrier()
    return answers, bad


# ---- scores --------------------------------------------------------------------------------------------------------


def conclude(job: Job, run_dir: Path, step: int, known: Mapping[str, str], bad: Sequence[Bad]) -> dict[str, Any]:
    """Print what NAME.json holds, then write it, official answer files and TensorBoard points; the answer to what could not be
    asked is empty.

    Returns: what NAME.json holds. Raises: ValueError where too much could not be asked.
    """
    check_bad(job, bad)
    answered = [(question, known.get(asked(question), "")) for question in job.questions]
    folder = run_dir / "evaluation" / job.name
    files, points = job.benchmark.files(answered), {}
    result: dict[str, Any] = {
        "benchmark": job.name,
        "step": step,
        "questions": len(job.questions),
        "unreadable": {str(identifier): reason for identifier, reason in bad},
        "answer_files": [str(folder / name) for name in files],
    }
    if job.benchmark.tallies is None or job.benchmark.figures is None or not all(q.gold for q in job.questions):
        result["scored"] = f"elsewhere: {job.benchmark.elsewhere}"
    else:
        figures = with_intervals(job.benchmark.tallies(answered), job.benchmark.figures)
        result["figures"] = {name: asdict(figure) for name, figure in figures.items()}
        points = {name: figure.value for name, figure in figures.items()}
    print(json.dumps(result, indent=2), flush=True)  # first: a disk may be full
    for name, content in files.items():
        publish(folder / name, content.encode())
    publish(folder.parent / f"{job.name}.json", (json.dumps(result, indent=2) + "\n").encode())
    if points:
        to_tensorboard(run_dir, job.name, step, points)
    return result


def to_tensorboard(run_dir: Path, name: str, step: int, values: Mapping[str, float]) -> None:
    """A point for each figure, at the checkpoint's step."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder_below(run_dir, "tensorboard"))) as writer:
        for figure, value in values.items():
            writer.add_scalar(f"evaluation/{name}/{figure}".replace(" ", "_"), value, step)
