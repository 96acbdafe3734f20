"""What a run measures: one line a step on the log, points in TensorBoard.

Flows in: counts and times of each step from every rank; out: sums over the whole run's ranks, written by one of them.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .parallel import Topology

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
    cut_samples: int
    """Samples whose text was cut to data.max_text_tokens."""


def peak_memory_gib(device: torch.device) -> float:
    """This rank's peak: of the device's allocator, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """Adds up the steps of an interval and reports it; call `data_ready` and `step_done` once a step."""

    def __init__(self, run_dir: Path, topology: Topology, first_step: int, total_steps: int, interval_steps: int):
        """`total_steps`: about how many the run has; `first_step`: steps done so far; points of later ones, which a killed run
        left behind, are taken back."""
        self.topology, self.interval_steps = topology, interval_steps
        self.first_step, self.total_steps = first_step, total_steps
        self.writer: SummaryWriter | None = None
        if topology.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            purge = first_step + 1 if first_step else None
            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge, max_queue=100, flush_secs=10)
        self._begin()
        self._last = time.perf_counter()
        self._recent_seconds: list[float] = []

    def _begin(self) -> None:
        self._steps = 0
        self._data_seconds = self._seconds = 0.0
        self._counts: list[StepCounts] = []

    def resume_clock(self) -> None:
        """Forget the time since the last step (saving, validation): it belongs to no step."""
        self._last = time.perf_counter()

    def data_ready(self) -> None:
        """The step's batch has arrived: what has passed since the last step was waiting for data."""
        self._data_seconds += time.perf_counter() - self._last

    def step_done(self, step: int, counts: StepCounts, learning_rate: float, grad_norm: float, *, last: bool) -> bool:
        """Note one step; at the end of an interval write it out. Returns: whether it did."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._steps += 1
        self._counts.append(counts)
        if last or step % self.interval_steps == 0 or step == self.first_step + 1:
            self._report(step, learning_rate, grad_norm)
            self._begin()
            return True
        return False

    def add(self, step: int, points: dict[str, float]) -> None:
        """Further points, which others have counted."""
        if self.writer is not None:
            for tag, value in points.items():
                self.writer.add_scalar(tag, value, step)

    def _report(self, step: int, learning_rate: float, grad_norm: float) -> None:
        # The slowest rank sets the pace: its waiting and its memory are the ones to show.
        worst = torch.tensor(
            [self._data_seconds / self._steps, peak_memory_gib(self.topology.device)],
            dtype=torch.float64,
            device=self.topology.device,
        )
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        if self.writer is None:
            return
        data_seconds, memory_gib = worst.tolist()
        step_seconds = self._seconds / self._steps
        usable = [c for c in self._counts if c.answer_tokens and math.isfinite(c.loss)]
        loss = sum(c.loss * c.answer_tokens for c in usable) / max(sum(c.answer_tokens for c in usable), 1)
        loss = loss if usable else math.nan
        self._recent_seconds = [*self._recent_seconds[-9:], step_seconds]
        remaining = max(0, self.total_steps - step) * sum(self._recent_seconds) / len(self._recent_seconds)
        points = {
            "train/loss": loss,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "time/step_seconds": step_seconds,
            "time/data_wait_seconds": data_seconds,
            "throughput/text_tokens_per_second": sum(c.text_tokens for c in self._counts) / self._seconds,
            "throughput/vision_tokens_per_second": sum(c.vision_tokens for c in self._counts) / self._seconds,
            "throughput/images_per_second": sum(c.images for c in self._counts) / self._seconds,
            "memory/peak_gib": memory_gib,
            "data/bad_samples": sum(c.bad_samples for c in self._counts),
            "data/cut_samples": sum(c.cut_samples for c in self._counts),
        }
        self.add(step, points)
        logger.info(
            "step %d/%d  loss %.6f  lr %.3e  grad norm %.4f  %.3f s/step  data wait %.3f s  text %.0f tok/s  "
            "vision %.0f tok/s  peak %.2f GiB  remaining %s",
            step, self.total_steps, loss, learning_rate, grad_norm, step_seconds, data_seconds,
            points["throughput/text_tokens_per_second"], points["throughput/vision_tokens_per_second"],
            memory_gib, clock(remaining),
        )  # fmt: skip

    def validation(self, step: int, loss: float) -> None:
        """Note a validation loss."""
        logger.info("step %d/%d  validation loss %.6f", step, self.total_steps, loss)
        if self.writer is not None:
            self.writer.add_scalar("validation/loss", loss, step)

    def save_stall(self, step: int, seconds: float) -> None:
        """Note for how long a save kept training waiting."""
        if self.writer is not None:
            self.writer.add_scalar("time/save_stall_seconds", seconds, step)

    def close(self) -> None:
        """Write out what is pending."""
        if self.writer is not None:
            self.writer.close()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
