"""What a launch needs that every rank finds out by itself, before ranks meet: its data, its length and its kernels.

Flows in: Config; out: `RunInputs`, or one line that says what is wrong; later the batches that this rank reads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.description import Position
from ..config import Config, DataConfig, read_config
from ..data.loading.batch import StepBatch
from ..data.loading.feature_cache import FeatureCache, feature_key
from ..data.loading.loader import ReadSpec, StepReader, step_loader
from ..data.loading.plan import DataPosition, Datasets, SamplingPlan, StepPlan, TrainingLength
from ..data.loading.vision_reader import FeatureReader
from ..data.loading.webdataset_stream import Stream, stream_steps
from ..data.shards.reader import ShardDataset
from ..data.text.chat_template import check_tokenizer
from ..data.text.tokenizer import load_tokenizer
from ..distributed.fused_kernels import Kernels, detect
from ..distributed.megatron_config import attention_core, check_fp8, check_graphs, check_optimizer, params_dtype, text_multiple
from ..distributed.topology import Topology
from ..model.vision_encoder import encoder_share

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """What a launch reads and how it computes; the same on every rank."""

    plan: SamplingPlan | Stream
    held_out: SamplingPlan | None
    """The validation set, if there is one."""
    features: tuple[FeatureCache, ...]
    """Cached features of the plan's datasets; empty: images are read."""
    held_out_features: tuple[FeatureCache, ...]
    length: TrainingLength
    kernels: Kernels
    previous: Config | None
    """The settings of the run's last launch, if there was one."""

    @property
    def planned_steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.expected_steps(self.length)


def prepare_inputs(config: Config, data_size: int) -> RunInputs:
    """Open the data and check that this machine can run the configuration. Raises: ValueError for a mistake of the user."""
    if not config.data.datasets and not config.data.webdataset_urls:
        raise ValueError(
            f"recipe {config.recipe} has no data of its own: give --data.datasets, a folder that pipelines.preprocess wrote"
        )
    stop = stop_file(config)
    if stop.is_file() and not config.run.ignore_stop_file:
        raise ValueError(f"{stop} says: {stop.read_text().strip()} (to continue anyway: --run.ignore-stop-file)")
    kernels = detect()
    attention_core(config, kernels)
    check_fp8(config, kernels)
    check_graphs(config, kernels)
    check_optimizer(config)
    check_text(config)
    plan = make_stream(config, data_size) if config.data.webdataset_urls else make_plan(config, config.data)
    held_out = None
    if config.data.validation_path is not None:
        held_out = make_plan(
            config, replace(config.data, datasets=(config.data.validation_path,), weights=(), webdataset_urls=())
        )
    settings = config.run_dir / "config.json"
    return RunInputs(
        plan=plan,
        held_out=held_out,
        features=open_features(config, plan, config.data.features),
        held_out_features=open_features(config, held_out, config.data.validation_features),
        length=training_length(config, plan),
        kernels=kernels,
        previous=read_config(settings) if settings.is_file() else None,
    )


def stop_file(config: Config) -> Path:
    """Holds the reason why a run stopped on purpose; while it exists the run does not start without --run.ignore-stop-file."""
    return config.run_dir / "STOP"


def check_text(config: Config) -> None:
    """Raises: ValueError if the tokenizer lacks what the template needs, or has more tokens than the embedding has rows."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(tokenizer, config.data.template)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
            f"{config.model.vocab_size}: it is another model's tokenizer"
        )


def make_plan(config: Config, data: DataConfig) -> SamplingPlan:
    """The plan over the datasets of a data section, for this run's seed and batch. Raises: ValueError, as `ShardDataset`."""
    cache_dir = None if data.cache_dir is None else Path(data.cache_dir)
    cache_bytes = int(data.cache_gib * 2**30)
    parts = [ShardDataset(path, cache_dir=cache_dir, cache_bytes=cache_bytes) for path in data.datasets]
    datasets = Datasets(parts, data, config.vision)
    plan = SamplingPlan(
        datasets, data, seed=config.train.seed, global_batch=config.global_batch, images_without=config.model.images_without
    )
    if plan.left_out:
        logger.warning("%s: samples left out: %s", " ".join(data.datasets), plan.describe_left_out(plan.left_out))
    return plan


