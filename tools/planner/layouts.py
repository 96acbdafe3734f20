"""All layouts of a recipe on a number of GPUs: which fit, how long a step takes, what a million samples cost.

Flows in: a recipe's Config, a Machine, the number of GPUs and what a sample is like; out: Plans, fastest first. Layouts that
the settings themselves refuse (heads or batch that do not divide) are passed over, by the same checks that a run makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from himix_megatron.config import Config, check_ranks
from himix_megatron.costs.flops import (
    StepFlops,
    Work,
    chunk_layers,
    decoder_layers,
    decoder_tokens,
    forward_flops,
    patches_of,
    shared_adapter,
    step_flops,
    vision_chunks,
)
from himix_megatron.costs.memory import GIB, MicroBatch, RankMemory, padded_vocab, rank_memory, rank_parameters
from tools.planner.cost import Job, Layout, StepTime, step_time
from tools.planner.machine import Machine

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
VIRTUAL = (1, 2, 4)
LONGER = 0.45
"""By how much of the mean text each doubling of a padded micro-batch lengthens its longest one."""
PACK_FILL = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A typical sample."""

    text_tokens: float
    """Mean text tokens."""
    longest_text: int
    """Text tokens of the longest sample; memory must hold a micro-batch of these."""
    images: float
    vision_tokens: float
    """Mean vision tokens of an image; memory must hold a micro-batch of the largest ones."""
    label_share: float
    """Share of its text tokens that have a label."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout."""

    config: Config
    layout: Layout
    time: StepTime
    memory: tuple[RankMemory, ...]
    """Memory of a rank of each pipeline stage."""
    flops: StepFlops
    """FLOPs of a step over all replicas, without padding."""
    samples: float
    """Samples of a step."""

    @property
    def peak_gib(self) -> float:
        """Memory of the fullest rank."""
        return max(stage.total for stage in self.memory) / GIB

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.time.total

    def utilisation(self, machine: Machine, *, tower: bool) -> float:
        """MFU of all ranks."""
        return (self.flops.model if tower else self.flops.language) / (self.layout.ranks * machine.peak_flops * self.seconds)

    def cost_per_million(self, price_per_gpu_hour: float) -> float:
        """Cost of a million samples, in the price's currency."""
        return 1e6 / self.samples * self.seconds * self.layout.ranks / 3600 * price_per_gpu_hour


def plans(config: Config, machine: Machine, gpus: int, sample: Sample) -> Iterator[Plan]:
    """Every layout that the settings allow, whether it fits or not."""
    for candidate in candidates(config, machine, gpus):
        try:
            data_size = check_ranks(candidate, gpus)
        except ValueError:
            continue
        yield plan_of(candidate, machine, data_size, sample)


def candidates(config: Config, machine: Machine, gpus: int) -> Iterator[Config]:
    """Settings that differ in their layout; those that contradict themselves are left out."""
    tensors = [size for size in range(1, min(gpus, machine.node_size) + 1) if gpus % size == 0]
    micro_batches = (config.train.micro_batch_samples,) if config.data.packs else MICRO_BATCHES
    for tensor in tensors:
        for pipeline in (size for size in range(1, gpus // tensor + 1) if gpus // tensor % size == 0):
            for virtual in VIRTUAL if pipeline > 1 else (1,):
                for recompute in ("none", "full"):  # attention is fused: there is nothing in it to save
                    for micro_batch in micro_batches:
                        try:
                            yield replace(
                                config,
                                parallel=replace(
                                    config.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual,
                                    sequence=tensor > 1, distributed_optimizer=gpus > tensor * pipeline,
                                    split="balanced" if pipeline > 1 else "even",
                                ),
                                train=replace(config.train, recompute=recompute, micro_batch_samples=micro_batch),
                            )  # fmt: skip
                        except ValueError:
                            continue


def plan_of(config: Config, machine: Machine, data_size: int, sample: Sample) -> Plan:
    """Time and memory of one layout."""
    parallel, vision = config.parallel, config.vision
    layout = layout_of(config, data_size)
    count = config.global_batch // (data_size * config.micro_batch)
    computed, real, samples = micro_batch_work(config, sample)
    images = 0.0 if config.data.features else samples * sample.images
    encoding = Work.encoding([patches_of(vision, sample.vision_tokens)]) * images
    trains = "tower" in config.train.trainable_parts
    # A frozen tower's images are shared by the replica's ranks; one that trains runs on each of them, both ways.
    tower = count * forward_flops(config, encoding).tower * (3 * parallel.tensor * parallel.pipeline if trains else 1)
    job = job_of(config, computed, count, tower)
    largest_images = math.ceil(config.micro_batch * sample.images) * vision.max_tokens_per_image
    largest = MicroBatch(
        text_tokens=config.data.pack_max_text_tokens or config.micro_batch * sample.longest_text,
        vision_tokens=config.data.pack_max_vision_tokens or largest_images,
        rows=config.micro_batch,
    )
    vision_tokens = count * samples * sample.images * sample.vision_tokens
    memory = tuple(
        rank_memory(config, stage, data_size=data_size, micro_batch=largest, vision_tokens_per_step=vision_tokens)
        for stage in range(parallel.pipeline)
    )
    times = data_size * count
    return Plan(
        config=config,
        layout=layout,
        time=step_time(machine, layout, job),
        memory=memory,
        flops=step_flops(config, (real + encoding) * times),
        samples=samples * times,
    )


def layout_of(config: Config, data_size: int) -> Layout:
    """A configuration's layout in the cost model's terms."""
    parallel = config.parallel
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        data=data_size,
        sequence=parallel.sequence,
        recompute=config.train.recompute,
        chunk_layers=chunk_layers(config),
        vision_chunks=vision_chunks(config),
        distributed_optimizer=parallel.distributed_optimizer,
        overlap_data="tower" not in config.train.trainable_parts,
    )


def job_of(config: Config, work: Work, count: int, tower: float) -> Job:
    """A configuration's step in the cost model's terms."""
    return Job(
        model=config.model,
        parts=config.train.trainable_parts,
        micro_batch=work,
        layers=tuple(decoder_layers(config, work)),
        adapter=shared_adapter(config, work),
        num_micro_batches=count,
        number_bytes=2 if config.train.precision == "bf16" else 4,
        tower_flops=tower,
        vocab_size=padded_vocab(config),
        trained_parameters=max(rank_parameters(config, stage).trained(config) for stage in range(config.parallel.pipeline)),
    )


def micro_batch_work(config: Config, sample: Sample) -> tuple[Work, Work, float]:
    """A micro-batch as computed and without its padding, the tower left out; and the samples in it."""
    text, vision = sample.text_tokens, sample.images * sample.vision_tokens
    if config.data.pack_max_text_tokens is not None and config.data.pack_max_vision_tokens is not None:
        samples = PACK_FILL * config.data.pack_max_text_tokens / text
        if vision:
            samples = min(samples, config.data.pack_max_vision_tokens / vision)
        real = _one(config, text, sample) * samples
        return replace(real, text_tokens=float(config.data.pack_max_text_tokens)), real, samples
    samples = float(config.micro_batch)
    real = _one(config, text, sample) * samples
    padded = min(text * (1 + LONGER * math.log2(samples)), max(text, sample.longest_text))
    computed = replace(_one(config, padded, sample) * samples, head_tokens=real.head_tokens)
    return computed, real, samples


def _one(config: Config, text: float, sample: Sample) -> Work:
    vision = decoder_tokens(config, sample.images * sample.vision_tokens)
    return Work.of([text], [vision], head_tokens=sample.label_share * text)
