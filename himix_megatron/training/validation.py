"""The loss on a held-out set, now and then. Flows in: the set's plan and the run's model; out: a number, or None."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config import Config
from ..data.loading.loader import step_loader
from ..data.loading.plan import SamplingPlan, StepPlan, TrainingLength
from ..runtime.failpoints import failpoint
from .builder import TrainingComponents, step_reader
from .resume import RunInputs
from .startup import RunContext
from .train_step import count, run_schedule, synced_batches


class Validation:
    """The loss on the held-out set, at the intervals that `log` says."""

    def __init__(self, config: Config, start: RunInputs, run: TrainingComponents, context: RunContext):
        self.context = context
        self.config, self.run = config, run
        # One rank looks for all: what two nodes see of a shared folder may differ for a while, and saving goes by this.
        self.best = run.checkpoints.ranks.on_rank_zero(run.checkpoints.best_validation_loss)
        self.plan = start.held_out
        self.reader = (
            None if start.held_out is None else step_reader(config, start.held_out, run.topology, start.held_out_features)
        )

    @torch.no_grad()
    def measure(self, step: int, *, last: bool) -> float | None:
        """Mean loss over the answer tokens of the set's first samples, in its own fixed order.

        None: not now, no answers, or a stop request meanwhile.
        """
        if self.plan is None or self.reader is None:
            return None
        if not (last or step % self.config.log.validation_interval_steps == 0):
            return None
        total = tokens = 0.0
        batches = step_loader(self.reader, self._steps(self.plan), self.config.data.num_workers)
        for batch, images in synced_batches(self.run, batches, self.context.request):
            failpoint("validation/step", progress=True)
            reported = run_schedule(self.run, batch, images, forward_only=True)
            counts, _, _ = count(self.config, self.run.topology, batch, reported)
            if counts.answer_tokens:
                total, tokens = total + counts.loss * counts.answer_tokens, tokens + counts.answer_tokens
        return total / tokens if tokens and not self.context.request.is_agreed else None

    def _steps(self, plan: SamplingPlan) -> Iterator[StepPlan]:
        """Whole batches, as many as the samples to look at fill, but at least one."""
        available = min(self.config.log.validation_samples, plan.epoch_samples)
        for step in plan.steps(TrainingLength(None, available)):
            if step.step and step.after.samples > available:
                return
            yield step

    def is_best(self, loss: float | None) -> bool:
        """Whether this is the lowest loss of the run so far; remembers it."""
        better = loss is not None and (self.best is None or loss < self.best)
        if better:
            self.best = loss
        return better
