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
    NEWEST,
    candidates,
    complete_checkpoints,
    first_plausible,
    newest_whole,
    publish,
    put_aside,
)
from ..config import Config, DataConfig, differences, from_json, to_json
from ..data.loading.feature_cache import FeatureCache, feature_key
from ..data.loading.plan import START, Datasets, End, Plan
from ..data.loading.webdataset_stream import Stream
from ..data.shards.reader import ShardDataset
from ..data.text.chat_template import check_tokenizer
from ..data.text.tokenizer import load_tokenizer
from ..distributed.control_group import Agreement
from ..distributed.fused_kernels import Kernels, detect
from ..distributed.megatron_config import attention_core, check_fp8, check_graphs
from ..runtime import failpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What every rank finds out by itself, and alike."""

    plan: Plan | Stream
    held_out: Plan | None
    features: tuple[FeatureCache, ...]
    """Of the plan's datasets; none: images are read."""
    held_out_features: tuple[FeatureCache, ...]
    end: End
    checkpoint: Path | None
    """Where the weights come from; None: they are fresh."""
    continues: bool
    """The checkpoint is the run's own: position and optimizer come from it too."""
    previous: Config | None
    """The settings that the run folder holds."""
    kernels: Kernels
    ranks: Agreement | None = None
    """The ranks' own group for everything about checkpoints; None before they have met."""
    run_lock: run_lock.Attempt | None = None
    """The right to write into the run folder; None before ranks have met."""


def prepare(config: Config, data_size: int) -> Start:
    """Find the data and the checkpoint, and check that they fit. Raises: ValueError for a user's mistake."""
    if not config.data.path and not config.data.stream:
        raise ValueError(
            f"recipe {config.recipe} has no data of its own: give --data.path, a folder that pipelines.preprocess wrote"
        )
    stop = stop_file(config)
    if stop.is_file() and not config.run.resume_after_stop:
        raise ValueError(f"{stop} says: {stop.read_text().strip()} (to go on all the same: --run.resume-after-stop)")
    kernels = detect()
    attention_core(config, kernels)
    check_fp8(config, kernels)
    check_graphs(config, kernels)
    check_text(config)
    plan = make_stream(config, data_size) if config.data.stream else make_plan(config, config.data)
    held_out = None
    if config.data.validation_path is not None:
        held_out = make_plan(config, replace(config.data, path=(config.data.validation_path,), weights=(), stream=()))
    own, folders = saved(config)
    settings = config.run_dir / "config.json"
    start = Start(
        plan=plan,
        held_out=held_out,
        features=open_features(config, plan, config.data.features),
        held_out_features=open_features(config, held_out, config.data.validation_features),
        end=end_of(config, plan),
        checkpoint=first_plausible(folders) if folders else None,
        continues=own,
        previous=from_json(settings.read_text()) if settings.is_file() else None,
        kernels=kernels,
    )
    if start.checkpoint is not None:
        check_checkpoint(config, start, start.checkpoint)
    return start


def saved(config: Config) -> tuple[bool, list[Path]]:
    """Whether the run has checkpoints of its own, and those that it may start from, best first.

    Raises: ValueError if `checkpoint.initial` holds none.
    """
    own, initial = complete_checkpoints(config.run_dir)[::-1], config.checkpoint.initial
    return bool(own), own if own or initial is None else candidates(initial)


def claim(config: Config, start: Start) -> Start:
    """Make this start the only one that writes into the run folder; all ranks call it.

    Raises: ValueError while another run does, or if the folder cannot be written.
    """
    ranks = Agreement(config.checkpoint.group_timeout_seconds)
    return replace(start, ranks=ranks, run_lock=run_lock.claim(config.run_dir, ranks))


def settle(config: Config, start: Start) -> Start:
    """Verify every byte of the checkpoint to start from, and fall back to the newest one that is as it was written.

    All ranks call it, after `claim`. Raises: ValueError listing what is wrong with each, if none is left.
    """
    ranks = start.ranks
    assert ranks is not None
    own, folders = ranks.first(lambda: saved(config))
    if not folders:
        return replace(start, checkpoint=None, continues=False)
    folder = newest_whole(folders, ranks)
    start = replace(start, checkpoint=folder, continues=own)
    check_checkpoint(config, start, folder)
    if own:
        ranks.first(lambda: put_aside(folders[: folders.index(folder)]))
    newest = config.run_dir / "checkpoints" / NEWEST
    named = newest.read_text(errors="replace").strip() if newest.is_file() else folder.name
    if own and ranks.rank == 0 and named != folder.name:
        logger.warning("%s names %s, but %s is the newest whole one", newest, named, folder)
    return start


