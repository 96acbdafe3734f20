"""Exact-match accuracy on a shard dataset: every question is asked, and an answer counts if it equals the expected one.

Flows in: a shard dataset and a model that answers; out: the answers in the order of the questions. Asked a second time with
the images of other samples, the same questions show what the model knows from the text alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Config, VisionConfig
from ..data.errors import BadSampleError
from ..data.images import image_file
from ..data.images.decode import decode
from ..data.loading.shuffle import permutation
from ..data.shards.reader import ShardDataset
from ..data.text import chat_template
from ..data.text.tokenizer import load_tokenizer
from ..distributed.topology import Topology
from ..inference.generator import Answerer, Prompt
from ..runtime.log import clock

logger = logging.getLogger(__name__)

UNREADABLE = "(an image could not be read)"
"""The answer to a question whose image is damaged: it counts as wrong."""


@dataclass(frozen=True, slots=True)
class Question:
    """One turn of one sample."""

    sample: int
    turn: int
    asked: str
    expected: str


def questions(dataset: ShardDataset, max_samples: int | None) -> list[Question]:
    """Every turn, in the dataset's order. Raises: ValueError if there is none."""
    found = []
    for sample in range(min(len(dataset), max_samples or len(dataset))):
        for turn, (asked, expected) in enumerate(chat_template.turns_of(dataset.text(sample))):
            found.append(Question(sample, turn, asked, expected))
    if not found:
        raise ValueError(f"{dataset.path} holds no questions: every row was quarantined")
    return found


def partners(dataset: ShardDataset, seed: int) -> dict[int, int]:
    """For each sample with images, the sample whose images it gets when they are shuffled; itself if it is the only one."""
    seeing = [sample for sample in range(len(dataset)) if dataset.num_images(sample)]
    order = [seeing[i] for i in permutation(len(seeing), seed, 0, "shuffled images")]
    return dict(zip(order, order[1:] + order[:1], strict=True))


def batches(items: Sequence[Question], topology: Topology, size: int) -> Iterator[list[Question]]:
    """This replica's questions, in batches; every replica gets the same number of batches."""
    own = list(items[topology.data_rank :: topology.data_size])
    most = -(-len(items) // topology.data_size)
    for first in range(0, most, size):
        yield own[first : first + size]


def pictures_of(dataset: ShardDataset, sample: int, vision: VisionConfig) -> tuple[image_file.Pixels, ...] | None:
    """A sample's images as the tower wants them; None, and a log line that names the sample, if one is damaged."""
    try:
        return tuple(decode(dataset.image_bytes(sample, k), vision) for k in range(dataset.num_images(sample)))
    except BadSampleError as error:
        logger.warning("%s counts as wrong: %s", dataset.key(sample), error.detail)
        return None


def ask(
    config: Config,
    answerer: Answerer,
    dataset: ShardDataset,
    items: Sequence[Question],
    source: Mapping[int, int],
    *,
    batch_questions: int,
    max_new_tokens: int,
) -> list[str]:
    """The answers to this replica's questions, in its order. `source`: for a sample, the sample whose images it is shown."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    template = config.data.template
    stops = chat_template.end_of_turn(tokenizer, template)
    answers: list[str] = []
    started = time.perf_counter()
    for batch in batches(items, answerer.topology, batch_questions):
        pictures = [pictures_of(dataset, source.get(q.sample, q.sample), config.vision) for q in batch]
        texts = [chat_template.prompt(dataset.text(q.sample), tokenizer, template, q.turn) for q in batch]
        prompts = [
            Prompt(text.ids, seen, text.image_places) for text, seen in zip(texts, pictures, strict=True) if seen is not None
        ]
        found = answerer.answer(prompts, stops, max_new_tokens) if prompts else []
        given = iter(tokenizer.decode(ids).strip() for ids in found)
        answers += [UNREADABLE if seen is None else next(given) for seen in pictures]
        done = min(len(answers) * answerer.topology.data_size, len(items))
        remaining = (time.perf_counter() - started) * (len(items) - done) / max(done, 1)
        logger.info("%d/%d questions, remaining %s", done, len(items), clock(remaining))
    return answers


def everyone(own: list[str], items: Sequence[Question], topology: Topology) -> list[str]:
    """All replicas' answers, back in the questions' order."""
    parts: list[Any] = [None] * topology.data_size
    torch.distributed.all_gather_object(parts, own, group=topology.data)
    merged = [""] * len(items)
    for rank, part in enumerate(parts):
        merged[rank :: topology.data_size] = part
    return merged
