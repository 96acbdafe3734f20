"""Is HiMix as fast on the clock as its FLOPs say?

    python -m tools.bench_model                          every part that this machine can run
    python -m tools.bench_model --part concatenation     HiMix against the image inside the text, one process, 2 threads
    python -m tools.bench_model --part tensor            the same on two tensor-parallel ranks of one thread
    python -m tools.bench_model --part padding           packed samples against plain padded ones, LLaVA-like lengths
    python -m tools.bench_model --part training --recipe llama3_2_3b_instruct     a whole decoder; on a GPU its MFU

The concatenating model is built of the same Megatron layers with the same attention, its images as so many more tokens in
front of the text; beside it the same with its causal mask spelled out, as published code has it, to which no line is held.
Forward and backward of the layers alone, without embedding, head and optimizer; gradients are added up in place on both
sides. Repetitions take turns; printed are ratios first, then medians with the smallest and largest. Every stated
line is printed with what was wanted; exit code 1 when one is missed.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from himix_megatron import parallel
from himix_megatron.config import Config, Part
from himix_megatron.flops import Work, step_flops
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import RECIPES
from tools.measure import Line, product, report, take_turns

PARTS = ("concatenation", "tensor", "padding")


@dataclass(frozen=True)
class Arguments:
    """Compare HiMix's training speed with concatenation, with plain padding, and with the machine's matrix products."""

    part: Literal["all", "concatenation", "tensor", "padding", "training"] = "all"
    """What to measure; `all`: concatenation, tensor and padding, each in a process of its own."""
    recipe: str = "qwen2_0_5b_instruct"
    """Whose sizes are taken; weights are random."""
    layers: int | None = None
    """Decoder layers that are built; None: 4, and in `training` all."""
    samples: int = 8
    """Of a batch, each with one image (`padding`: twice as many)."""
    text_tokens: tuple[int, ...] = (64, 256)
    """Of each sample; `concatenation` and `tensor` go through all."""
    vision_tokens: int = 729
    """Of each image."""
    repetitions: int = 5
    """Measured ones; one more before them is not counted."""
    threads: int = 2
    """Of torch; of two tensor ranks each has half."""
    pack_text_tokens: int = 2048
    """`training`: text tokens of a pack."""
    pack_images: int = 8
    """`training`: images of a pack, one a sample."""
    packs: int = 4
    """`training`: packs of a step."""
    optimizer: bool = False
    """`training`: measure the optimizer's step too (beside the step without it)."""
    tower: bool = True
    """`training`: measure the step with the tower too (beside the step without it)."""
    peak_tflops: float | None = None
    """`training`: the chip's dense peak; None: known for H100, H200, A100, B200, else the median 2048x2048x2048 product."""


WANTED = {
    ("concatenation", 64): 12.0,
    ("concatenation", 256): 4.4,
    ("tensor", 64): 11.5,
    ("tensor", 256): 4.1,
    "product": 0.72,
    "align": 0.95,
}
"""Time of concatenation over HiMix, by part and text tokens; model FLOP/s over the product's; align's over the full step's."""


