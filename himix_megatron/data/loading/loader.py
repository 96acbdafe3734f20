"""Steps planned in, `StepBatch` out: the plan made real by reading, tokenizing and decoding, in worker processes or here.

The training process plans (plan.py) and hands each step to a worker, which reads what this rank needs of it: the texts where
its pipeline stage reads any, and its share of the images. A step is a pure function of its plan, so workers have no state.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...config import VisionConfig, check_batch
from ...runtime.failpoints import failpoint
from ...runtime.process import die_with_parent
from ..errors import BadSampleError
from ..text import chat_template
from ..text.chat_template import EncodedText
from ..text.tokenizer import load_tokenizer
from .batch import StepBatch, collate, mask_samples
from .image_table import ImageTable, Size, image_share
from .plan import SamplingPlan, StepPlan
from .shuffle import Numbers
from .vision_reader import FeatureReader, PixelReader

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSpec:
    """What of each step one rank reads."""

    data_rank: int = 0
    data_size: int = 1
    """Which micro-batches."""
    texts: bool = True
    """Middle pipeline stages need the shape of the texts only, which the plan knows."""
    image_rank: int = 0
    image_size: int = 1
    """Which of their images: part `image_rank` of `image_size` (the ranks of a replica that share the work)."""


class StepReader(Dataset[StepBatch]):
    """Reads planned steps as one rank sees them: `reader[step_plan]`.

    Texts are padded to a multiple of `pad_multiple` tokens, the same length for all micro-batches of a step. With `features`
    these are read, and no image is.
    Raises: ValueError when the global batch does not divide.
    """

    def __init__(
        self,
        plan: SamplingPlan,
        *,
        vision_config: VisionConfig,
        micro_batch: int,
        reads: ReadSpec,
        pad_multiple: int = 1,
        features: FeatureReader | None = None,
    ) -> None:
        check_batch(plan.global_batch, reads.data_size, micro_batch)
        # What workers get: they need no order, no packs.
        self.datasets, self.config, self.vision_config = plan.datasets, plan.config, vision_config
        self.vision = features or PixelReader(vision_config, self.config.decode)
        self.text_tokens, self.images = plan.text_tokens, plan.images
        self.micro_batch, self.reads, self.pad_multiple = micro_batch, reads, pad_multiple
        self.tokenizer = load_tokenizer(self.config.tokenizer)

    def __getitem__(self, step: StepPlan) -> StepBatch:
        """Read one step. Raises: OSError when the machine fails, naming the sample."""
        failpoint("data/read")
        reads = self.reads
        parts = step.share(reads.data_rank, reads.data_size, self.micro_batch)
        samples = np.concatenate([pack for part in parts for pack in part]).tolist()
        lengths = self.text_tokens[samples]
        known = [self._known(i, length) for i, length in zip(samples, lengths.tolist(), strict=True)]
        keys, sizes, places = [key for key, _, _ in known], [own for _, own, _ in known], [own for _, _, own in known]
        sources = [self.datasets.source(i) for i in samples]
        texts = [self._text(i, key) if reads.texts else None for i, key in zip(samples, keys, strict=True)]
        bad_texts = {slot for slot, text in enumerate(texts) if text is None} if reads.texts else set()

        numbered = [(slot, k) for slot, own in enumerate(sizes) for k in range(len(own))]
        has_none = (self.datasets.images[samples] == 0).tolist()
        blank = torch.tensor([slot in bad_texts or has_none[slot] for slot, _ in numbered], dtype=torch.bool)
        table = ImageTable.of(self.vision_config, sizes, places)
        share = image_share(table, self.vision_config, reads.image_rank, reads.image_size)
        wanted = [None if blank[n] else (samples[numbered[n][0]], numbered[n][1]) for n in share]
        pixels, bad_images = self._images(table.images_of(share), wanted)
        for n in bad_images:
            blank[share[n]] = True
        bad = sorted(bad_texts | {numbered[share[n]][0] for n in bad_images})

        failpoint("data/collate")
        longest = max(self._width(part) for part in parts)
        padded = -(-longest // self.pad_multiple) * self.pad_multiple
        micro_batches, first = [], 0
        for part in parts:
            own = slice(first, first + sum(map(len, part)))
            first = own.stop
            images = ImageTable.of(self.vision_config, sizes[own], places[own])
            facts = (lengths[own].tolist(), images, keys[own], sources[own])
            micro_batches.append(collate(texts[own], *facts, padded, packed=self.config.packs))
        batch = StepBatch(
            step=step.step,
            micro_batches=tuple(micro_batches),
            blank=blank,
            pixels=pixels,
            bad_keys=tuple(keys[slot] for slot in bad),
            after=step.after,
            is_last=step.is_last,
            num_samples=step.num_samples,
            bad_samples=tuple(bad),
            num_cut=int((self.datasets.text_tokens[samples] > lengths).sum()),
            num_sources=len(self.datasets.parts),
        )
        return mask_samples(batch, bad)

    def _width(self, part: tuple[Numbers, ...]) -> int:
        """Tokens that a micro-batch needs in its longest row."""
        rows = [self.text_tokens[pack] for pack in part]
        return max(int(row.sum()) for row in rows)

    def _text(self, i: int, key: str) -> EncodedText | None:
        """A sample's text; None where its bytes are damaged."""
        dataset, number = self.datasets.locate(i)
        with _naming(key):
            try:
                sample = dataset.text(number)
            except BadSampleError as error:
                log.warning("%s is left out of the loss: %s", key, error.detail)
                return None
            text = chat_template.encode(sample, self.tokenizer, self.config.template, self.config.max_text_tokens)
            if len(text.ids) != self.text_tokens[i]:
                raise RuntimeError(
                    f"its text has {len(text.ids)} tokens, and {self.text_tokens[i]} were counted before: the tokenizer gives "
                    f"other ids than it did, delete {dataset.path}/lengths"
                )
            return text

    def _known(self, i: int, length: int) -> tuple[str, list[Size], list[int]]:
        """What is known of a sample unread, all at once, while its shard's index is at hand: its key; of each image, or of the
        blank one in their place, (width, height) as the tower gets it, and how many of the `length` text tokens come before."""
        vision, datasets, count = self.vision_config, self.datasets, int(self.images[i])
        dataset, number = datasets.locate(i)
        if not datasets.images[i]:
            return dataset.key(number), [vision.blank_size] * count, [0] * count
        sizes = [vision.blank_size] * count
        if not vision.has_fixed_size:
            sizes = [vision.input_size(*dataset.image_size(number, k)) for k in range(count)]
        return dataset.key(number), sizes, [min(place, length) for place in datasets.image_places(i)]

    def _images(self, images: ImageTable, wanted: list[tuple[int, int] | None]) -> tuple[Tensor, list[int]]:
        """Read images (sample, image); None: a blank one. Returns: pixels or features, and which are damaged."""
        found, damaged = self.vision.blanks(images), []
        for n, (place, named) in enumerate(zip(images.split(found), wanted, strict=True)):
            if named is None:
                continue
            i, k = named
            dataset, number = self.datasets.locate(i)
            with _naming(self.datasets.key(i)):
                try:
                    self.vision.read_into(place, dataset, number, k)
                except BadSampleError as error:
                    log.warning("%s is left out of the loss: image %d, %s", self.datasets.key(i), k, error.detail)
                    damaged.append(n)
        return found, damaged


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Whatever goes wrong says at which sample."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"while reading {key}")
        raise


