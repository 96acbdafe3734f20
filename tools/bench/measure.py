"""What benchmarks share: repetitions in turns, medians with their spread, and lines that must hold."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Line:
    """A measured number, and the least value wanted (None: nothing; `at_most`: the largest)."""

    what: str
    value: float
    wanted: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the number is as wanted."""
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
        """The exit code: 1 if a line is missed."""
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
    steps: Mapping[str, Any],
    repetitions: int,
    often: dict[str, int] | None = None,
    measure: Callable[[Any], float] = seconds_of,
) -> dict[str, list[float]]:
    """The repetitions of every step, taken in turns after one uncounted repetition of each.

    Args:
        often: how many times in a row a short step is measured at each turn.
        measure: seconds (or a rate) of one repetition.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repetitions + 1):
        for name, step in steps.items():
            for _ in range((often or {}).get(name, 1) if number else 1):
                seconds = measure(step)
                if number:
                    taken[name].append(seconds)
    return taken


class OtherProcess:
    """`python -m module flags`, which answers with `serve`: one side of a comparison in its own process."""

    def __init__(self, module: str, flags: Sequence[str]):
        self._name = " ".join(("python -m", module, *flags))
        command = [sys.executable, "-m", module, *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # it ends with its input

    def seconds_of(self, step: str) -> float:
        """How long its step of this name takes. Raises: RuntimeError when the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{step}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its output ends below
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return float(line.removeprefix(_ANSWER))
        raise RuntimeError(f"{self._name} ended with exit code {self._process.wait()} before it measured {step!r}")


_ANSWER = "seconds: "


def serve(steps: Mapping[str, Callable[[], object]]) -> None:
    """Measure the steps that standard input names, a line each, until it ends; on all ranks, of which the first reads."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    while True:
        asked = [sys.stdin.readline().strip() if rank == 0 else ""]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(asked, src=0)
        if not asked[0]:
            return
        seconds = seconds_of(steps[asked[0]])
        if rank == 0:
            print(f"{_ANSWER}{seconds}", flush=True)


def report(title: str, lines: Sequence[Line], taken: Mapping[str, Sequence[float]], unit: str = "ms") -> None:
    """Ratios first, then medians with the smallest and largest. `taken`: seconds where the unit is ms, else rates."""
    print(*lines, f"{title}; torch {torch.__version__}, load {os.getloadavg()[0]:.1f}", sep="\n")
    scale, form = (1000.0, ",.1f") if unit == "ms" else (1.0, ",.0f")
    for name, values in taken.items():
        middle, low, high = (format(scale * pick(values), form) for pick in (statistics.median, min, max))
        print(f"  {name:<32}{middle:>10} {unit}  ({low} to {high})")
    print(flush=True)


def product(size: int = 2048, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Callable[[], torch.Tensor]:
    """A square matrix product."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return lambda: left @ right