def sizes(arguments: Arguments, parts: tuple[Part, ...] = ("vision_kv", "language")) -> Config:
    """The recipe in fp32 on torch's attention, with as many layers and what trains. Raises: ValueError for a bad argument."""
    if arguments.recipe not in RECIPES:
        raise ValueError(f"--recipe is {arguments.recipe}: wanted one of {', '.join(RECIPES)}")
    for name in ("samples", "vision_tokens", "repetitions", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: wanted 1 or more")
    config = RECIPES[arguments.recipe]()
    return dataclasses.replace(
        config,
        # The embedding and the head are not run: a small vocabulary saves their memory.
        model=dataclasses.replace(config.model, num_layers=arguments.layers or 4, attention="torch", vocab_size=128),
        train=dataclasses.replace(config.train, precision="fp32", parts=parts, recompute="none"),
        parallel=dataclasses.replace(
            config.parallel, tensor=2 if arguments.part == "tensor" else 1, pipeline=1, sequence=False
        ),
    )


def build(config: Config, topology: parallel.Topology) -> Any:
    """The model with its gradient buffers."""
    from himix_megatron.kernels import detect
    from himix_megatron.model.himix import bare, build_stage

    stage = build_stage(config, detect(), topology, torch.nn.Identity())[0]
    stage.zero_grad_buffer()
    model = bare(stage)
    model.wrapper = [stage]  # kept alive: it owns the buffers and the hooks that fill them
    return model


def layers_step(
    model: Any, texts: list[int], visions: list[int], vision_width: int, *, packed: bool = False
) -> Callable[[], None]:
    """Forward and backward of the layers on samples of these lengths; texts of equal length, or packed."""
    from himix_megatron.model.layout import lay_out
    from himix_megatron.model.mixture_attention import normalise

    generator = torch.Generator().manual_seed(0)
    rows, num_text = (1, sum(texts)) if packed else (len(texts), texts[0])
    places, lengths = torch.empty(rows, num_text, dtype=torch.long), texts if packed else None
    hidden = torch.randn(num_text, rows, model.config.hidden_size, generator=generator)
    hidden.requires_grad_(any(p.requires_grad for p in model.decoder.layers[0].mlp.parameters()))
    features = torch.randn(sum(visions), vision_width, generator=generator)
    grad = torch.randn(hidden.shape, generator=generator)

    def step() -> None:
        layout = lay_out(places, lengths, visions, model.rotary_pos_emb)
        context = normalise(features, model.config.layernorm_epsilon)
        model.decoder(hidden, None, context=context, packed_seq_params=layout).backward(grad)
        hidden.grad = None

    return step


class MaskedAttention(torch.nn.Module):
    """Causal attention with its mask spelled out, in the place of the core attention."""

    def forward(self, query_SBQD: Any, key_SBGD: Any, value_SBGD: Any, vision_kv_TG2D: Any, layout: Any) -> Any:
        """float[S, B, Q*D]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBQD, key_SBGD, value_SBGD))
        mask = torch.ones(len(query_SBQD), len(query_SBQD), dtype=torch.bool).tril()
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=mask, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


def with_masks(model: Any, step: Callable[[], None]) -> Callable[[], None]:
    """The same step with `MaskedAttention` in every layer."""
    attentions = [layer.self_attention for layer in model.decoder.layers]

    def masked() -> None:
        own = [attention.core_attention for attention in attentions]
        for attention in attentions:
            attention.core_attention = MaskedAttention()
        step()
        for attention, core in zip(attentions, own, strict=True):
            attention.core_attention = core

    return masked


def concatenation(arguments: Arguments) -> list[Line]:
    """HiMix, the concatenating model, align and the machine's product in turns (align and product on one rank only)."""
    config = sizes(arguments)
    width, alone = config.vision.hidden_size, arguments.part == "concatenation"
    torch.set_num_threads(arguments.threads if alone else max(1, arguments.threads // 2))
    topology = parallel.start(config.parallel, seed=0)
    model = build(config, topology)
    steps: dict[str, Callable[[], None]] = {"product": product()} if alone else {}
    images = [arguments.vision_tokens] * arguments.samples
    for text in arguments.text_tokens:
        steps[f"himix {text}"] = layers_step(model, [text] * arguments.samples, images, width)
        concatenated = [text + arguments.vision_tokens] * arguments.samples
        steps[f"concatenation {text}"] = layers_step(model, concatenated, [0] * arguments.samples, width)
        steps[f"with masks {text}"] = with_masks(model, steps[f"concatenation {text}"])
    first = arguments.text_tokens[0]
    if alone:
        align = build(sizes(arguments, ("vision_kv",)), topology)
        steps[f"align {first}"] = layers_step(align, [first] * arguments.samples, images, width)
    seconds = take_turns(steps, arguments.repetitions, often={"product": 6, f"himix {first}": 2, f"align {first}": 2})
    is_first_rank = topology.rank == 0
    parallel.shutdown()
    lines = lines_of(arguments, config, seconds)
    title = f"{arguments.part}: {arguments.recipe}, {config.model.num_layers} layers, fp32, {arguments.samples} samples, "
    title += f"{arguments.vision_tokens} vision tokens each, {torch.get_num_threads()} threads a rank"
    if is_first_rank:
        report(title, lines, seconds)
    return lines


def lines_of(arguments: Arguments, config: Config, seconds: dict[str, list[float]]) -> list[Line]:
    """What the lines say, from the seconds of each step's repetitions."""
    from statistics import median

    time = {name: median(taken) for name, taken in seconds.items()}
    count = arguments.samples

    def flops(text: int, vision: int, parts: tuple[Part, ...] = ("vision_kv", "language")) -> float:
        trained = dataclasses.replace(config, train=dataclasses.replace(config.train, parts=parts))
        work = Work.of([text] * count, [vision] * count, head_tokens=0, causal=False)
        return step_flops(trained, work).decoder

    lines = []
    for text in arguments.text_tokens:
        predicted = flops(text + arguments.vision_tokens, 0) / flops(text, arguments.vision_tokens)
        ratio = time[f"concatenation {text}"] / time[f"himix {text}"]
        what = f"concatenation takes so many times longer than HiMix, {text} text tokens (by FLOPs {predicted:.1f})"
        lines.append(Line(what, ratio, WANTED.get((arguments.part, text))))
        ratio = time[f"with masks {text}"] / time[f"himix {text}"]
        lines.append(Line(f"the same, concatenation's mask spelled out, {text} text tokens", ratio))
    if "product" in time:
        text = arguments.text_tokens[0]
        full, align = flops(text, arguments.vision_tokens), flops(text, arguments.vision_tokens, ("vision_kv",))
        of_product = full / time[f"himix {text}"] / (2 * 2048**3 / time["product"])
        lines.append(Line(f"HiMix's model FLOP/s over the 2048^3 product's, {text} text tokens", of_product, WANTED["product"]))
        of_full = align / time[f"align {text}"] / (full / time[f"himix {text}"])
        lines.append(Line("align's model FLOP/s over the full step's", of_full, WANTED["align"]))
    return lines


def run_parts() -> int:
    """Each part in a process of its own. Returns: 1 if one missed a line."""
    codes = [subprocess.run([sys.executable, "-m", "tools.bench_model", "--part", p, *sys.argv[1:]]).returncode for p in PARTS]
    return max(codes)


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench_model", __doc__)
    sizes(arguments)
    os.environ["OMP_NUM_THREADS"] = str(max(1, arguments.threads // 2) if arguments.part == "tensor" else arguments.threads)
    if arguments.part == "all":
        return run_parts()
    if arguments.part == "padding":
        from tools.bench_padding import padding

        return Line.code(padding(arguments))
    if arguments.part == "training":
        from tools.bench_training import training

        return Line.code(training(arguments))
    parallel.ensure_ranks(2 if arguments.part == "tensor" else 1, "tools.bench_model", sys.argv[1:])
    return Line.code(concatenation(arguments))


if __name__ == "__main__":
    run_main(main)
