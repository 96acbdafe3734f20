"""What the model's benchmarks share: taking turns, medians with their spread, lines that must hold."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Line:
    """A number that was measured, and the least that was wanted (None: nothing in particular; `at_most` turns it round)."""

    what: str
    value: float
    wanted: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether it is as wanted."""
        if self.wanted is None:
            return True
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    def __str__(self) -> str:
        if self.wanted is None:
            return f"{self.value:8.3g}  {self.what}"
        sign = "<=" if self.at_most else ">="
        return f"{self.value:8.3g}  {self.what}: wanted {sign} {self.wanted:g}, {'holds' if self.holds else 'MISSED'}"

    @staticmethod
    def code(lines: Iterable[Line]) -> int:
        """Exit code: 1 if a line is missed."""
        return int(not all(line.holds for line in lines))


def seconds_of(step: Callable[[], object]) -> float:
    """How long a step takes: by CUDA events where there is a device, so that queued work counts, else by the clock."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if torch.cuda.is_available():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def take_turns(
    steps: dict[str, Callable[[], object]], repetitions: int, often: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of every step's repetitions, taken in turns after one of each that is not counted.

    `often`: how many times in a row a short step is measured at each turn.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repetitions + 1):
        for name, step in steps.items():
            for _ in range((often or {}).get(name, 1) if number else 1):
                seconds = seconds_of(step)
                if number:
                    taken[name].append(seconds)
    return taken


def report(title: str, lines: Sequence[Line], seconds: dict[str, list[float]]) -> None:
    """Ratios first, then medians with the smallest and largest."""
    for line in lines:
        print(line)
    print(f"{title}; torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    for name, taken in seconds.items():
        print(f"  {name:<24}{1000 * statistics.median(taken):10.1f} ms  ({1000 * min(taken):.1f} to {1000 * max(taken):.1f})")
    print(flush=True)


def product(size: int = 2048, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """A square matrix product."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: left @ right
