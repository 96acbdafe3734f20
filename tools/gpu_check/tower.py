"""How fast a frozen SigLIP-so400m/384 encodes 64 images, as training runs it (model/frozen_layers.py) and by transformers' own
modules; share of the chip's peak, and that both give the same features."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from himix_megatron.config import VisionConfig
from himix_megatron.costs.flops import image_flops
from himix_megatron.model.towers.transformers_tower import TransformersTower
from pipelines.recipes import siglip_so400m_384
from tools.bench.measure import Line, seconds_of
from tools.gpu_check.rates import peak_flops
from tools.gpu_check.runner import Check, Context

WANTED_SHARE = 0.50
MOST_DIFFERENCE = 2e-2
TINY = VisionConfig(
    tower="siglip", image_size=30, patch_size=7, hidden_size=32, num_layers=3, num_attention_heads=2, ffn_hidden_size=48
)


def tower(context: Context) -> Iterator[Line]:
    """Milliseconds and share of the peak of both ways, and how far their features are from each other."""
    config, images, encode = encoder_of(context)
    found: dict[str, Tensor] = {}
    for name, frozen in (("transformers' modules", False), ("as training runs it", True)):
        found[name] = encode(frozen).float()
        seconds = statistics.median(seconds_of(lambda frozen=frozen: encode(frozen)) for _ in range(5))
        yield Line(f"ms, {images} images: {name}", 1000 * seconds)
        wanted = WANTED_SHARE if frozen and not context.tiny else None
        flops = images * image_flops(config, config.max_patches_per_image)
        yield Line(f"share of the peak: {name}", flops / seconds / peak_flops(), wanted)
    modules, product = found.values()
    difference = float((product - modules).norm() / modules.norm())
    yield Line("relative difference of their features", difference, MOST_DIFFERENCE, at_most=True)


def encoder_of(context: Context) -> tuple[VisionConfig, int, Callable[[bool], Tensor]]:
    """A tower, a number of images, and what encodes them: frozen as training does it, or by the modules."""
    device = torch.device("cpu" if context.tiny else "cuda")
    config, images = (TINY, 2) if context.tiny else (replace(siglip_so400m_384(), path=None), 64)
    built, generator = fresh_tower(config, device), torch.Generator().manual_seed(0)
    shape = (images, 3, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    blank = torch.zeros(images, dtype=torch.bool, device=device)

    @torch.no_grad()
    def encode(frozen: bool) -> Tensor:
        features: Tensor = built.requires_grad_(not frozen)(pixels, blank)
        return features

    return config, images, encode


def fresh_tower(config: VisionConfig, device: torch.device) -> TransformersTower:
    """A bf16 tower on the device, its biases not zero; its weights are drawn there, where it takes no time."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = SiglipVisionConfig(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
        intermediate_size=config.ffn_hidden_size, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = SiglipVisionModel(sizes)
    built = TransformersTower(config, model.to_empty(device=device).to(torch.bfloat16))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in built.named_parameters():
        with torch.no_grad():
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            matrix = parameter.ndim > 1
            scale = parameter[0].numel() ** -0.5 if matrix else 0.05
            is_norm = not matrix and "norm" in name and name.endswith("weight")
            parameter.copy_(drawn * scale + is_norm)
    built.embeddings.position_ids = torch.arange(config.max_tokens_per_image, device=device).expand((1, -1))
    return built


CHECKS: tuple[Check, ...] = (Check("tower", "performance", 15, tower),)
