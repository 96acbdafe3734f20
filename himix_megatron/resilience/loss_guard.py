"""The loss guard decides whether a step may change the model: not with a loss or gradient that is not finite, nor, if
configured, at a loss spike.

Flows in: each step's loss and whether everything is finite, the same on every rank; out: a decision, the same on every rank.
Its state is recorded with each save, so that a resumed run decides as one that was never stopped.
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
"""The window in which `health.max_skipped_steps` counts."""


@dataclass(frozen=True, slots=True)
class StepDecision:
    """What to do with a step."""

    action: Literal["update", "skip", "rollback", "stop"]
    reason: str = ""
    """One line, for the log or RUN/STOP."""

    @property
    def stop_reason(self) -> str | None:
        """Why the run must stop; None: it need not."""
        return self.reason if self.action == "stop" else None


UPDATE = StepDecision("update")


class LossGuard:
    """Checks steps one after the other."""

    def __init__(self, config: HealthConfig, state: dict[str, Any] | None = None, *, num_rollbacks: int = 0) -> None:
        """`state`: of the checkpoint that the run resumes from (`state()`); `num_rollbacks`: in the run so far."""
        state = state or {}
        self.config, self.num_rollbacks = config, num_rollbacks
        self.skipped: list[int] = list(state.get("skipped", ()))
        """Recent steps without an update."""
        self._step, self._can_roll_back = 0, False
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=config.spike_window_steps)

    def state(self) -> dict[str, Any]:
        """What a later launch needs, as JSON."""
        return {"skipped": self.skipped, "losses": list(self._losses)}

    def points(self) -> dict[str, float]:
        """For TensorBoard."""
        return {"health/recently_skipped_steps": len(self.skipped), "health/rollbacks": self.num_rollbacks}

    def begin_step(self, step: int, *, can_roll_back: bool) -> None:
        """Number of the step to check next, and whether there is a checkpoint to roll back to and data to continue with."""
        self._step, self._can_roll_back = step, can_roll_back
        self.skipped = [number for number in self.skipped if number > step - BUDGET_STEPS]

    def check(self, loss: float, finite: bool) -> StepDecision:
        """What to do with the step. `loss`: nan where no answer was read; `finite`: loss and gradient, on all ranks."""
        limit = self._limit()
        if not finite:
            decision = self._skip(f"step {self._step}: the loss or a gradient is not finite (loss {loss:.6g})")
        elif loss > limit:  # nan is not
            decision = self._spike(
                f"step {self._step}: loss {loss:.6g} is a spike (limit {limit:.6g} from the last {len(self._losses)} losses)"
            )
        else:
            decision = UPDATE
        if decision.action == "update" and not math.isnan(loss):
            self._losses.append(loss)
        if decision.action in ("update", "skip") and decision.reason:
            logger.warning("%s: %s", decision.reason, "no update" if decision.action == "skip" else "update applied anyway")
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
        """The highest loss that is not a spike."""
        if len(self._losses) < self.config.spike_window_steps:
            return math.inf
        mean = statistics.fmean(self._losses)
        return mean + self.config.spike_sigmas * max(statistics.pstdev(self._losses, mean), abs(mean) / 100)
