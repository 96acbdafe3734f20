"""Stops a run that cannot read too many of its samples. Flows in: each step's counts; out: a reason to stop, or none."""

from __future__ import annotations

from ..config import Config
from ..monitoring.metrics import StepCounts


class BadSampleBudget:
    """How many samples may be unreadable: `data.max_bad_fraction` of those since this launch, counted as at least 1,000."""

    def __init__(self, config: Config):
        self.max_fraction = config.data.max_bad_fraction
        self.num_bad = self.num_seen = 0

    def exceeded(self, counts: StepCounts, num_samples: int) -> str | None:
        """Add a step. Returns: that there were too many, as a line for RUN/STOP; the same on every rank."""
        self.num_bad, self.num_seen = self.num_bad + counts.bad_samples, self.num_seen + num_samples
        if self.num_bad <= self.max_fraction * max(self.num_seen, 1000):
            return None
        return (
            f"{self.num_bad} of {self.num_seen} samples could not be read, more than data.max_bad_fraction "
            f"{self.max_fraction}: RUN/log names them"
        )
