"""Training: from a configuration to a trained run folder, at any layout of ranks.

`pretrain` reads as the list of what happens. One step: read this rank's texts and image share, encode the share and gather
the replica's features, run megatron-core's schedule over the micro-batches, clip, update, report, and now and then save.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from . import log, parallel
from .adapter import attention_backend, params_dtype
from .checkpoint import Checkpoints, Position, check_architecture, complete_checkpoints, find_checkpoint
from .config import Config, differences, from_json, to_json
from .data.batch import StepBatch, without_loss
from .data.conversation import check_tokenizer
from .data.loader import StepDataset, step_loader
from .data.shards import ShardDataset
from .data.tokenizer import load_tokenizer
from .kernels import Kernels, detect
from .ledger import Ledger
from .metrics import Metrics, StepCounts
from .model.himix import build_stage
from .model.vision import ReplicaEncoder, build_tower
from .optim import Schedule, build_optimizer
from .parallel import Topology
from .signals import REQUEUE, StopRequest
from .step import run_losses, stage_inputs

logger = logging.getLogger(__name__)


def pretrain(config: Config) -> int:
    """Train one run to its last step, or continue it. Returns: 0, or 85 (`signals.REQUEUE`) if it was asked to stop and saved.

    Raises: ValueError for a user's mistake, before the first collective wherever it can be known.
    """
    launch = parallel.check_launch(config)
    request = StopRequest()
    dataset, held_out = open_dataset(config, config.data.path), open_held_out(config)
    total_steps = steps_of(config, len(dataset))
    kernels = detect()
    attention_backend(config.model, kernels)
    check_text(config)
    check_start(config)
    topology = parallel.start(config.parallel, seed=config.train.seed, launch=launch)
    log.start(config.run_dir, topology.rank, topology.world_size)
    previous = prepare_run_folder(config, topology)

    run = build_run(config, kernels, topology)
    schedule = Schedule(config, run.optimizer, total_steps * config.train.global_batch_samples)
    position = starting_point(config, run, data_fingerprint(config, dataset), previous, total_steps)
    describe(config, kernels, run, total_steps)

    plan = step_dataset(config, dataset, topology)
    metrics = Metrics(config.run_dir, topology, position.step, total_steps, config.log.interval_steps)
    ledger = Ledger(config, plan, topology)
    for batch in step_loader(plan, position.step, total_steps, config.data.num_workers):
        batch = agree_on_bad(batch, topology)
        metrics.data_ready()
        learning_rate = schedule.set(position.samples)
        counts, grad_norm, stop = train_step(config, run, batch, request)
        position = advance(position, config)
        metrics.step_done(position.step, counts, learning_rate, grad_norm)
        ledger.note(position.step, batch)
        finish_step(config, run, held_out, metrics, position, total_steps, stop=stop)
        if stop and position.step < total_steps:
            break
    metrics.close()
    ledger.close()
    request.leave_in_peace()
    return 0 if position.step >= total_steps else REQUEUE


def finish_step(
    config: Config,
    run: Run,
    held_out: ShardDataset | None,
    metrics: Metrics,
    position: Position,
    total_steps: int,
    *,
    stop: bool,
) -> None:
    """Validate and save where the intervals say so, and at the end; when asked to stop, save at once."""
    last, validation_loss = position.step == total_steps, None
    if held_out is not None and not stop and (last or position.step % config.log.validation_interval_steps == 0):
        validation_loss = validate(config, run, held_out)
        metrics.validation(position.step, validation_loss)
    if last or stop or position.step % config.checkpoint.interval_steps == 0:
        run.checkpoints.save(position, validation_loss=validation_loss)
    metrics.resume_clock()


def validate(config: Config, run: Run, held_out: ShardDataset) -> float:
    """Mean loss over the answer tokens of the held-out set's first steps, in its own fixed order."""
    plan = step_dataset(config, held_out, run.topology)
    num_steps = max(1, min(config.log.validation_samples, len(held_out)) // config.train.global_batch_samples)
    total = tokens = 0.0
    for batch in step_loader(plan, 0, num_steps, config.data.num_workers):
        batch = agree_on_bad(batch, run.topology)
        counts, _ = count(config, run.topology, batch, run_schedule(config, run, batch, forward_only=True))
        total, tokens = total + counts.loss * counts.answer_tokens, tokens + counts.answer_tokens
    return total / tokens if tokens else math.nan


# ---- before the first step -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """What training works with on this rank."""

    topology: Topology
    stages: list[DistributedDataParallel]
    """One model chunk, or several with an interleaved pipeline."""
    encoder: ReplicaEncoder
    optimizer: Any
    checkpoints: Checkpoints


def build_run(config: Config, kernels: Kernels, topology: Topology) -> Run:
    """Tower, model chunks, optimizer and checkpoints of this rank."""
    trainable = "tower" in config.train.parts
    tower = build_tower(config.vision, seed=config.train.seed, dtype=params_dtype(config)).to(topology.device)
    stages = build_stage(config, kernels, topology, tower)
    optimizer = build_optimizer(config, stages)
    mcore_config = stages[0].config
    mcore_config.grad_scale_func = optimizer.scale_loss
    mcore_config.finalize_model_grads_func = finalize_model_grads
    return Run(
        topology=topology,
        stages=stages,
        encoder=ReplicaEncoder(tower, topology.replica, trainable=trainable, dtype=params_dtype(config)),
        optimizer=optimizer,
        checkpoints=Checkpoints(config, stages, optimizer, None if trainable else tower),
    )


def open_dataset(config: Config, path: str | None) -> ShardDataset:
    """The shards to train on. Raises: ValueError if none are named or the folder holds none."""
    if path is None:
        raise ValueError(
            f"recipe {config.recipe} has no data of its own: give --data.path, a folder that pipelines.preprocess wrote"
        )
    return ShardDataset(path)


def check_text(config: Config) -> None:
    """Raises: ValueError if the tokenizer lacks what the template needs, or gives ids that the embedding has no row for."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(tokenizer, config.data.template)
    tokens = tokenizer.vocab_size
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer {config.data.tokenizer} has {tokens} tokens, but model.vocab_size is {config.model.vocab_size}: "
            "it is another model's tokenizer"
        )


def check_start(config: Config) -> None:
    """Raises: ValueError, before any rank waits for another, if the run cannot start from where it is told to."""
    own = complete_checkpoints(config.run_dir)
    if own:
        check_architecture(own[-1], config)
    elif config.checkpoint.initial is not None:
        check_architecture(find_checkpoint(config.checkpoint.initial), config)


def open_held_out(config: Config) -> ShardDataset | None:
    """The validation set, if there is one. Raises: ValueError if the folder holds none."""
    return None if config.data.validation_path is None else ShardDataset(config.data.validation_path)


def step_dataset(config: Config, dataset: ShardDataset, topology: Topology) -> StepDataset:
    """The plan over a dataset as this rank sees it."""
    return StepDataset(
        dataset,
        data_config=config.data,
        vision_config=config.vision,
        train_config=config.train,
        text_only=config.model.text_only,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        replica_rank=topology.replica_rank,
        replica_size=topology.replica_size,
        # Sequence parallelism splits the text evenly over the tensor ranks.
        pad_multiple=config.parallel.tensor if config.parallel.sequence else 1,
    )


def steps_of(config: Config, num_samples: int) -> int:
    """Optimizer steps of the whole run."""
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * num_samples / config.train.global_batch_samples))


def data_fingerprint(config: Config, dataset: ShardDataset) -> str:
    """Of everything that fixes which sample is in which step."""
    fixed = [dataset.fingerprint, config.train.seed, config.train.global_batch_samples]
    return hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:16]


def prepare_run_folder(config: Config, topology: Topology) -> Config | None:
    """Write RUN/config.json. Returns: the configuration of the run that was there, if any."""
    path = config.run_dir / "config.json"
    previous = from_json(path.read_text()) if path.is_file() else None
    torch.distributed.barrier()  # everyone has read before rank 0 writes
    if topology.rank == 0:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(config))
    return previous


def starting_point(config: Config, run: Run, data: str, previous: Config | None, total_steps: int) -> Position:
    """Continue the run if its folder has a checkpoint, else start from --checkpoint.initial, else from fresh weights.

    Raises: ValueError if the data changed since the checkpoint: its position would mean other samples.
    """
    own = complete_checkpoints(config.run_dir)
    if own:
        position = run.checkpoints.restore(own[-1])
        if position.data != data:
            raise ValueError(
                f"{config.run_dir} stands at step {position.step} of another data order: --data.path, --train.seed and "
                "--train.global-batch-samples must be as they were, or give a new --run.dir"
            )
        if position.step >= total_steps:
            logger.info("nothing to do: %s is at step %d of %d", config.run_dir, position.step, total_steps)
        for name, old, new in differences(previous, config) if previous else []:
            logger.warning("continuing with another %s: %s, it was %s", name, new, old)
        return position
    if config.checkpoint.initial is not None:
        run.checkpoints.load_weights(find_checkpoint(config.checkpoint.initial))
    return Position(step=0, samples=0, data=data)


def describe(config: Config, kernels: Kernels, run: Run, total_steps: int) -> None:
    """Say what runs: layout, what trains, which kernels."""
    parallel_config, topology = config.parallel, run.topology
    trained = sum(p.numel() for stage in run.stages for p in stage.parameters() if p.requires_grad)
    logger.info(
        "%s: %d ranks (tensor %d%s, pipeline %d x %d, data %d), %s, %d steps of %d samples",
        config.recipe, topology.world_size, parallel_config.tensor, " + sequence" if parallel_config.sequence else "",
        parallel_config.pipeline, parallel_config.virtual_pipeline, topology.data_size, config.train.precision, total_steps,
        config.train.global_batch_samples,
    )  # fmt: skip
    logger.info("training %s: %d parameters on this rank", ", ".join(config.train.parts), trained)
    for line in kernels.reasons():
        logger.info("%s", line)


# ---- one step ------------------------------------------------------------------------------------------------------


def train_step(config: Config, run: Run, batch: StepBatch, request: StopRequest) -> tuple[StepCounts, float, bool]:
    """One optimizer step.

    Returns: what it processed over all ranks, the gradient's global norm before clipping, and whether any rank was asked to
    stop (all ranks learn it at the same step).
    """
    for stage in run.stages:
        stage.zero_grad_buffer()
    run.optimizer.zero_grad()
    reported = run_schedule(config, run, batch, forward_only=False)
    _, grad_norm, _ = run.optimizer.step()
    counts, stop = count(config, run.topology, batch, reported, request)
    return counts, float(grad_norm or 0.0), stop


def run_schedule(config: Config, run: Run, batch: StepBatch, *, forward_only: bool) -> list[Tensor]:
    """Forward (and backward) over a step's micro-batches.

    Returns: on the last stage float64[2] per micro-batch: summed loss, answer tokens; elsewhere nothing.
    """
    device = run.topology.device
    images = run.encoder.encode(batch.pixels.to(device), batch.blank.to(device), len(batch.blank))
    return run_losses(run.stages, stage_inputs(batch, images, device), forward_only=forward_only)


def agree_on_bad(batch: StepBatch, topology: Topology) -> StepBatch:
    """The same step on every rank of a replica: an image that one rank could not decode is blank and silent on all."""
    if topology.replica_size == 1:
        return batch
    num_samples = sum(len(m.keys) for m in batch.micro_batches)
    marks = torch.zeros(len(batch.blank) + num_samples, dtype=torch.uint8, device=topology.device)
    marks[: len(batch.blank)] = batch.blank
    marks[[len(batch.blank) + sample for sample in batch.bad_samples]] = 1
    torch.distributed.all_reduce(marks, op=torch.distributed.ReduceOp.MAX, group=topology.replica)
    marks = marks.cpu()
    bad = marks[len(batch.blank) :].nonzero().flatten().tolist()
    keys = [key for m in batch.micro_batches for key in m.keys]
    agreed = replace(
        batch,
        blank=marks[: len(batch.blank)].bool(),
        bad_samples=tuple(bad),
        bad_keys=tuple(keys[sample] for sample in bad),
    )
    return without_loss(agreed, bad)


def count(
    config: Config, topology: Topology, batch: StepBatch, reported: list[Tensor], request: StopRequest | None = None
) -> tuple[StepCounts, bool]:
    """Add the step up over all ranks: the loss from the last stages, the counts once from each replica.

    Returns: the counts, and whether any rank was asked to stop; one collective for both.
    """
    totals = torch.zeros(6, dtype=torch.float64, device=topology.device)
    if topology.is_last_stage and topology.tensor_rank == 0:
        totals[:2] = torch.stack(reported).sum(0)
    if topology.replica_rank == 0:
        totals[2] = sum(int(m.text_lengths.sum()) for m in batch.micro_batches)
        totals[3] = images_seen(batch)
        totals[4] = len(batch.bad_keys)
    totals[5] = request is not None and request.received is not None
    torch.distributed.all_reduce(totals)
    loss, answer_tokens, text_tokens, images, bad, num_asked = totals.tolist()
    counts = StepCounts(
        loss=loss / answer_tokens if answer_tokens else math.nan,
        answer_tokens=int(answer_tokens),
        text_tokens=int(text_tokens),
        vision_tokens=int(images) * config.vision.tokens_per_image,
        images=int(images),
        bad_samples=int(bad),
    )
    return counts, num_asked > 0


def images_seen(batch: StepBatch) -> int:
    """Real images of a step on this replica; those that stand for "no image" are not counted."""
    return int((~batch.blank).sum())


def advance(position: Position, config: Config) -> Position:
    """The position after one more step."""
    samples = position.samples + config.train.global_batch_samples
    return Position(step=position.step + 1, samples=samples, data=position.data)