def step_loader(reader: StepReader, steps: Iterable[StepPlan], num_workers: int) -> Iterator[StepBatch]:
    """The planned steps, read in order; read ahead by worker processes (0: read here, when asked for)."""
    return iter(
        DataLoader(
            reader,
            batch_size=None,
            sampler=steps,
            **worker_options(num_workers),
        )
    )


def worker_options(num_workers: int) -> dict[str, Any]:
    """What a DataLoader of steps needs, so that its workers start clean, die with this process and leave its state alone."""
    return {
        "num_workers": num_workers,
        "collate_fn": _as_it_is,
        "generator": torch.Generator(),  # else each loader would draw a number from the training's random state
        "worker_init_fn": die_with_parent if num_workers else None,
        "multiprocessing_context": _fork_server() if num_workers else None,
    }


def _as_it_is(batch: Any) -> Any:
    return batch


def _fork_server() -> multiprocessing.context.ForkServerContext:
    """Where workers are forked from: a clean process. Forking this one would copy the locks that gloo's, NCCL's and the
    autograd threads may hold at that moment, and an initialised CUDA.

    The server imports torch and the program once, so that each worker starts in a fraction of a second.
    """
    context = multiprocessing.get_context("forkserver")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    context.set_forkserver_preload([__name__] + ([spec.name] if spec else []))
    return context
