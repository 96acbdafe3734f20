"""A few samples with their questions, looked at again and again while a run trains: picture, expected answer, given answer.

Flows in: the run's datasets and its weights as they are; out: pictures to show. The samples stay the same, so that one sees an
answer get better. Answers are greedy, at the run's own layout, by a second set of modules that uses the same weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from ..config import Config
from ..data.errors import BadSampleError
from ..data.images import image_file
from ..data.images.decode import decode
from ..data.loading.plan import SamplingPlan
from ..data.text import chat_template
from ..data.text.tokenizer import load_tokenizer
from ..distributed.megatron_config import gather_parameters
from ..inference.generator import Answerer, Prompt
from ..model.himix_model import unwrap_model
from ..runtime.failpoints import failpoint

if TYPE_CHECKING:
    from ..training.builder import TrainingComponents
    from ..training.resume import RunInputs

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 64
"""Of an answer; one that goes on longer is cut."""
WIDTH, PAD, TEXT_SIZE, LINE = 320, 10, 14, 19
"""Of a drawn sample, in pixels."""
MOST_LINES = 6
"""Of each text that is drawn; all of it is in the table beside the pictures."""
PAPER, INK, WANTED, GIVEN = "#ffffff", "#1f2937", "#047857", "#1d4ed8"


@dataclass(frozen=True, slots=True)
class Question:
    """A sample to look at: its first question."""

    key: str
    question: str
    expected: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Answered:
    """A sample with what the model says to it."""

    key: str
    question: str
    expected: str
    given: str
    images: tuple[image_file.Pixels, ...]

    def drawn(self) -> npt.NDArray[np.uint8]:
        """uint8[height, width, 3]: the images as the tower gets them, side by side, and the texts below."""
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
    """The samples of a run, answered at the intervals that `log` says. Every rank makes the same calls."""

    def __init__(self, config: Config, start: RunInputs, run: TrainingComponents):
        self.config, self.run = config, run
        self.questions: list[Question] = []
        if config.log.predictions_interval_steps:
            plan = start.held_out or start.plan
            assert isinstance(plan, SamplingPlan)  # Config has seen to it
            self.questions = list(choose(config, plan))
            self.answerer = answerer_of(config, start, run)

    @torch.no_grad()
    def maybe_predict(self, step: int, *, last: bool) -> list[Answered]:
        """The samples and what the model answers now; none of them when it is not time."""
        if not self.questions or not (last or step % self.config.log.predictions_interval_steps == 0):
            return []
        failpoint("validation/pictures", progress=True)
        gather_parameters(self.run.stages)
        self.answerer.share(self.run.stages)
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        stops = chat_template.end_of_turn(tokenizer, self.config.data.template)
        answers = self.answerer.answer([asked.prompt for asked in self.questions], stops, MAX_NEW_TOKENS)
        return [
            Answered(asked.key, asked.question, asked.expected, tokenizer.decode(ids).strip(), asked.prompt.images)
            for asked, ids in zip(self.questions, answers, strict=True)
        ]


def answerer_of(config: Config, start: RunInputs, run: TrainingComponents) -> Answerer:
    """One that answers with the run's weights, whatever trains."""
    frozen = replace(config, train=replace(config.train, trainable_parts=("vision_kv",)))
    tower: Any = unwrap_model(run.stages[0]).tower if "tower" in config.train.trainable_parts else run.encoder.tower
    with torch.random.fork_rng(devices=[]):  # training draws what it would have drawn
        answerer = Answerer(frozen, start.kernels, run.topology, tower)
    answerer.share(run.stages)
    return answerer


def choose(config: Config, plan: SamplingPlan) -> Iterator[Question]:
    """Samples spread evenly over the data: those with images, where there are any; damaged ones are passed over."""
    datasets, data = plan.datasets, config.data
    fits = (datasets.text_tokens > 0) & (datasets.text_tokens <= data.max_text_tokens)
    seeing = np.flatnonzero(fits & (datasets.images > 0))
    numbers = seeing if len(seeing) else np.flatnonzero(fits)
    number_shown = min(config.log.predictions_samples, len(numbers))
    tokenizer = load_tokenizer(data.tokenizer)
    for place in np.linspace(0, len(numbers) - 1, number_shown).round().astype(int):
        dataset, number = datasets.locate(int(numbers[place]))
        try:
            said = dataset.text(number)
            images = tuple(decode(dataset.image_bytes(number, k), config.vision) for k in range(dataset.num_images(number)))
        except BadSampleError as error:
            logger.warning("%s is not among the pictures: %s", dataset.key(number), error.detail)
            continue
        question, expected = chat_template.turns_of(said)[0]
        ids = chat_template.prompt(said, tokenizer, data.template)
        yield Question(dataset.key(number), question, expected, Prompt(ids, images))


def _side_by_side(images: tuple[image_file.Pixels, ...]) -> Image.Image | None:
    """All of them in one row as wide as the picture."""
    if not images:
        return None
    row = Image.fromarray(np.concatenate([pixels.transpose(1, 2, 0) for pixels in images], axis=1))
    scale = (WIDTH - 2 * PAD) / row.width
    return row.resize((WIDTH - 2 * PAD, max(1, round(scale * row.height))), Image.Resampling.LANCZOS)


def _wrapped(text: str, font: Any) -> list[str]:
    """Lines that fit; a word that does not is broken; what is too much ends in dots."""
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
