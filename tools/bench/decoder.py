"""Is HiMix as fast on the clock as its FLOPs say?

    python -m tools.bench.decoder                          every part that this machine can run
    python -m tools.bench.decoder --part concatenation     HiMix against the image inside the text, one process, 2 threads
    python -m tools.bench.decoder --part tensor            the same on two tensor-parallel ranks of one thread
    python -m tools.bench.decoder --part padding           packed samples against plain padded ones, LLaVA-like lengths
    python -m tools.bench.decoder --part training --recipe llama3_2_3b_instruct     a whole decoder; on a GPU its MFU

Vanilla concatenation is megatron-core's own layers, the images as more tokens in front of the text (`vanilla_decoder.py`).
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

from himix_megatron.config import Config, Part
from himix_megatron.distributed.topology import Topology
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import RECIPES
from tools.bench.measure import Line

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
    pack_max_text_tokens: int = 8192
    """`training`: text tokens of a pack."""
    pack_max_images: int = 26
    """`training`: images of a pack, one a sample."""
    packs: int = 2
    """`training`: packs of a step."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """`training`: backend of the layers, as --model.layer-spec."""
    fp8: str = "none"
    """`training`: as --train.fp8."""
    recompute: Literal["none", "selective", "full"] = "none"
    """`training`: as --train.recompute."""
    cuda_graphs: Literal["off", "on"] = "off"
    """`training`: as --train.cuda-graphs."""
    optimizer: bool = False
    """`training`: measure the optimizer's step too (beside the step without it)."""
    tower: bool = True
    """`training`: measure the step with the tower too (beside the step without it)."""
    peak_tflops: float | None = None
    """`training`: the chip's dense peak; None: known for H100, H200, A100, B200, else the median 2048x2048x2048 product."""


def sizes(arguments: Arguments, parts: tuple[Part, ...] = ("vision_kv", "language")) -> Config:
    """The recipe on torch's attention, on a CPU in fp32, with as many layers and what trains. Raises: ValueError for a bad
    argument."""
    if arguments.recipe not in RECIPES:
        raise ValueError(f"--recipe is {arguments.recipe}: wanted one of {', '.join(RECIPES)}")
    for name in ("samples", "vision_tokens", "repetitions", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: wanted 1 or more")
    config = RECIPES[arguments.recipe]()
    return dataclasses.replace(
        config,
        # The embedding and the head are not run: a small vocabulary saves their memory.
        model=dataclasses.replace(config.model, num_layers=arguments.layers or 4, layer_spec="torch", vocab_size=128),
        train=dataclasses.replace(config.train, precision=precision(), trainable_parts=parts, recompute="none"),
        parallel=dataclasses.replace(
            config.parallel, tensor=2 if arguments.part == "tensor" else 1, pipeline=1, sequence=False
        ),
    )


def precision() -> Literal["bf16", "fp32"]:
    """In which layers are compared here."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def build(config: Config, topology: Topology) -> Any:
    """The model with its gradient buffers."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.model.himix_model import build_stage, unwrap_model

    stage = build_stage(config, detect(), topology, torch.nn.Identity())[0]
    stage.zero_grad_buffer()
    model = unwrap_model(stage)
    model.wrapper = [stage]  # kept alive: it owns the buffers and the hooks that fill them
    return model


def layers_step(
    model: Any, texts: list[int], visions: list[int], vision_width: int, *, packed: bool = False
) -> Callable[[], None]:
    """Forward and backward of the layers on samples of these lengths; texts of equal length, or packed."""
    from himix_megatron.model.attention.mixture_attention import normalise
    from himix_megatron.model.attention.packed_layout import make_layout

    generator = torch.Generator().manual_seed(0)
    own = next(model.parameters())
    rows, num_text = (1, sum(texts)) if packed else (len(texts), texts[0])
    places, lengths = torch.empty(rows, num_text, dtype=torch.long, device=own.device), texts if packed else None
    hidden = torch.randn(num_text, rows, model.config.hidden_size, generator=generator).to(own)
    hidden.requires_grad_(any(p.requires_grad for p in model.decoder.layers[0].mlp.parameters()))
    features = torch.randn(sum(visions), vision_width, generator=generator).to(own)
    grad = torch.randn(hidden.shape, generator=generator).to(own)

    def step() -> None:
        layout = make_layout(places, lengths, visions, model.rotary_pos_emb)
        context = normalise(features, model.config.layernorm_epsilon)
        model.decoder(hidden, None, context=context, packed_seq_params=layout).backward(grad)
        hidden.grad = None

    return step


def run_parts() -> int:
    """Each part in a process of its own. Returns: 1 if one missed a line."""
    codes = [
        subprocess.run([sys.executable, "-m", "tools.bench.decoder", "--part", p, *sys.argv[1:]]).returncode for p in PARTS
    ]
    return max(codes)


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.decoder", __doc__)
    sizes(arguments)
    if arguments.part == "all":
        return run_parts()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.part == "padding":
        from tools.bench.padding import padding as measure
    elif arguments.part == "training":
        from tools.bench.training import training as measure
    else:
        from tools.bench.concatenation import concatenation as measure
    return Line.code(measure(arguments))


if __name__ == "__main__":
    run_main(main)
