"""One step under torch's profiler: the kernels that take longest, and how long the GPU has nothing to do. Out: text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN = 25


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile of one step."""

    kernels: dict[str, list[float]]
    """Seconds of each call; on a CPU of each operation."""

    @property
    def launches(self) -> int:
        """Launches of all kernels."""
        return sum(map(len, self.kernels.values()))

    def idle_share(self, step_seconds: float) -> float:
        """Share of a step in which no kernel runs, if they run one at a time. `step_seconds`: its time without a profiler."""
        return max(0.0, 1 - sum(map(sum, self.kernels.values())) / step_seconds)

    def table(self, title: str, step_seconds: float) -> str:
        """The longest first."""
        total = sum(map(sum, self.kernels.values())) or 1.0
        lines = [
            f"== {title}: step {1e3 * step_seconds:.2f} ms, kernels {1e3 * total:.2f} ms in {self.launches} launches, "
            f"idle {100 * self.idle_share(step_seconds):.1f} % of the step",
            f"{'ms':>9}{'share':>7}{'calls':>7}{'us each':>9}  kernel",
        ]
        ordered = sorted(self.kernels.items(), key=lambda item: -sum(item[1]))
        rest = [seconds for _, taken in ordered[SHOWN:] for seconds in taken]
        for name, taken in [*ordered[:SHOWN], *([(f"{len(ordered) - SHOWN} more", rest)] if rest else [])]:
            each = 1e6 * sum(taken) / len(taken)
            lines.append(f"{1e3 * sum(taken):>9.3f}{sum(taken) / total:>7.1%}{len(taken):>7}{each:>9.1f}  {name[:130]}")
        return "\n".join(lines) + "\n\n"


def profiled(step: Callable[[], object]) -> Profile:
    """Run the step once under the profiler."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in trace.events() or []:
        if event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            kernels[event.name].append((event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6)
    return Profile(dict(kernels))
