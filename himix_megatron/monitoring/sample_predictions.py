"""The model's answers to a few fixed samples while it trains: images, question, expected and given answer.

Flows in: the run's datasets and its current weights; out: samples with answers, to show. Decoding is greedy, at the run's own
layout, by a second set of modules that shares the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from ..config import Config
from ..data.errors import BadSampleError
from ..data.images import image_file
from ..data.images.decode import decode
from ..data.loading.plan import SamplingPlan
from ..data.loading.webdataset_stream import Stream
from ..data.text import chat_template
from ..data.text.tokenizer import load_tokenizer
from ..distributed.fused_kernels import Kernels
from ..distributed.topology import Topology
from ..inference.generator import Answerer, Prompt
from ..model.himix_model import gather_parameters, unwrap_model
from ..model.towers import Tower
from ..runtime.failpoints import failpoint

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64
"""Of an answer; a longer one is truncated."""
WIDTH, PAD, TEXT_SIZE, LINE = 320, 10, 14, 19
"""Sizes of a drawn sample, in pixels."""
MOST_LINES = 6
"""Of each text that is drawn; the table beside the images holds all of it."""
PAPER, INK, WANTED, GIVEN = "#ffffff", "#1f2937", "#047857", "#1d4ed8"


@dataclass(frozen=True, slots=True)
class Question:
    """The first question of a sample."""

    key: str
    question: str
    expected: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with the model's answer."""

    key: str
    question: str
    expected: str
    given: str
    images: tuple[image_file.Pixels, ...]

    def drawn(self) -> npt.NDArray[np.uint8]:
        """uint8[height, width, 3]: the images as the tower gets them, side by side, with the texts below."""
        texts = (("Question", self.question, INK), ("Expected", self.expected, WANTED), ("Given", self.given, GIVEN))
        font = ImageFont.load_default(TEXT_SIZE)
        lines = [(line, colour) for name, text, colour in texts for line in _wrapped(f"{name}: {text}", font)]
        shown = _side_by_side(self.images)
        height = PAD + (shown.height + PAD if shown else 0)
        whole = Image.new("RGB", (WIDTH, height + LINE * len(lines) + PAD), PAPER)
        if shown:
            whole.paste(shown, (PAD, PAD))
        draw = ImageDraw.Draw(whole)
        for number, (line, colour) in enumerate(lines):
            draw.text((PAD, height + LINE * number), line, colour, font)
        return np.asarray(whole)


class SamplePredictions:
    """Answers the same samples every `log.predictions_interval_steps`. Every rank makes the same calls."""

    def __init__(
        self,
        config: Config,
        plan: SamplingPlan | Stream,
        kernels: Kernels,
        topology: Topology,
        model_chunks: list[Any],
        tower: Tower,
    ):
        """`plan`: the samples are chosen from it. `tower`: the frozen one; unused where the tower trains."""
        self.config, self.model_chunks = config, model_chunks
        self.questions: list[Question] = []
        if not config.log.predictions_interval_steps:
            return
        if not isinstance(plan, SamplingPlan):
            logger.info("no predictions are shown: a stream has no samples to choose from (--data.validation-path has)")
            return
        self.questions = list(choose(config, plan))
        trained: Any = unwrap_model(model_chunks[0]).tower if "tower" in config.train.trainable_parts else tower
        frozen = replace(config, train=replace(config.train, trainable_parts=("vision_kv",)))
        with torch.random.fork_rng(devices=[]):  # the random numbers of training stay the same
            self.answerer = Answerer(frozen, kernels, topology, trained)
        self.answerer.share(model_chunks)

    @torch.no_grad()
    def maybe_predict(self, step: int, *, last: bool) -> list[Answered]:
        """The samples with the model's answers now; empty unless it is time."""
        if not self.questions or not (last or step % self.config.log.predictions_interval_steps == 0):
            return []
        failpoint("validation/pictures", progress=True)
        gather_parameters(self.model_chunks)
        self.answerer.share(self.model_chunks)
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        stops = chat_template.end_of_turn(tokenizer, self.config.data.template)
        answers = self.answerer.answer([asked.prompt for asked in self.questions], stops, MAX_NEW_TOKENS)
        return [
            Answered(asked.key, asked.question, asked.expected, tokenizer.decode(ids).strip(), asked.prompt.images)
            for asked, ids in zip(self.questions, answers, strict=True)
        ]


def choose(config: Config, plan: SamplingPlan) -> Iterator[Question]:
    """Samples spread evenly over the data, with images if any have some; damaged ones are skipped."""
    datasets, data = plan.datasets, config.data
    fits = (datasets.text_tokens > 0) & (datasets.text_tokens <= data.max_text_tokens)
    seeing = np.flatnonzero(fits & (datasets.images > 0))
    numbers = seeing if len(seeing) else np.flatnonzero(fits)
    number_shown = min(config.log.predictions_samples, len(numbers))
    tokenizer = load_tokenizer(data.tokenizer)
    for index in np.linspace(0, len(numbers) - 1, number_shown).round().astype(int):
        dataset, number = datasets.locate(int(numbers[index]))
        try:
            conversation = dataset.text(number)
            images = tuple(decode(dataset.image_bytes(number, k), config.vision) for k in range(dataset.num_images(number)))
        except BadSampleError as error:
            logger.warning("%s cannot be shown: %s", dataset.key(number), error.detail)
            continue
        question, expected = chat_template.turns_of(conversation)[0]
        text = chat_template.prompt(conversation, tokenizer, data.template)
        yield Question(dataset.key(number), question, expected, Prompt(text.ids, images, text.image_places))


def _side_by_side(images: tuple[image_file.Pixels, ...]) -> Image.Image | None:
    """All images in one row of the full width."""
    if not images:
        return None
    row = Image.new("RGB", (sum(pixels.shape[2] for pixels in images), max(pixels.shape[1] for pixels in images)), PAPER)
    left = 0
    for pixels in images:
        row.paste(Image.fromarray(pixels.transpose(1, 2, 0)), (left, 0))
        left += pixels.shape[2]
    # No higher than wide: an image in its own aspect may be very narrow.
    scale = min((WIDTH - 2 * PAD) / row.width, WIDTH / row.height)
    return row.resize((max(1, round(scale * row.width)), max(1, round(scale * row.height))), Image.Resampling.LANCZOS)


def _wrapped(text: str, font: Any) -> list[str]:
    """Lines that fit the width; a long word is broken, and a long text ends in dots."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, font):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= WIDTH - 2 * PAD:
                lines[-1] = longer
            else:
                lines.append(piece)
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]


def _pieces(word: str, font: Any) -> Iterator[str]:
    while word:
        end = len(word)
        while end > 1 and font.getlength(word[:end]) > WIDTH - 2 * PAD:
            end -= 1
        yield word[:end]
        word = word[end:]
