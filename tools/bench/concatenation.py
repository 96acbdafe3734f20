"""HiMix's layers beside vanilla concatenation: how much of the gain that the FLOPs promise is real?

A part of `tools.bench.decoder`. Each side runs in its own processes, as its users would run it: HiMix as this project starts
it, vanilla (`vanilla_decoder.py`) as megatron-core comes, with the C library's own handling of freed memory. Both accumulate
weight gradients in place. The strictest comparison is printed too, without a wanted ratio: concatenation through this
project's faster layers.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from himix_megatron.config import Config, Part
from himix_megatron.costs.flops import Work, step_flops
from himix_megatron.distributed import cpu_backend
from himix_megatron.distributed.launch import ensure_ranks
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import parse_settings, run_main
from tools.bench.decoder_setup import Arguments, build, layers_step, sizes
from tools.bench.measure import Line, OtherProcess, product, report, serve, take_turns

Steps = dict[str, Callable[[], object]]

WANTED = {
    ("concatenation", 64): 12.0,
    ("concatenation", 256): 4.4,
    ("tensor", 64): 11.5,
    ("tensor", 256): 4.1,
    "product": 0.72,
    "align": 0.95,
}
"""Time of vanilla over HiMix, by part and text tokens; model FLOP/s over the product's; align's over the full step's."""


def concatenation(arguments: Arguments) -> list[Line]:
    """Measure both sides in turns, on one rank also align and the machine's matrix product. Prints and returns the lines."""
    config, alone = sizes(arguments), arguments.part == "concatenation"
    first = arguments.text_tokens[0]
    with (
        OtherProcess("tools.bench.concatenation", [*sys.argv[1:], "--side", "himix"]) as himix,
        OtherProcess("tools.bench.concatenation", [*sys.argv[1:], "--side", "vanilla"]) as vanilla,
    ):
        measured = {"product": himix} if alone else {}
        for text in arguments.text_tokens:
            measured |= {f"himix {text}": himix, f"vanilla {text}": vanilla, f"ours, concatenating {text}": himix}
        if alone:
            measured[f"align {first}"] = himix
        steps = {name: (lambda side=side, name=name: side.seconds_of(name)) for name, side in measured.items()}
        often = {"product": 6, f"himix {first}": 2, f"align {first}": 2}
        seconds = take_turns(steps, arguments.repetitions, often, measure=lambda ask: ask())
    lines = lines_of(arguments, config, seconds)
    title = f"{arguments.part}: {arguments.recipe}, {config.model.num_layers} layers, {config.train.precision}, "
    title += f"{arguments.samples} samples, "
    title += f"{arguments.vision_tokens} vision tokens each, {_threads(arguments)} threads a rank"
    report(title, lines, seconds)
    return lines


def lines_of(arguments: Arguments, config: Config, seconds: dict[str, list[float]]) -> list[Line]:
    """The lines, from the seconds of each step's repetitions."""
    time = {name: median(taken) for name, taken in seconds.items()}
    count = arguments.samples

    def flops(text: int, vision: int, parts: tuple[Part, ...] = ("vision_kv", "language")) -> float:
        trained = dataclasses.replace(config, train=dataclasses.replace(config.train, trainable_parts=parts))
        work = Work.of([text] * count, [vision] * count, head_tokens=0, causal=False)
        return step_flops(trained, work).decoder

    lines = []
    for text in arguments.text_tokens:
        predicted = flops(text + arguments.vision_tokens, 0) / flops(text, arguments.vision_tokens)
        of_himix = time[f"himix {text}"]
        what = f"vanilla concatenation's time over HiMix's, {text} text tokens (by FLOPs {predicted:.1f})"
        held = not torch.cuda.is_available()  # the ratios are wanted of a CPU
        lines.append(Line(what, time[f"vanilla {text}"] / of_himix, WANTED.get((arguments.part, text)) if held else None))
        lines.append(Line("the same through this project's layers", time[f"ours, concatenating {text}"] / of_himix))
    if "product" in time:
        text = arguments.text_tokens[0]
        full, align = flops(text, arguments.vision_tokens), flops(text, arguments.vision_tokens, ("vision_kv",))
        size, held = of_product()[0], not torch.cuda.is_available()
        share = full / time[f"himix {text}"] / (2 * size**3 / time["product"])
        what = f"HiMix's model FLOP/s over the {size}^3 product's, {text} text tokens"
        lines.append(Line(what, share, WANTED["product"] if held else None))
        of_full = align / time[f"align {text}"] / (full / time[f"himix {text}"])
        lines.append(Line("align's model FLOP/s over the full step's", of_full, WANTED["align"] if held else None))
    return lines


def himix(arguments: Arguments, topology: Topology) -> Steps:
    """HiMix, concatenation through the same layers, and on one rank align and the machine's product."""
    config = sizes(arguments)
    model, width, images = build(config, topology), config.vision.hidden_size, [arguments.vision_tokens] * arguments.samples
    steps: Steps = {}
    for text in arguments.text_tokens:
        steps[f"himix {text}"] = layers_step(model, [text] * arguments.samples, images, width)
        concatenated = [text + arguments.vision_tokens] * arguments.samples
        steps[f"ours, concatenating {text}"] = layers_step(model, concatenated, [0] * arguments.samples, width)
    if arguments.part == "concatenation":
        first = arguments.text_tokens[0]
        align = build(sizes(arguments, ("vision_kv",)), topology)
        steps |= {
            "product": product(*of_product()),
            f"align {first}": layers_step(align, [first] * arguments.samples, images, width),
        }
    return steps


def vanilla(arguments: Arguments, _: Topology) -> Steps:
    """Megatron-core's own layers."""
    from tools.bench.vanilla_decoder import VanillaDecoder

    config = sizes(arguments)
    decoder = VanillaDecoder(config)

    def step_of(num_tokens: int) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(0)
        shape, own = (num_tokens, arguments.samples, config.model.hidden_size), next(decoder.parameters())
        hidden = torch.randn(shape, generator=generator).to(own).requires_grad_()
        grad = torch.randn(shape, generator=generator).to(own)

        def step() -> None:
            decoder(hidden).backward(grad)
            hidden.grad = None

        return step

    return {f"vanilla {text}": step_of(text + arguments.vision_tokens) for text in arguments.text_tokens}


@dataclass(frozen=True)
class OneSide(Arguments):
    """Measure the steps of one side that standard input names; `tools.bench.decoder` calls this."""

    side: Literal["himix", "vanilla"] = "himix"
    """Which."""


def of_product() -> tuple[int, torch.dtype, str]:
    """Size, precision and device of the matrix product with which the layers are compared."""
    return (8192, torch.bfloat16, "cuda") if torch.cuda.is_available() else (2048, torch.float32, "cpu")


def _threads(arguments: Arguments) -> int:
    return max(1, arguments.threads // 2) if arguments.part == "tensor" else arguments.threads


def main() -> int:
    arguments = parse_settings(OneSide, sys.argv[1:], "python -m tools.bench.concatenation", __doc__)
    os.environ["OMP_NUM_THREADS"] = str(_threads(arguments))
    ensure_ranks(2 if arguments.part == "tensor" else 1, "tools.bench.concatenation", sys.argv[1:])
    torch.set_num_threads(_threads(arguments))
    if arguments.side == "vanilla":
        cpu_backend.keep_freed_memory = lambda: None  # ours, not megatron-core's
    topology = init_distributed(sizes(arguments).parallel, seed=0)
    serve({"himix": himix, "vanilla": vanilla}[arguments.side](arguments, topology))
    shutdown_distributed()
    return 0


if __name__ == "__main__":
    run_main(main)
