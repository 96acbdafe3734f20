"""Packed HiMix and HiMix as it is usually written, with padded texts, on lengths like LLaVA's: time and memory.

A part of `tools.bench.decoder`. Padded texts go through `himix_megatron/conversion/reference_model.py`. Text lengths are
log-normal, around 44 tokens for captions and 314 for instructions, with one image each. Real text tokens are counted. Memory is
the peak that a step adds to a process of its own.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from himix_megatron.conversion.reference_model import PlainDecoder
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import parse_settings, run_main
from tools.bench.decoder_setup import Arguments, build, layers_step, precision, sizes
from tools.bench.measure import Line, report, take_turns

LENGTHS = {44: 0.5, 314: 0.9}
"""Mean text tokens and the log-normal's sigma."""
WANTED_SPEED = {44: 1.5, 314: 2.0}
WANTED_MEMORY = 0.6


def lengths_of(mean: int, count: int) -> list[int]:
    """`count` text lengths with exactly this mean."""
    sigma = LENGTHS[mean]
    drawn = np.random.default_rng(0).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return [max(8, round(length)) for length in drawn * mean / drawn.mean()]


def padding(arguments: Arguments) -> list[Line]:
    """Measure, print and return the lines of both means."""
    torch.set_num_threads(arguments.threads)
    topology = init_distributed(sizes(arguments).parallel, seed=0)
    lines = []
    for mean in LENGTHS:
        lengths = lengths_of(mean, 2 * arguments.samples)
        fill = sum(lengths) / (max(lengths) * len(lengths))
        seconds = take_turns({name: make(arguments, lengths, topology) for name, make in SIDES.items()}, arguments.repetitions)
        speed = statistics.median(seconds["plain padded"]) / statistics.median(seconds["packed"])
        memory = {name: memory_of(name, mean) for name in SIDES}
        held = not torch.cuda.is_available()  # wanted of a CPU
        own = [
            Line(
                f"real text tokens a second, packed over plain padded, mean {mean}", speed, WANTED_SPEED[mean] if held else None
            ),
            Line(
                f"peak memory of a step, packed over plain padded, mean {mean} ({memory['packed'] / 2**20:.0f} and "
                f"{memory['plain padded'] / 2**20:.0f} MiB)",
                memory["packed"] / memory["plain padded"],
                WANTED_MEMORY if held else None,
                at_most=True,
            ),
        ]
        title = f"padding: {arguments.recipe}, {arguments.layers or 4} layers, {precision()}, {len(lengths)} samples of one "
        title += f"image of {arguments.vision_tokens} tokens, texts log-normal, mean {mean}, sigma "
        title += f"{LENGTHS[mean]}, padding filled to {fill:.2f}, {torch.get_num_threads()} threads"
        report(title, own, seconds)
        lines += own
    shutdown_distributed()
    return lines


def packed(arguments: Arguments, lengths: list[int], topology: Topology) -> Callable[[], None]:
    """A step of the project's layers: all texts one after the other."""
    config = sizes(arguments)
    model = build(config, topology)
    images = [arguments.vision_tokens] * len(lengths)
    return layers_step(model, lengths, images, config.vision.hidden_size, packed=True)


def plain_padded(arguments: Arguments, lengths: list[int], topology: Topology) -> Callable[[], None]:
    """A step of the plain layers; gradients are added up in place."""
    from himix_megatron.distributed.megatron_config import params_dtype

    config = sizes(arguments)
    width = config.vision.hidden_size
    decoder = PlainDecoder(config.model, width).to(topology.device, params_dtype(config))
    generator, own = torch.Generator().manual_seed(0), next(decoder.parameters())
    text = torch.randn(len(lengths), max(lengths), config.model.hidden_size, generator=generator).to(own).requires_grad_()
    vision = torch.randn(len(lengths), arguments.vision_tokens, width, generator=generator).to(own)
    grad = torch.randn(text.shape, generator=generator).to(own)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter).zero_()  # twice: the first leaves memory that is not there yet

    def step() -> None:
        decoder(text, vision, lengths).backward(grad)
        text.grad = None

    return step


SIDES = {"packed": packed, "plain padded": plain_padded}


def memory_of(side: str, mean: int) -> int:
    """Bytes that a step of one side adds at its peak, in a fresh process."""
    flags = [*sys.argv[1:], "--part", "padding", "--side", side, "--mean", str(mean)]
    done = subprocess.run([sys.executable, "-m", "tools.bench.padding", *flags], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def added_bytes(step: Callable[[], None]) -> int:
    """The most that a step holds less what was held before it: of the GPU's tensors, or of resident memory (Linux)."""
    if torch.cuda.is_available():
        step()  # workspaces are not the step's own
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@dataclass(frozen=True)
class OneSide(Arguments):
    """What a step of one side adds to this process's memory, in bytes; `tools.bench.decoder` calls this."""

    side: Literal["packed", "plain padded"] = "packed"
    """Which."""
    mean: int = 314
    """Text tokens a sample."""


def main() -> int:
    arguments = parse_settings(OneSide, sys.argv[1:], "python -m tools.bench.padding")
    torch.set_num_threads(arguments.threads)
    topology = init_distributed(sizes(arguments).parallel, seed=0)
    print(added_bytes(SIDES[arguments.side](arguments, lengths_of(arguments.mean, 2 * arguments.samples), topology)))
    shutdown_distributed()
    return 0


if __name__ == "__main__":
    run_main(main)
