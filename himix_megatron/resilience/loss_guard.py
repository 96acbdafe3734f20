"""Whether a step may change the model: not if its loss or gradient is not finite, nor, if asked, at a spike of the loss.

Flows in: each step's loss and whether all is finite, the same on every rank; out: a verdict, the same on every rank. What it
remembers is noted with each save, so that a run that is continued judges as one that was never stopped.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from ..config import HealthConfig

logger = logging.getLogger(__name__)

BUDGET_STEPS = 1000
"""Over which `health.max_skipped_steps` counts."""


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What becomes of a step."""

    action: Literal["update", "skip", "rollback", "stop"]
    reason: str = ""
    """One line, for the log or RUN/STOP."""

    @property
    def stop_reason(self) -> str | None:
        """Why the run must stop; None: it need not."""
        return self.reason if self.action == "stop" else None


UPDATE = StepDecision("update")


class LossGuard:
    """Judges steps one after the other."""

    def __init__(self, config: HealthConfig, state: dict[str, Any] | None = None, *, num_rollbacks: int = 0) -> None:
        """`state`: as `state` gave it at the checkpoint that the run goes on from; `num_rollbacks`: in the run so far."""
        state = state or {}
        self.config, self.num_rollbacks = config, num_rollbacks
        self.skipped: list[int] = list(state.get("skipped", ()))
        """Steps without an update, the recent ones."""
        self._step, self._can_roll_back = 0, False
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=config.spike_window_steps)

    def state(self) -> dict[str, Any]:
        """What is remembered, as JSON."""
        return {"skipped": self.skipped, "losses": list(self._losses)}

    def points(self) -> dict[str, float]:
        """For TensorBoard."""
        return {"health/recently_skipped_steps": len(self.skipped), "health/rollbacks": self.num_rollbacks}

    def begin_step(self, step: int, *, can_roll_back: bool) -> None:
        """The next step to judge has this number; there is, or is not, a checkpoint to go back to and data to go on with."""
        self._step, self._can_roll_back = step, can_roll_back
        self.skipped = [number for number in self.skipped if number > step - BUDGET_STEPS]

    def check(self, loss: float, finite: bool) -> StepDecision:
        """What becomes of the step. `loss`: nan where no answer was read; `finite`: loss and gradient, on all ranks."""
        limit = self._limit()
        if not finite:
            decision = self._skip(f"step {self._step} has a loss or a gradient that is not finite (loss {loss:.6g})")
        elif loss > limit:  # nan is not
            decision = self._spike(
                f"step {self._step} has a loss of {loss:.6g}, a spike: above {limit:.6g} by the {len(self._losses)} before it"
            )
        else:
            decision = UPDATE
        if decision.action == "update" and not math.isnan(loss):
            self._losses.append(loss)
        if decision.action in ("update", "skip") and decision.reason:
            logger.warning("%s: %s", decision.reason, "no update" if decision.action == "skip" else "trained on all the same")
        return decision

    def _spike(self, reason: str) -> StepDecision:
        if self.config.spike_action == "none":
            return StepDecision("update", reason)
        if self.config.spike_action == "skip" or not self._can_roll_back:
            return self._skip(reason)
        if self.num_rollbacks < self.config.max_rollbacks:
            return StepDecision("rollback", reason)
        return StepDecision("stop", f"{reason}, after {self.num_rollbacks} rollbacks (health.max_rollbacks)")

    def _skip(self, reason: str) -> StepDecision:
        self.skipped.append(self._step)
        budget = self.config.max_skipped_steps
        if len(self.skipped) <= budget:
            return StepDecision("skip", reason)
        return StepDecision(
            "stop",
            f"{reason}; {len(self.skipped)} of the last {BUDGET_STEPS} steps, more than health.max_skipped_steps {budget}",
        )

    def _limit(self) -> float:
        """The highest loss that is no spike."""
        if len(self._losses) < self.config.spike_window_steps:
            return math.inf
        mean = statistics.fmean(self._losses)
        return mean + self.config.spike_sigmas * max(statistics.pstdev(self._losses, mean), abs(mean) / 100)
