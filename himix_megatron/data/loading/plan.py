"""Plans which samples go into which pack, step, micro-batch and data rank. Flows in: a data position; out: the next steps.

The order (shuffle.py) is cut into windows, whose samples become packs (packing.py): of several samples, or without packing of
one sample each. A step takes the next `global_batch` packs; micro-batch j of data rank r holds the (j * D + r)-th run of
`micro_batch` of them. So every rank finds the same plan from (manifests, seed, place), any number of data ranks that divides
the batch reads the same global batches, and a place is four numbers.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...config import DataConfig, VisionConfig
from ..shards.reader import ShardDataset
from ..shards.shard_format import hash_of
from ..text.tokenizer import load_tokenizer
from . import token_counts
from .packing import plan_packs
from .shuffle import Mixture, Numbers, ShuffledOrder

log = logging.getLogger(__name__)

WINDOW = 8192
"""Samples among which packs are planned."""


@dataclass(frozen=True, slots=True)
class DataPosition:
    """Where in the data a run stands: the pack that comes next."""

    samples: int = 0
    """Samples behind it, those left out included; each counts once an epoch."""
    epoch: int = 0
    window: int = 0
    """Within the epoch."""
    pack: int = 0
    """Within the window."""


START = DataPosition()


@dataclass(frozen=True, slots=True)
class TrainingLength:
    """How long a run is: so many steps, or so many samples."""

    steps: int | None
    samples: int | None

    def reached(self, step: int, place: DataPosition) -> bool:
        """Whether nothing is left to do after so many steps, at this place."""
        return self.progress(step, place) >= 1

    def progress(self, step: int, place: DataPosition) -> float:
        """The part of the run that is done, 0 to 1 (more where the last step went beyond)."""
        if self.steps is not None:
            return step / self.steps
        assert self.samples is not None
        return place.samples / self.samples


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one optimizer step reads, over all ranks."""

    step: int
    packs: tuple[Numbers, ...]
    """For each pack the numbers of its samples."""
    after: DataPosition
    is_last: bool

    @property
    def num_samples(self) -> int:
        """Samples of the step, over all ranks."""
        return sum(map(len, self.packs))

    def share(self, data_rank: int, data_size: int, micro_batch: int) -> tuple[tuple[Numbers, ...], ...]:
        """The packs of each micro-batch of one data rank."""
        starts = range(data_rank * micro_batch, len(self.packs), data_size * micro_batch)
        return tuple(self.packs[start : start + micro_batch] for start in starts)


class Datasets:
    """One or several shard datasets, their samples numbered through; with what is known of texts and images unread."""

    def __init__(self, parts: Sequence[ShardDataset], data_config: DataConfig, vision: VisionConfig) -> None:
        """Raises: ValueError, as `token_counts.text_lengths`."""
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])
        self.text_tokens = np.concatenate(
            [token_counts.text_lengths(part, data_config.tokenizer, data_config.template) for part in parts]
        )
        """uint32[len]: of whole texts; 0: the template has no place for it."""
        self._places = [token_counts.ImagePlaces(part, data_config.tokenizer, data_config.template) for part in parts]
        self.images = np.concatenate([part.image_counts() for part in parts])
        """uint32[len]: images of each sample."""
        self.vision = vision

    @functools.cached_property
    def vision_tokens(self) -> npt.NDArray[np.uint32]:
        """uint32[len]: vision tokens of each sample's images. Packs are planned from it: workers do without."""
        vision = self.vision
        if vision.has_fixed_size:
            return self.images * np.uint32(vision.max_tokens_per_image)

        # The rule is plain Python, for one image: of photographs many have the same size.
        @functools.cache
        def of_size(width: int, height: int) -> int:
            return vision.num_tokens(vision.input_size(width, height))

        def tokens(widths: npt.NDArray[Any], heights: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
            return np.array([of_size(*size) for size in zip(widths.tolist(), heights.tolist(), strict=True)], np.int64)

        return np.concatenate([part.sum_over_images(tokens).astype(np.uint32) for part in self.parts])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "vision_tokens"}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def source(self, sample: int) -> int:
        """Which of the datasets a sample is in."""
        return int(np.searchsorted(self.ends, sample, side="right"))

    def locate(self, sample: int) -> tuple[ShardDataset, int]:
        """The dataset of a sample, and its number there."""
        part = self.source(sample)
        return self.parts[part], sample - int(self.ends[part]) + len(self.parts[part])

    def image_places(self, sample: int) -> tuple[int, ...]:
        """For each image of a sample the tokens of its whole text before it. Raises: DamagedShardError for a lost column."""
        return self._places[self.source(sample)].of(self.locate(sample)[1])

    def key(self, sample: int) -> str:
        """SHARD/KEY, for logs and errors."""
        dataset, number = self.locate(sample)
        return dataset.key(number)


