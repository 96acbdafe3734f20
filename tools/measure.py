"""What the model's benchmarks share: taking turns, medians with their spread, counted FLOPs, lines that must hold."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from himix_megatron.config import ModelConfig
from himix_megatron.flops import head_flops, layer_flops


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


def decoder_flops(
    model: ModelConfig,
    vision_width: int,
    texts: Sequence[int],
    visions: Sequence[int],
    *,
    trained: Literal["all", "vision_kv"] = "all",
    head_tokens: int = 0,
) -> float:
    """FLOPs that forward and backward of the decoder need: counted as in himix_megatron/flops.py.

    The features need no gradient. `vision_kv`: weight gradients of the vision projections alone, and nothing in front of the
    first layer's. `head_tokens`: tokens that go through the LM head, whose gradient flows on also where it is frozen.
    """
    samples = [layer_flops(model, vision_width, text_tokens=s, vision_tokens=n) for s, n in zip(texts, visions, strict=True)]
    text, vision, attention = (sum(getattr(sample, part) for sample in samples) for part in ("text", "vision", "attention"))
    head = head_flops(model, text_tokens=head_tokens)
    layers = model.num_layers
    forward = layers * (text + vision + attention) + head
    if trained == "all":
        return forward + layers * (2 * text + vision + 2 * attention) + 2 * head
    qkv = (
        2.0
        * sum(texts)
        * model.hidden_size
        * model.channels_per_head
        * (model.num_attention_heads + 2 * model.num_query_groups)
    )
    return forward + layers * (text + vision + 2 * attention) - qkv - attention / 2 + head
