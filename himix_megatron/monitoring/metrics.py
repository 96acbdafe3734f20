"""What a run measures. Flows in: counts and times of each step, from every rank; out, on rank 0: the numbers of an interval, as
a line of the log, in TensorBoard and in status.json.

What a step processed is known on all ranks (`StepCounts`). The rest is added up on each rank and gathered once an interval.
Rates count real tokens, samples and images over the time of the steps: they exclude padding, samples that could not be read,
and the time of saves and validations. FLOPs are the model's (costs/flops.py): they exclude recomputation, count causal
attention as causal, and frozen parts as forward only.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import Config
from ..costs.flops import Work, step_flops
from ..costs.hardware import device_of
from ..data.loading.batch import StepBatch
from ..data.loading.image_table import ImageTable, reduced_tokens
from ..distributed.megatron_config import text_multiple
from ..distributed.topology import Topology
from ..model.micro_batch_graphs import padded_sizes
from ..runtime.log import clock
from .gradient_norms import PARTS, squared_norms, unclipped_norms
from .pipeline_timers import ScheduleTimers
from .run_status import RunStatusWriter

if TYPE_CHECKING:
    from .sample_predictions import Answered
    from .tensorboard import TensorBoardReporter  # importing TensorBoard takes a second, which rank 0 alone spends

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one step processed, over all ranks."""

    loss: float
    """Mean over the answer tokens; nan when there were none."""
    answer_tokens: int
    text_tokens: int
    """Real ones, padding excluded."""
    vision_tokens: int
    images: int
    bad_samples: int
    """Samples that could not be read: their slot was kept with zero loss."""
    truncated_samples: int
    """Samples whose text was cut to data.max_text_tokens."""
    sources: tuple[tuple[float, float], ...] = ()
    """Summed loss and answer tokens of each dataset of a mixture; empty for one dataset."""


