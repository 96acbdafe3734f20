"""The loss on a held-out set at an interval. Flows in: the set's plan and the run's model; out: a number, or None."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..config import Config
from ..data.loading.feature_cache import FeatureCache
from ..data.loading.loader import step_loader
from ..data.loading.plan import SamplingPlan, StepPlan, TrainingLength
from ..runtime.failpoints import failpoint
from ..runtime.stop_signals import StopRequest
from .builder import TrainingComponents
from .data_setup import step_reader
from .train_step import count, run_schedule, synced_batches


class Validation:
    """Measures the loss every `log.validation_interval_steps`."""

    def __init__(
        self,
        config: Config,
        plan: SamplingPlan | None,
        features: Sequence[FeatureCache],
        run: TrainingComponents,
        request: StopRequest,
    ):
        """`plan`, `features`: of the held-out set; None: there is none."""
        self.config, self.plan, self.run, self.request = config, plan, run, request
        self.reader = None if plan is None else step_reader(config, plan, run.topology, features)
        # Rank 0 reads it for all: two nodes may see a shared folder differently for a while, and saving depends on it.
        self.best = run.checkpoints.ranks.on_rank_zero(run.checkpoints.best_validation_loss)

    @torch.no_grad()
    def measure(self, step: int, *, last: bool) -> float | None:
        """Mean loss over the answer tokens of the set's first samples, in the set's own fixed order.

        None: it is not time, there are no answers, or a stop was requested meanwhile.
        """
        if self.plan is None or self.reader is None:
            return None
        if not (last or step % self.config.log.validation_interval_steps == 0):
            return None
        total = tokens = 0.0
        batches = step_loader(self.reader, self._steps(self.plan), self.config.data.num_workers)
        for batch, images in synced_batches(self.run, batches, self.request):
            failpoint("validation/step", progress=True)
            reported = run_schedule(self.run, batch, images, forward_only=True)
            counts, _, _ = count(self.run.topology, batch, reported)
            if counts.answer_tokens:
                total, tokens = total + counts.loss * counts.answer_tokens, tokens + counts.answer_tokens
        return total / tokens if tokens and not self.request.is_agreed else None

    def _steps(self, plan: SamplingPlan) -> Iterator[StepPlan]:
        """As many whole batches as `log.validation_samples` fill, at least one."""
        available = min(self.config.log.validation_samples, plan.epoch_samples)
        for step in plan.steps(TrainingLength(None, available)):
            if step.step and step.after.samples > available:
                return
            yield step

    def is_best(self, loss: float | None) -> bool:
        """Whether this is the lowest loss of the run so far, which is remembered."""
        better = loss is not None and (self.best is None or loss < self.best)
        if better:
            self.best = loss
        return better
