"""How a run starts: what can be known before ranks meet, and where it stands once they have met.

Flows in: Config; out: a Start, or one line that says what is wrong; then a Position. Nothing of the run folder changes until
the run is known to be able to start.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint import run_lock
from ..checkpoint.checkpointer import Checkpoints, Position, check_architecture, position_of, tower_hash
from ..checkpoint.manifest import (
    LATEST,
    complete_checkpoints,
    first_intact,
    latest_intact,
    quarantine,
    resolve_checkpoints,
)
from ..config import Config, DataConfig, differences, from_json, to_json
from ..data.loading.feature_cache import FeatureCache, feature_key
from ..data.loading.plan import START, Datasets, SamplingPlan, TrainingLength
from ..data.loading.webdataset_stream import Stream
from ..data.shards.reader import ShardDataset
from ..data.text.chat_template import check_tokenizer
from ..data.text.tokenizer import load_tokenizer
from ..distributed.control_group import ControlGroup
from ..distributed.fused_kernels import Kernels, detect
from ..distributed.megatron_config import attention_core, check_fp8, check_graphs
from ..runtime.durable_files import publish
from ..runtime.failpoints import failpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """What every rank finds out by itself, and alike."""

    plan: SamplingPlan | Stream
    held_out: SamplingPlan | None
    features: tuple[FeatureCache, ...]
    """Of the plan's datasets; none: images are read."""
    held_out_features: tuple[FeatureCache, ...]
    end: TrainingLength
    checkpoint: Path | None
    """Where the weights come from; None: they are fresh."""
    continues: bool
    """The checkpoint is the run's own: position and optimizer come from it too."""
    previous: Config | None
    """The settings that the run folder holds."""
    kernels: Kernels
    ranks: ControlGroup | None = None
    """The ranks' own group for everything about checkpoints; None before they have met."""
    run_lock: run_lock.RunLock | None = None
    """The right to write into the run folder; None before ranks have met."""


def prepare_inputs(config: Config, data_size: int) -> RunInputs:
    """Find the data and the checkpoint, and check that they fit. Raises: ValueError for a user's mistake."""
    if not config.data.datasets and not config.data.webdataset_urls:
        raise ValueError(
            f"recipe {config.recipe} has no data of its own: give --data.datasets, a folder that pipelines.preprocess wrote"
        )
    stop = stop_file(config)
    if stop.is_file() and not config.run.ignore_stop_file:
        raise ValueError(f"{stop} says: {stop.read_text().strip()} (to go on all the same: --run.ignore-stop-file)")
    kernels = detect()
    attention_core(config, kernels)
    check_fp8(config, kernels)
    check_graphs(config, kernels)
    check_text(config)
    plan = make_stream(config, data_size) if config.data.webdataset_urls else make_plan(config, config.data)
    held_out = None
    if config.data.validation_path is not None:
        held_out = make_plan(
            config, replace(config.data, datasets=(config.data.validation_path,), weights=(), webdataset_urls=())
        )
    own, folders = saved(config)
    settings = config.run_dir / "config.json"
    start = RunInputs(
        plan=plan,
        held_out=held_out,
        features=open_features(config, plan, config.data.features),
        held_out_features=open_features(config, held_out, config.data.validation_features),
        end=end_of(config, plan),
        checkpoint=first_intact(folders) if folders else None,
        continues=own,
        previous=from_json(settings.read_text()) if settings.is_file() else None,
        kernels=kernels,
    )
    if start.checkpoint is not None:
        check_checkpoint(config, start, start.checkpoint)
    return start


def saved(config: Config) -> tuple[bool, list[Path]]:
    """Whether the run has checkpoints of its own, and those that it may start from, best first.

    Raises: ValueError if `checkpoint.init_from` holds none.
    """
    own, initial = complete_checkpoints(config.run_dir)[::-1], config.checkpoint.init_from
    return bool(own), own if own or initial is None else resolve_checkpoints(initial)


def lock_run_dir(config: Config, start: RunInputs) -> RunInputs:
    """Make this start the only one that writes into the run folder; all ranks call it.

    Raises: ValueError while another run does, or if the folder cannot be written.
    """
    ranks = ControlGroup(config.checkpoint.group_timeout_seconds)
    return replace(start, ranks=ranks, run_lock=run_lock.acquire_on_all_ranks(config.run_dir, ranks))


def select_checkpoint(config: Config, start: RunInputs) -> RunInputs:
    """Verify every byte of the checkpoint to start from, and fall back to the newest one that is as it was written.

    All ranks call it, after `acquire_on_all_ranks`. Raises: ValueError listing what is wrong with each, if none is left.
    """
    ranks = start.ranks
    assert ranks is not None
    own, folders = ranks.on_rank_zero(lambda: saved(config))
    if not folders:
        return replace(start, checkpoint=None, continues=False)
    folder = latest_intact(folders, ranks)
    start = replace(start, checkpoint=folder, continues=own)
    check_checkpoint(config, start, folder)
    if own:
        ranks.on_rank_zero(lambda: quarantine(folders[: folders.index(folder)]))
    newest = config.run_dir / "checkpoints" / LATEST
    named = newest.read_text(errors="replace").strip() if newest.is_file() else folder.name
    if own and ranks.rank == 0 and named != folder.name:
        logger.warning("%s names %s, but %s is the newest whole one", newest, named, folder)
    return start


