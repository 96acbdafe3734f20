"""How many samples may fail to read. Flows in: counts of each step over all ranks; out: the reason to stop, if too many did."""

from __future__ import annotations


class BadSampleBudget:
    """Allows `data.max_bad_fraction` of the samples since this launch, counted as at least 1,000."""

    def __init__(self, max_bad_fraction: float):
        self.fraction = max_bad_fraction
        self.bad = self.seen = 0

    def exceeded(self, num_bad: int, num_samples: int) -> str | None:
        """Count a step. Returns: why the run must stop, in one line, the same on every rank; None if it goes on."""
        self.bad, self.seen = self.bad + num_bad, self.seen + num_samples
        if self.bad <= self.fraction * max(self.seen, 1000):
            return None
        return (
            f"{self.bad} of {self.seen} samples could not be read, more than data.max_bad_fraction {self.fraction}: "
            "RUN/log names them"
        )