def open_features(
    config: Config, plan: Plan | Stream | None, folders: tuple[str, ...] | str | None
) -> tuple[FeatureCache, ...]:
    """The features of a plan's datasets. Raises: ValueError if they are not those of this tower's kind and preprocessing."""
    if not folders or not isinstance(plan, Plan):
        return ()
    folders = (folders,) if isinstance(folders, str) else folders
    caches = tuple(FeatureCache(folder, part) for folder, part in zip(folders, plan.datasets.parts, strict=True))
    for cache in caches:
        cache.check(feature_key(config, cache.dataset))
    return caches


def check_tower(start: Start, checkpoints: Checkpoints) -> None:
    """Raises: ValueError if features were made by a tower of other weights than the one that the run starts from."""
    caches = (*start.features, *start.held_out_features)
    if caches:
        assert checkpoints.frozen_tower is not None
        tower = tower_hash(checkpoints.frozen_tower.state_dict())
        for cache in caches:
            cache.check({"tower": tower})


def check_checkpoint(config: Config, start: Start, folder: Path) -> None:
    """Raises: ValueError for another architecture; for a run's own checkpoint also if other parts train, the optimizer is of
    the other kind, or the data would come in another order."""
    description = check_architecture(folder, config)
    if not start.continues:
        return
    if set(description["parts"]) != set(config.train.parts):
        raise ValueError(
            f"checkpoint {folder} trained {' '.join(description['parts'])}, but train.parts is "
            f"{' '.join(config.train.parts)}: continue with the same parts, or start a new --run.dir from it "
            "with --checkpoint.initial"
        )
    if description["distributed_optimizer"] != config.parallel.distributed_optimizer:
        raise ValueError(
            f"checkpoint {folder} holds the state of "
            f"{'a distributed' if description['distributed_optimizer'] else 'an undivided'} optimizer, which is stored in "
            "another form: continue with --parallel.distributed-optimizer as it was"
        )
    position, fixed = position_of(description), start.plan.fixed()
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


def make_plan(config: Config, data: DataConfig) -> Plan:
    """The plan over the datasets of a data section, for this run's seed and batch. Raises: ValueError, as `ShardDataset`."""
    cache_dir = None if data.cache_dir is None else Path(data.cache_dir)
    cache_bytes = int(data.cache_gib * 2**30)
    datasets = Datasets([ShardDataset(path, cache_dir=cache_dir, cache_bytes=cache_bytes) for path in data.path], data)
    without = 1 if config.model.text_only == "zero_image" else 0
    plan = Plan(datasets, data, seed=config.train.seed, global_batch=config.global_batch, images_without=without)
    if plan.left_out:
        logger.warning("%s: samples left out: %s", " ".join(data.path), plan.describe_left_out(plan.left_out))
    return plan


def make_stream(config: Config, data_size: int) -> Stream:
    """The tars of `data.stream`. Raises: ValueError, as `Stream`; also for a run without an end, or with more data ranks than
    tars."""
    if config.train.steps is None:
        raise ValueError("data.stream has no end, so epochs cannot be counted: give --train.steps")
    without = 1 if config.model.text_only == "zero_image" else 0
    stream = Stream(config.data, seed=config.train.seed, global_batch=config.global_batch, images_without=without)
    stream.check_ranks(data_size)
    return stream


def end_of(config: Config, plan: Plan | Stream) -> End:
    """How long the run is."""
    if config.train.steps is not None:
        return End(config.train.steps, None)
    assert isinstance(plan, Plan)
    return End(None, max(1, math.ceil(config.train.epochs * plan.epoch_samples)))


def stop_file(config: Config) -> Path:
    """Says why a run stopped on purpose; while it is there the run does not start again by itself."""
    return config.run_dir / "STOP"


def begin(config: Config, start: Start, checkpoints: Checkpoints) -> Position:
    """Continue the run, or load the weights it starts from; then write RUN/config.json. All ranks call it.

    Returns: where the run stands.
    """
    position = Position(step=0, place=START, data=start.plan.fixed())
    failpoints.reach("start/restore")
    if start.continues:
        assert start.checkpoint is not None
        position = checkpoints.restore(start.checkpoint, verified=True)
        for name, old, new in differences(start.previous, config) if start.previous else []:
            logger.warning("continuing with another %s: %s, it was %s", name, new, old)
        if start.end.reached(position.step, position.place):
            logger.info("nothing to do: %s has ended with step %d", config.run_dir, position.step)
    elif start.checkpoint is not None:
        checkpoints.load_weights(start.checkpoint, verified=True)
    elif "language" not in config.train.parts:
        logger.warning("the language model is fresh and frozen: give pretrained weights with --checkpoint.initial")
    failpoints.reach("start/restored")
    check_tower(start, checkpoints)
    if torch.distributed.get_rank() == 0:
        publish(config.run_dir / "config.json", to_json(config).encode())
        stop_file(config).unlink(missing_ok=True)
    return position
