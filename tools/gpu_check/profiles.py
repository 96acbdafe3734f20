"""One step under torch's profiler: the kernels that take longest, and how long the GPU has nothing to do. Out: text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN = 25
NAME_CHARACTERS = 130


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one step."""

    kernels: dict[str, tuple[int, float]]
    """Calls and seconds of each; on a CPU of each operation."""
    busy_seconds: float
    """In which at least one kernel ran."""
    launches: int


def profiled(step: Callable[[], object]) -> Profile:
    """Run the step once under the profiler."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in trace.events() or [] if event.device_type == device]
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        kernels[event.name].append(own / 1e6)
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    return Profile({name: (len(taken), sum(taken)) for name, taken in kernels.items()}, _union(spans) / 1e6, len(events))


def _union(spans: list[tuple[float, float]]) -> float:
    """The length that spans, sorted, cover together."""
    covered, end = 0.0, float("-inf")
    for first, last in spans:
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


def table(title: str, found: Profile, step_seconds: float) -> str:
    """The longest first. `step_seconds`: of the step as it runs without a profiler."""
    total = sum(seconds for _, seconds in found.kernels.values()) or 1.0
    lines = [
        f"== {title}",
        f"step {1e3 * step_seconds:.2f} ms, kernels {1e3 * total:.2f} ms in {found.launches} launches, GPU busy "
        f"{1e3 * found.busy_seconds:.2f} ms, idle {100 * idle_share(found, step_seconds):.1f} % of the step",
        f"{'ms':>9}{'share':>7}{'calls':>7}{'us each':>9}  kernel",
    ]
    ordered = sorted(found.kernels.items(), key=lambda item: -item[1][1])
    for name, (calls, seconds) in ordered[:SHOWN]:
        each = 1e6 * seconds / calls
        lines.append(f"{1e3 * seconds:>9.3f}{seconds / total:>7.1%}{calls:>7}{each:>9.1f}  {name[:NAME_CHARACTERS]}")
    rest = ordered[SHOWN:]
    if rest:
        calls, seconds = sum(item[1][0] for item in rest), sum(item[1][1] for item in rest)
        lines.append(f"{1e3 * seconds:>9.3f}{seconds / total:>7.1%}{calls:>7}{1e6 * seconds / calls:>9.1f}  {len(rest)} more")
    return "\n".join(lines) + "\n\n"


def idle_share(found: Profile, step_seconds: float) -> float:
    """Of the step, in which no kernel runs."""
    return max(0.0, 1 - found.busy_seconds / step_seconds)