def make_stream(config: Config, data_size: int) -> Stream:
    """The tars of `data.webdataset_urls`.

    Raises: ValueError, as `Stream`; also for a run without an end, or with more data ranks than tars.
    """
    if config.train.steps is None:
        raise ValueError("data.webdataset_urls has no end, so epochs cannot be counted: give --train.steps")
    stream = Stream(
        config.data, seed=config.train.seed, global_batch=config.global_batch, images_without=config.model.images_without
    )
    stream.check_ranks(data_size)
    return stream


def open_features(
    config: Config, plan: SamplingPlan | Stream | None, folders: tuple[str, ...] | str | None
) -> tuple[FeatureCache, ...]:
    """The cached features of a plan's datasets. Raises: ValueError if another kind of tower or preprocessing made them."""
    if not folders or not isinstance(plan, SamplingPlan):
        return ()
    folders = (folders,) if isinstance(folders, str) else folders
    caches = tuple(FeatureCache(folder, part) for folder, part in zip(folders, plan.datasets.parts, strict=True))
    for cache in caches:
        cache.check(feature_key(config, cache.dataset))
        found, wanted = len(cache.blank()), config.vision.num_tokens(config.vision.blank_size)
        if found != wanted:
            raise ValueError(
                f"data.features: {cache.folder} has {found} tokens of the blank image, but here vision.tower "
                f"{config.vision.tower} gives it {wanted}: encode again with python -m pipelines.encode"
            )
    return caches


def training_length(config: Config, plan: SamplingPlan | Stream) -> TrainingLength:
    """How long the run is, in steps or in samples."""
    if config.train.steps is not None:
        return TrainingLength(config.train.steps, None)
    assert isinstance(plan, SamplingPlan)
    return TrainingLength(None, max(1, math.ceil(config.train.epochs * plan.epoch_samples)))


# ---- what this rank reads ------------------------------------------------------------------------------------------


def reads_of(config: Config, topology: Topology) -> ReadSpec:
    """Which samples and images this rank reads."""
    image_rank, image_size = encoder_share(config, topology)
    return ReadSpec(
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        texts=topology.is_first_stage or topology.is_last_stage,
        image_rank=image_rank,
        image_size=image_size,
    )


def step_reader(config: Config, plan: SamplingPlan, topology: Topology, features: Sequence[FeatureCache] = ()) -> StepReader:
    """Reads this rank's part of a plan's steps; `features` instead of images where they are given."""
    return StepReader(
        plan,
        vision_config=config.vision,
        micro_batch=config.micro_batch,
        reads=reads_of(config, topology),
        pad_multiple=text_multiple(config),
        features=FeatureReader(features, params_dtype(config)) if features else None,
    )


def batches_from(
    config: Config, inputs: RunInputs, topology: Topology, position: Position, rollback_data_offsets: Mapping[int, DataPosition]
) -> Iterator[StepBatch]:
    """This rank's part of the remaining steps. `rollback_data_offsets`: where rollbacks made the data continue, by step."""
    if isinstance(inputs.plan, Stream):
        return stream_steps(
            inputs.plan,
            vision_config=config.vision,
            micro_batch=config.micro_batch,
            reads=reads_of(config, topology),
            end=inputs.length,
            place=rollback_data_offsets.get(position.step, position.place),
            step=position.step,
            pad_multiple=text_multiple(config),
        )
    steps = planned(inputs.plan, inputs.length, position, rollback_data_offsets)
    return step_loader(step_reader(config, inputs.plan, topology, inputs.features), steps, config.data.num_workers)


def planned(
    plan: SamplingPlan, length: TrainingLength, position: Position, rollback_data_offsets: Mapping[int, DataPosition]
) -> Iterator[StepPlan]:
    """The plan's remaining steps, with the jumps in the data that rollbacks made."""
    step, place = position.step, position.place
    while not length.reached(step, place):
        for planned_step in plan.steps(length, rollback_data_offsets.get(step, place), step):
            yield planned_step
            step, place = planned_step.step + 1, planned_step.after
            if step in rollback_data_offsets:
                break
        else:
            return