def open_features(
    config: Config, plan: SamplingPlan | Stream | None, folders: tuple[str, ...] | str | None
) -> tuple[FeatureCache, ...]:
    """The features of a plan's datasets. Raises: ValueError if they are not those of this tower's kind and preprocessing."""
    if not folders or not isinstance(plan, SamplingPlan):
        return ()
    folders = (folders,) if isinstance(folders, str) else folders
    caches = tuple(FeatureCache(folder, part) for folder, part in zip(folders, plan.datasets.parts, strict=True))
    for cache in caches:
        cache.check(feature_key(config, cache.dataset))
    return caches


def check_tower(start: RunInputs, checkpoints: Checkpoints) -> None:
    """Raises: ValueError if features were made by a tower of other weights than the one that the run starts from."""
    caches = (*start.features, *start.held_out_features)
    if caches:
        assert checkpoints.frozen_tower is not None
        tower = tower_hash(checkpoints.frozen_tower.state_dict())
        for cache in caches:
            cache.check({"tower": tower})


def check_checkpoint(config: Config, start: RunInputs, folder: Path) -> None:
    """Raises: ValueError for another architecture; for a run's own checkpoint also if other parts train, the optimizer is of
    the other kind, or the data would come in another order."""
    description = check_architecture(folder, config)
    if not start.continues:
        return
    if set(description["parts"]) != set(config.train.trainable_parts):
        raise ValueError(
            f"checkpoint {folder} trained {' '.join(description['parts'])}, but train.trainable_parts is "
            f"{' '.join(config.train.trainable_parts)}: continue with the same parts, or start a new --run.dir from it "
            "with --checkpoint.init-from"
        )
    if description["distributed_optimizer"] != config.parallel.distributed_optimizer:
        raise ValueError(
            f"checkpoint {folder} holds the state of "
            f"{'a distributed' if description['distributed_optimizer'] else 'an undivided'} optimizer, which is stored in "
            "another form: continue with --parallel.distributed-optimizer as it was"
        )
    position, fixed = position_of(description), start.plan.fingerprint_fields()
    for field in position.data | fixed:
        old, new = position.data.get(field), fixed.get(field)
        if old != new:
            raise ValueError(
                f"{config.run_dir} stands at step {position.step} of another data order: {field} is {new}, it was {old}: "
                "leave it as it was, or give a new --run.dir"
            )


def check_text(config: Config) -> None:
    """Raises: ValueError if the tokenizer lacks what the template needs, or gives ids that the embedding has no row for."""
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
    datasets = Datasets([ShardDataset(path, cache_dir=cache_dir, cache_bytes=cache_bytes) for path in data.datasets], data)
    without = 1 if config.model.text_only_vision == "zero_image" else 0
    plan = SamplingPlan(datasets, data, seed=config.train.seed, global_batch=config.global_batch, images_without=without)
    if plan.left_out:
        logger.warning("%s: samples left out: %s", " ".join(data.datasets), plan.describe_left_out(plan.left_out))
    return plan


def make_stream(config: Config, data_size: int) -> Stream:
    """The tars of `data.webdataset_urls`.

    Raises: ValueError, as `Stream`; also for a run without an end, or with more data ranks than tars.
    """
    if config.train.steps is None:
        raise ValueError("data.webdataset_urls has no end, so epochs cannot be counted: give --train.steps")
    without = 1 if config.model.text_only_vision == "zero_image" else 0
    stream = Stream(config.data, seed=config.train.seed, global_batch=config.global_batch, images_without=without)
    stream.check_ranks(data_size)
    return stream


def end_of(config: Config, plan: SamplingPlan | Stream) -> TrainingLength:
    """How long the run is."""
    if config.train.steps is not None:
        return TrainingLength(config.train.steps, None)
    assert isinstance(plan, SamplingPlan)
    return TrainingLength(None, max(1, math.ceil(config.train.epochs * plan.epoch_samples)))


def stop_file(config: Config) -> Path:
    """Says why a run stopped on purpose; while it is there the run does not start again by itself."""
    return config.run_dir / "STOP"


def restore_or_initialize(config: Config, start: RunInputs, checkpoints: Checkpoints) -> Position:
    """Continue the run, or load the weights it starts from; then write RUN/config.json. All ranks call it.

    Returns: where the run stands.
    """
    position = Position(step=0, place=START, data=start.plan.fingerprint_fields())
    failpoint("start/restore")
    if start.continues:
        assert start.checkpoint is not None
        position = checkpoints.restore(start.checkpoint, verified=True)
        for name, old, new in differences(start.previous, config) if start.previous else []:
            logger.warning("continuing with another %s: %s, it was %s", name, new, old)
        if start.end.reached(position.step, position.place):
            logger.info("nothing to do: %s has ended with step %d", config.run_dir, position.step)
    elif start.checkpoint is not None:
        checkpoints.load_weights(start.checkpoint, verified=True)
    elif "language" not in config.train.trainable_parts:
        logger.warning("the language model is fresh and frozen: give pretrained weights with --checkpoint.init-from")
    failpoint("start/restored")
    check_tower(start, checkpoints)
    if torch.distributed.get_rank() == 0:
        publish(config.run_dir / "config.json", to_json(config).encode())
        stop_file(config).unlink(missing_ok=True)
    return position
