"""What all parts of `tools.bench.decoder` share: arguments, the configuration, the layers and a step of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from himix_megatron.config import Config, Count, Part
from himix_megatron.distributed.topology import Topology
from pipelines.cli import load_recipe


@dataclass(frozen=True)
class Arguments:
    """Compare HiMix's training speed with concatenation, with plain padding, and with the machine's matrix products."""

    part: Literal["all", "concatenation", "tensor", "padding", "training"] = "all"
    """Part to measure; `all`: concatenation, tensor and padding, each in its own process."""
    recipe: str = "qwen2_0_5b_instruct"
    """Recipe whose sizes are used; weights are random."""
    layers: Count | None = None
    """Number of decoder layers. None: 4, and all of them in `training`."""
    samples: Count = 8
    """Samples of a batch, each with one image (`padding`: twice as many)."""
    text_tokens: tuple[int, ...] = (64, 256)
    """Text tokens of each sample; `concatenation` and `tensor` measure every value."""
    vision_tokens: Count = 729
    """Vision tokens of each image."""
    repetitions: Count = 5
    """Counted repetitions, after one uncounted one."""
    threads: Count = 2
    """Threads of torch; each of two tensor ranks gets half."""
    pack_max_text_tokens: Count = 8192
    """`training`: text tokens of a pack."""
    images_per_pack: Count = 26
    """`training`: images of a pack, one for each sample, as large as the tower takes them."""
    packs: Count = 2
    """`training`: packs of a step."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """`training`: layer backend, as --model.layer-spec."""
    fp8: Literal["none", "tensorwise", "blockwise"] = "none"
    """`training`: as --train.fp8."""
    recompute: Literal["none", "selective", "full"] = "none"
    """`training`: as --train.recompute."""
    cuda_graphs: Literal["off", "on"] = "off"
    """`training`: as --train.cuda-graphs."""
    optimizer: bool = False
    """`training`: also measure the optimizer's step."""
    tower: bool = True
    """`training`: also measure the vision tower on the images of a step."""
    peak_tflops: float | None = None
    """`training`: the chip's dense peak. None: from the GPU's data sheet where it is known, else the median 2048^3 product."""


def sizes(arguments: Arguments, parts: tuple[Part, ...] = ("vision_kv", "language")) -> Config:
    """The recipe with torch's layers, these trainable parts and the number of layers given; fp32 on a CPU.

    Raises: ValueError for a bad argument.
    """
    config = load_recipe(arguments.recipe)()
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
    """Precision in which layers are compared here."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def build(config: Config, topology: Topology) -> Any:
    """The model with its gradient buffers."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model

    stage = build_model_chunks(config, detect(), topology, torch.nn.Identity())[0]
    stage.zero_grad_buffer()
    model = unwrap_model(stage)
    model.wrapper = [stage]  # kept alive: it owns the buffers and the hooks that fill them
    return model


def layers_step(
    model: Any, texts: list[int], visions: list[int], vision_width: int, *, packed: bool = False
) -> Callable[[], None]:
    """Forward and backward of the layers on samples of these lengths: texts of one length, or packed texts of any."""
    from himix_megatron.data.loading.image_table import ImageTable
    from himix_megatron.model.attention.packed_layout import make_layout
    from himix_megatron.model.vision_input import normalise

    generator = torch.Generator().manual_seed(0)
    own = next(model.parameters())
    rows, num_text = (1, sum(texts)) if packed else (len(texts), texts[0])
    places, lengths = torch.empty(rows, num_text, dtype=torch.long, device=own.device), texts if packed else None
    hidden = torch.randn(num_text, rows, model.config.hidden_size, generator=generator).to(own)
    hidden.requires_grad_(any(p.requires_grad for p in model.decoder.layers[0].mlp.parameters()))
    features = torch.randn(sum(visions), vision_width, generator=generator).to(own)
    grad = torch.randn(hidden.shape, generator=generator).to(own)
    images = ImageTable.of_features([[tokens] for tokens in visions])

    def step() -> None:
        layout = make_layout(places, lengths, images, model.rotary_pos_emb)
        context = normalise(features, model.config.layernorm_epsilon)
        model.decoder(hidden, None, context=context, packed_seq_params=layout).backward(grad)
        hidden.grad = None

    return step