class SamplingPlan:
    """The steps of a run. `images_without`: images that a sample without one counts for (1 with text_only_vision "zero_image").

    Raises: ValueError when nothing is left to train on, or too many texts have no place in the template.
    """

    def __init__(
        self, datasets: Datasets, data_config: DataConfig, *, seed: int, global_batch: int, images_without: int
    ) -> None:
        self.datasets, self.config, self.global_batch, self.seed = datasets, data_config, global_batch, seed
        self.shuffle = _shuffle(datasets, data_config)
        self._order = _order(datasets, data_config, seed, self.shuffle)
        self.images = np.maximum(datasets.images, images_without)
        """uint32[len]: images of each sample, the blank one that stands for "no image" counted."""
        self.text_tokens = np.minimum(datasets.text_tokens, data_config.max_text_tokens)
        """uint32[len]: tokens of each sample's text as it is read."""
        self._blank_tokens = images_without * datasets.vision.num_tokens(datasets.vision.blank_size)
        self._usable, self.left_out = self._choose()
        self.epoch_samples = len(datasets)
        self._windows: dict[tuple[int, int], list[Numbers]] = {}

    def _choose(self) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
        """Which samples are read, and how many are left out for which reason."""
        config, datasets = self.config, self.datasets
        unspelled = datasets.text_tokens == token_counts.UNUSABLE
        if unspelled.mean() > config.max_bad_fraction:
            raise ValueError(
                f"data.template {config.template} has no place for {int(unspelled.sum())} of {len(datasets)} samples (plain is "
                "for captions, not for several turns): choose another with --data.template"
            )
        reasons = {"no_place_in_template": unspelled}
        if config.overlong == "drop":
            reasons["too_long"] = datasets.text_tokens > config.max_text_tokens
        if config.pack_max_vision_tokens is not None:
            reasons["too_many_vision_tokens"] = self.vision_tokens(slice(None)) > config.pack_max_vision_tokens
        usable = ~np.any(list(reasons.values()), axis=0)
        if not usable.any():
            raise ValueError(
                f"of {len(datasets)} samples none can be read: {self.describe_left_out(reasons)} (--data.max-text-tokens, "
                "--data.overlong and --data.pack-max-vision-tokens decide)"
            )
        return usable, {reason: int(mask.sum()) for reason, mask in reasons.items() if mask.any()}

    def vision_tokens(self, samples: Numbers | slice) -> Numbers:
        """int64[n]: vision tokens of some samples, the blank image's counted."""
        datasets = self.datasets
        tokens = datasets.vision_tokens[samples].astype(np.int64)
        return np.where(datasets.images[samples] == 0, self._blank_tokens, tokens)

    @staticmethod
    def describe_left_out(reasons: Mapping[str, Any]) -> str:
        """`reason: number`, for logs and errors."""
        return ", ".join(f"{reason}: {int(np.sum(count))}" for reason, count in reasons.items())

    def window(self, epoch: int, number: int) -> list[Numbers]:
        """The packs of one window."""
        if (epoch, number) not in self._windows:
            first = number * WINDOW
            end = min(first + WINDOW, self.epoch_samples)
            samples = self._order.take(epoch * self.epoch_samples + first, epoch * self.epoch_samples + end)
            samples = samples[self._usable[samples]]
            vision = self.datasets.vision
            if self.config.pack_max_text_tokens is None or self.config.pack_max_vision_tokens is None:
                packs = list(samples[:, None])
            else:
                budgets = (self.config.pack_max_text_tokens, self.config.pack_max_vision_tokens)
                each = vision.max_tokens_per_image if vision.has_fixed_size else None
                chosen = plan_packs(self.text_tokens[samples], self.vision_tokens(samples), *budgets, image_tokens=each)
                packs = [samples[pack] for pack in chosen]
            self._windows = {(epoch, number): packs}
        return self._windows[epoch, number]

    def steps(self, end: TrainingLength, place: DataPosition = START, step: int = 0) -> Iterator[StepPlan]:
        """The steps from a place on, of which `step` are done (so the next has this number), to the end."""
        while not end.reached(step, place):
            packs: list[Numbers] = []
            while len(packs) < self.global_batch:
                place = self._take(place, packs)
            yield StepPlan(step, tuple(packs), place, end.reached(step + 1, place))
            step += 1

    def _take(self, place: DataPosition, packs: list[Numbers]) -> DataPosition:
        """Take what the batch lacks from the place's window. Returns: the place after it."""
        window = self.window(place.epoch, place.window)
        end = min(len(window), place.pack + self.global_batch - len(packs))
        taken = window[place.pack : end]
        packs += taken
        if end < len(window):
            return DataPosition(place.samples + sum(map(len, taken)), place.epoch, place.window, end)
        done = min((place.window + 1) * WINDOW, self.epoch_samples)
        samples = place.epoch * self.epoch_samples + done
        if done < self.epoch_samples:
            return DataPosition(samples, place.epoch, place.window + 1)
        return DataPosition(samples, place.epoch + 1)

    def expected_steps(self, end: TrainingLength) -> int:
        """About how many steps the whole run takes; exact without packing where no sample is left out."""
        if end.steps is not None:
            return end.steps
        assert end.samples is not None
        packs = self.window(0, 0)
        per_pack = min(WINDOW, self.epoch_samples) / max(1, len(packs))
        return max(1, math.ceil(end.samples / (per_pack * self.global_batch)))

    @property
    def sources(self) -> list[str]:
        """What `MicroBatch.sources` counts: the datasets' fingerprints."""
        return [part.fingerprint[:16] for part in self.datasets.parts]

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything that fixes which sample is in which step and how it is read, by the field that says it."""
        config = self.config
        tokenizer = load_tokenizer(config.tokenizer)
        return {
            "data.datasets": self.sources,
            "data.weights": list(config.weights),
            "data.shuffle": self.shuffle,
            "data.shuffle_shards": config.shuffle_shards if self.shuffle == "shards" else None,
            "data.tokenizer": tokenizer.fingerprint[:16],
            "data.template": config.template,
            "data.max_text_tokens": config.max_text_tokens,
            "data.overlong": config.overlong,
            "data.pack_max_text_tokens": config.pack_max_text_tokens,
            "data.pack_max_vision_tokens": config.pack_max_vision_tokens,
            "model.text_only_vision": int(self.images.min()),
            "train.seed": self.seed,
            f"train.global_batch_{'packs' if config.packs else 'samples'}": self.global_batch,
        }


def _shuffle(datasets: Datasets, config: DataConfig) -> Literal["samples", "shards"]:
    if config.shuffle != "auto":
        return config.shuffle
    return "shards" if any(part.is_remote for part in datasets.parts) else "samples"


def _order(datasets: Datasets, config: DataConfig, seed: int, shuffle: Literal["samples", "shards"]) -> ShuffledOrder | Mixture:
    at_once = config.shuffle_shards if shuffle == "shards" else None
    parts = datasets.parts
    if not config.weights:
        sizes = [size for part in parts for size in part.shard_sizes()]
        fingerprint = parts[0].fingerprint if len(parts) == 1 else hash_of([part.fingerprint for part in parts])
        return ShuffledOrder(sizes, seed, fingerprint, at_once)
    return Mixture([ShuffledOrder(part.shard_sizes(), seed, part.fingerprint, at_once) for part in parts], config.weights)