@dataclass(slots=True)
class RankSums:
    """What one rank adds up over an interval: numbers, which one collective gathers as a row."""

    data_seconds: float = 0.0
    own_seconds: float = 0.0
    """Spent in this module."""
    busy_seconds: float = 0.0
    """Spent in forward and backward passes."""
    schedule_seconds: float = 0.0
    """From the start of a schedule to the end of its last pass."""
    peak_gib: float = 0.0
    language_square: float = 0.0
    vision_kv_square: float = 0.0
    tower_square: float = 0.0
    """Squared gradient norm of each part in the interval's last step."""
    positions: float = 0.0
    """Positions for text tokens: the packs' budget, or rows including padding."""
    tower_tokens: float = 0.0
    """Vision tokens as the tower gives them."""
    computed_tokens: float = 0.0
    """Text and vision tokens of the decoder's tensors, padding included."""
    work: Work = field(default_factory=Work)
    """Of the samples, counted by the first rank of each replica."""

    def add_batch(self, config: Config, batch: StepBatch) -> None:
        """Count a step's samples."""
        real = [] if config.data.features else (~batch.blank).nonzero()[:, 0].tolist()
        sizes = batch.images.sizes
        self.work += Work.encoding([config.vision.num_patches(sizes[image]) for image in real])
        longest = 0
        for micro_batch in batch.micro_batches:
            texts, images = micro_batch.text_lengths.tolist(), _in_text(config, micro_batch.images)
            visions = [sum(tokens for _, tokens in own) for own in images]
            self.work += Work.of(texts, images, head_tokens=float((micro_batch.labels >= 0).sum()))
            self.tower_tokens += sum(micro_batch.images.tokens)
            num_text, num_vision = micro_batch.text_ids.numel(), sum(visions)
            self.positions += config.data.pack_max_text_tokens or num_text
            if config.train.cuda_graphs == "on":
                num_text, num_vision = padded_sizes(config, num_text, num_vision)
            self.computed_tokens += 0 if config.injection.in_sequence else num_text + num_vision
            whole = [text + vision for text, vision in zip(texts, visions, strict=True)]
            longest = max(longest, sum(whole) if micro_batch.packed else max(whole))
        if config.injection.in_sequence:  # all rows of the step have the length of the longest
            width = -(-longest // (multiple := text_multiple(config))) * multiple
            self.computed_tokens += width * sum(len(micro_batch.text_ids) for micro_batch in batch.micro_batches)


def _in_text(config: Config, table: ImageTable) -> list[list[tuple[int, int]]]:
    """Of each sample its images: the text tokens before each (0 where that is not known), and its tokens in the decoder."""
    images = zip(table.places or (0,) * len(table), reduced_tokens(table, config), strict=True)
    return [list(islice(images, count)) for count in table.per_sample]


@dataclass(slots=True)
class _Interval:
    """What happened since the last report."""

    steps: int = 0
    packs: int = 0
    samples: int = 0
    seconds: float = 0.0
    counts: list[StepCounts] = field(default_factory=list)
    sums: RankSums = field(default_factory=RankSums)


def peak_memory_gib(device: torch.device) -> float:
    """This rank's peak memory: of the device's allocator, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Peak TFLOP/s of one rank's chip in the run's precision; None if unknown."""
    if config.log.peak_tflops is not None or device.type != "cuda" or config.train.precision != "bf16":
        return config.log.peak_tflops
    found = device_of(torch.cuda.get_device_name(device))
    return None if found is None else found.bf16_flops / 1e12


class Metrics:
    """Adds up the steps of an interval and reports them; call `data_ready` and `step_done` once a step."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        *,
        model_chunks: list[Any],
        optimizer: Any,
        schedule_timers: ScheduleTimers,
        take_data_wait: Callable[[], float],
        status: RunStatusWriter,
        reporter: TensorBoardReporter | None,
        first_step: int,
    ):
        """
        Args:
            take_data_wait: the seconds for which training waited for data since its last call.
            reporter: TensorBoard on rank 0, None elsewhere.
            first_step: steps done so far.
        """
        self.config, self.topology, self.model_chunks, self.optimizer = config, topology, model_chunks, optimizer
        self.status, self.reporter, self.first_step = status, reporter, first_step
        self.peak_tflops = peak_tflops(config, topology.device)
        self._schedule_timers, self._take_data_wait = schedule_timers, take_data_wait
        self._interval = _Interval()
        self._last = time.perf_counter()

    def resume_clock(self) -> None:
        """Leave out the time since the last step, which saved or validated."""
        self._last = time.perf_counter()
        self._schedule_timers.take()
        self._take_data_wait()

    def data_ready(self, batch: StepBatch) -> None:
        """The step's batch has arrived."""
        now = time.perf_counter()
        interval, sums = self._interval, self._interval.sums
        sums.data_seconds += self._take_data_wait()
        interval.samples += batch.num_samples
        interval.packs += self.config.global_batch
        if self.topology.replica_rank == 0:
            sums.add_batch(self.config, batch)
        sums.own_seconds += time.perf_counter() - now

    def step_done(self, step: int, counts: StepCounts, learning_rate: float, grad_norm: float, *, last: bool) -> bool:
        """Record one step; report the interval if it ends here. Returns: whether it does."""
        now, at = time.perf_counter(), time.time()
        interval, sums = self._interval, self._interval.sums
        interval.seconds += now - self._last
        self._last = now
        interval.steps += 1
        interval.counts.append(counts)
        busy, schedule = self._schedule_timers.take()
        sums.busy_seconds += busy
        sums.schedule_seconds += schedule
        self.status.record_step(step, counts.loss)
        due = last or step % self.config.log.interval_steps == 0 or step == self.first_step + 1
        if due:
            ranks = self._gather()
            self._interval = _Interval()
            if self.reporter is not None:
                points = {"train/learning_rate": learning_rate, "train/grad_norm": grad_norm}
                points |= interval_points(self.config, self.topology, interval, ranks, grad_norm, self.peak_tflops)
                points |= source_points(source_names(self.config.data.datasets), interval.counts)
                self.reporter.step(step, points, at)
                self._log(step, points, self.status.record_interval(step, points))
        self._interval.sums.own_seconds += time.perf_counter() - now
        return due

    def _gather(self) -> list[RankSums]:
        """The sums of every rank: the one collective of an interval."""
        sums, topology = self._interval.sums, self.topology
        squares = squared_norms(self.model_chunks, self.optimizer, topology.data_rank)
        for part, square in squares.items():
            setattr(sums, f"{part}_square", square)
        sums.peak_gib = peak_memory_gib(topology.device)
        *own, work = astuple(sums)
        row = torch.tensor([*own, *work], dtype=torch.float64, device=topology.device)
        rows = row.new_empty(topology.world_size * len(row))
        torch.distributed.all_gather_into_tensor(rows, row)
        found = rows.view(topology.world_size, len(row)).tolist()
        return [replace(RankSums(*values[: len(own)]), work=Work(*values[len(own) :])) for values in found]

    def _log(self, step: int, points: Mapping[str, float], seconds_left: float) -> None:
        mfu = f"  MFU {100 * points['compute/model_mfu']:.1f} %" if "compute/model_mfu" in points else ""
        logger.info(
            "step %d/%d  loss %.6f  lr %.3e  grad norm %.4f  %.3f s/step  data wait %.3f s  text %.0f tok/s  "
            "vision %.0f tok/s  %.4g TFLOP/s%s  peak %.2f GiB  remaining %s",
            step, self.status.status.planned_steps, points["train/loss"], points["train/learning_rate"],
            points["train/grad_norm"], points["time/step_seconds"], points["time/data_wait_seconds"],
            points["throughput/text_tokens_per_second"], points["throughput/vision_tokens_per_second"],
            points["compute/model_tflops_per_second"], mfu, points["memory/peak_gib"], clock(seconds_left),
        )  # fmt: skip

    def add(self, step: int, points: Mapping[str, float]) -> None:
        """Write numbers that were measured elsewhere."""
        if self.reporter is not None:
            self.reporter.points(step, points)

    def validation(self, step: int, loss: float) -> None:
        """Report a validation loss."""
        if self.reporter is not None:
            logger.info("step %d/%d  validation loss %.6f", step, self.status.status.planned_steps, loss)
            self.reporter.points(step, {"validation/loss": loss})

    def predictions(self, step: int, answered: Sequence[Answered]) -> None:
        """Show samples with their answers."""
        if self.reporter is not None and answered:
            self.reporter.predictions(step, answered)

    def close(self) -> None:
        """Write out what is pending."""
        if self.reporter is not None:
            self.reporter.close()


# ---- an interval's numbers -------------------------------------------------------------------------------------------


def interval_points(
    config: Config, topology: Topology, interval: _Interval, ranks: Sequence[RankSums], grad_norm: float, peak: float | None
) -> dict[str, float]:
    """The numbers of an interval by tag. `peak`: TFLOP/s of one chip; None if unknown, then there is no MFU."""
    counts, steps = interval.counts, interval.steps
    answer_tokens = sum(c.answer_tokens for c in counts)
    usable = [c for c in counts if c.answer_tokens and math.isfinite(c.loss)]
    loss = math.fsum(c.loss * c.answer_tokens for c in usable) / max(1, sum(c.answer_tokens for c in usable))
    bad = sum(c.bad_samples for c in counts)
    points = {
        "train/loss": loss if usable else math.nan,
        "time/step_seconds": interval.seconds / steps,
        # The slowest rank sets the pace, so the largest wait is shown, and the largest memory.
        "time/data_wait_seconds": max(rank.data_seconds for rank in ranks) / steps,
        "time/metrics_seconds": max(rank.own_seconds for rank in ranks) / steps,
        "memory/peak_gib": max(rank.peak_gib for rank in ranks),
        "data/bad_samples": bad,
        "data/truncated_samples": sum(c.truncated_samples for c in counts),
    }
    rates = {
        "text_tokens": sum(c.text_tokens for c in counts),
        "answer_tokens": answer_tokens,
        "vision_tokens": sum(c.vision_tokens for c in counts),
        "samples": interval.samples - bad,
        "images": sum(c.images for c in counts),
    }
    for name, number in rates.items():
        points[f"throughput/{name}_per_second"] = number / interval.seconds
        points[f"throughput/{name}_per_second_per_rank"] = number / interval.seconds / len(ranks)
    if rates["images"]:
        points["data/vision_tokens_per_image"] = rates["vision_tokens"] / rates["images"]
    points |= gradient_points(config, ranks, grad_norm)
    points |= compute_points(config, ranks, interval.seconds, peak)
    points |= fill_points(config, ranks, interval.packs)
    return points | pipeline_points(topology, ranks, interval.seconds, steps)


def source_names(paths: Sequence[str]) -> list[str]:
    """A short name for each dataset of a mixture; empty for one dataset."""
    if len(paths) < 2:
        return []
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def source_points(names: Sequence[str], counts: Sequence[StepCounts]) -> dict[str, float]:
    """The loss of each dataset of a mixture over its own answer tokens, where the interval had samples of it."""
    points = {}
    for number, name in enumerate(names):
        met = [c.sources[number] for c in counts if c.sources]
        tokens = sum(tokens for _, tokens in met)
        if tokens:
            points[f"loss_by_dataset/{name}"] = sum(loss for loss, _ in met) / tokens
    return points


def gradient_points(config: Config, ranks: Sequence[RankSums], grad_norm: float) -> dict[str, float]:
    """The gradient norms of the parts that train."""
    norms = unclipped_norms({part: sum(getattr(rank, f"{part}_square") for rank in ranks) for part in PARTS}, grad_norm)
    names = {"language": "text", "vision_kv": "vision_kv", "tower": "tower"}
    return {f"train/grad_norm_{names[part]}": norms[part] for part in PARTS if part in config.train.trainable_parts}


def compute_points(config: Config, ranks: Sequence[RankSums], seconds: float, peak: float | None) -> dict[str, float]:
    """Model TFLOP/s, without and with the tower, and their share of the chips' peak."""
    flops = step_flops(config, sum((rank.work for rank in ranks), Work()))
    points = {"compute/model_tflops_per_second": flops.model / seconds / 1e12}
    for name, done in (("decoder", flops.language), ("model", flops.model)):
        each = done / seconds / len(ranks) / 1e12
        points[f"compute/{name}_tflops_per_second_per_rank"] = each
        if peak is not None:
            points[f"compute/{name}_mfu"] = each / peak
    return points


def fill_points(config: Config, ranks: Sequence[RankSums], packs: int) -> dict[str, float]:
    """The share of the places for text and vision tokens that was filled, and the share of computed tokens that was padding."""
    work = sum((rank.work for rank in ranks), Work())
    points = {"data/text_packing_efficiency": work.text_tokens / sum(rank.positions for rank in ranks)}
    real = work.text_tokens + work.vision_tokens
    points["compute/padding_fraction"] = 1 - real / sum(rank.computed_tokens for rank in ranks)
    if config.data.pack_max_vision_tokens is not None:
        filled = sum(rank.tower_tokens for rank in ranks)
        points["data/vision_packing_efficiency"] = filled / (packs * config.data.pack_max_vision_tokens)
    return points


def pipeline_points(topology: Topology, ranks: Sequence[RankSums], seconds: float, steps: int) -> dict[str, float]:
    """How long each stage computes in a step. With several stages also the bubble: the share of a schedule, up to the end of
    its last pass, in which a stage is idle, averaged over stages."""
    T, D, P = topology.tensor_size, topology.data_size, topology.pipeline_size
    # A replica's schedule takes as long as that of its slowest stage (rank = t + T x (d + D x p)).
    spans = [max(ranks[t + T * (d + D * p)].schedule_seconds for p in range(P) for t in range(T)) for d in range(D)]
    points, busy_seconds = {}, []
    for p in range(P):
        stage = ranks[p * T * D : (p + 1) * T * D]
        busy = math.fsum(rank.busy_seconds for rank in stage) / len(stage)
        busy_seconds.append(busy)
        points[f"pipeline/stage_{p}_busy_seconds"] = busy / steps
        points[f"pipeline/stage_{p}_busy_fraction"] = busy / seconds
        if P > 1:
            points[f"memory/stage_{p}_peak_gib"] = max(rank.peak_gib for rank in stage)
    span = math.fsum(spans) / D
    if P > 1 and span > 0:
        points["pipeline/bubble_fraction"] = 1 - math.fsum(busy_seconds) / P / span
    return points
