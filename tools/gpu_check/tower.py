"""How fast a frozen SigLIP-so400m/384 encodes 64 images, by each way there is to run its layers; share of the chip's peak.

`modules` calls transformers' layers, as training did; `product` is the way that training takes (model/frozen_layers.py); the
others are what it was chosen from. Predicted for an H100 by arithmetic, for an image and layer: products 37 us at 600 TFLOP/s,
attention 11 us by flash (head dim 72 runs as 96), passes through memory at 2.75 TB/s:

    modules              10 us more: LayerNorms 2.4, residuals 3.7, GELU 4.6; the residual's order in memory costs extra
    fused qkv            1 us less than the modules on contiguous hidden states: one launch for three, the norm is read once
    GELU in the product  4.6 us less: 0.47 of the peak
    product              2.4 us less: residuals within the products, biases within the norms: 0.48
    compiled layer       0.5 us less than "GELU in the product"; with GELU as a kernel 4.6 us more
    cuDNN's attention    3 us less if it reaches 350 TFLOP/s at head dim 72: 0.50 to 0.51 with `product`
    FP8                  products 37 -> 22 us; quantising takes 1 us by rows, 4 by tensors; the features change
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from himix_megatron.config import VisionConfig
from himix_megatron.devices import device_of
from himix_megatron.flops import tower_flops
from himix_megatron.model.frozen_layers import add_and_normalise, pack_qkv, run_layer, run_layers
from himix_megatron.model.vision import Normalise, TransformersTower
from pipelines.recipes import siglip_so400m_384
from tools.gpu_check.runner import Check, Context
from tools.measure import Line, seconds_of

WANTED_SHARE = 0.50
MOST_DIFFERENCE = 2e-2
REPETITIONS = 5
COMPILED_NEEDS_SECONDS = 25.0
"""A way that is compiled is left out where less than this is left of the budget."""
ATTENTION = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}

Layers = Callable[[Tensor], Tensor]
"""Hidden states [K, N, V] before the first layer to those after the last."""


class Weights(NamedTuple):
    """Of one layer."""

    first: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


class Fp8(NamedTuple):
    """A weight in FP8 with the scale that undoes it."""

    weight: Tensor
    scale: Tensor


def tower(context: Context) -> Iterator[Line]:
    """Milliseconds and share of the peak of every way, and how far its features are from those of the modules."""
    device = torch.device("cpu" if context.tiny else "cuda")
    config, num_images = (tiny_config(), 2) if context.tiny else (replace(siglip_so400m_384(), path=None), 64)
    built = fresh_tower(config, device)
    shape = (num_images, 3, config.image_size, config.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    blank = torch.zeros(num_images, dtype=torch.bool, device=device)
    peak = math.inf if context.tiny else peak_flops()
    flops = tower_flops(config) * num_images

    @torch.no_grad()
    def embedded() -> Tensor:
        dtype = built.embeddings.patch_embedding.weight.dtype
        hidden: Tensor = built.pre_norm(built.embeddings(built.normalise(pixels, blank, dtype)))
        return hidden

    yield Line(f"ms, {num_images} images: pixels to the first layer", 1000 * median_seconds(embedded))
    yield from patches_by_product(built, pixels, embedded, on_gpu=not context.tiny)
    yield from products(built, embedded(), peak)
    yield from attention(built, num_images, embedded().shape[1], peak)
    wanted = features_of(partial(modules, built), embedded)
    for name, layers, backend, is_compiled in ways(built, embedded().shape, on_gpu=not context.tiny):
        if is_compiled and not context.tiny and context.remaining() < COMPILED_NEEDS_SECONDS:
            continue
        torch._dynamo.reset()  # a graph keeps the attention that it was traced with
        try:
            with only(backend):
                found = features_of(layers, embedded)
                seconds = median_seconds(lambda run=layers: run(embedded()))
        except Exception as error:  # one way that does not run must not hide the others
            yield Line(f"{name}: does not run, {' '.join(str(error).split())[:120]}", math.nan)
            continue
        yield Line(f"ms, {num_images} images: {name}", 1000 * seconds)
        yield Line(f"share of the peak: {name}", flops / seconds / peak, _wanted(name, context))
        most = None if "FP8" in name else MOST_DIFFERENCE
        yield Line(f"features' relative difference to the modules': {name}", difference(found, wanted), most, at_most=True)


def _wanted(name: str, context: Context) -> float | None:
    return WANTED_SHARE if name == "product, default attention" and not context.tiny else None


def tiny_config() -> VisionConfig:
    """Sizes for a machine without a GPU; FP8 wants multiples of 16."""
    return VisionConfig(
        tower="siglip", image_size=30, patch_size=7, hidden_size=32, num_layers=3, num_attention_heads=2, ffn_hidden_size=48
    )


def fresh_tower(config: VisionConfig, device: torch.device) -> TransformersTower:
    """A bf16 tower on the device, its biases not zero; its weights are drawn there, where it takes no time."""
    with torch.device("meta"):
        empty = build_meta(config)
    built = empty.to_empty(device=device).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in built.named_parameters():
        with torch.no_grad():
            drawn = torch.randn(parameter.shape, generator=generator, device=device)
            matrix = parameter.ndim > 1
            scale = parameter[0].numel() ** -0.5 if matrix else 0.05
            is_norm = not matrix and "norm" in name and name.endswith("weight")
            parameter.copy_(drawn * scale + is_norm)
    built.embeddings.position_ids = torch.arange(config.tokens_per_image, device=device).expand((1, -1))
    built.normalise = Normalise(config)
    return built.requires_grad_(False)


def build_meta(config: VisionConfig) -> TransformersTower:
    """The modules without memory."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = SiglipVisionConfig(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
        intermediate_size=config.ffn_hidden_size, attn_implementation="sdpa",
    )  # fmt: skip
    return TransformersTower(config, SiglipVisionModel(sizes))


# ---- ways to run the layers ------------------------------------------------------------------------------------------


def ways(built: TransformersTower, shape: torch.Size, *, on_gpu: bool) -> Iterator[tuple[str, Layers, str, bool]]:
    """Name, function, attention backend, and whether it is compiled; the most important first."""
    # Without a GPU: the graph is traced, and run as it is.
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend="inductor" if on_gpu else "eager")
    heads = built.layers[0].self_attn.num_heads
    weights = [weights_of(layer) for layer in built.layers]
    for backend in ATTENTION:
        if backend == "default":
            yield "modules as before, default attention", partial(modules, built), backend, False
        yield f"product, {backend} attention", partial(run_layers, layers=built.layers), backend, True
    yield "modules on contiguous hidden states", lambda hidden: modules(built, hidden.contiguous()), "default", False
    yield "product, norms not compiled", partial(product_without_compiler, built), "default", False
    plain, epilogue = (partial(by_layers, partial(layer_step, heads=heads, gelu_in_product=gelu)) for gelu in (False, True))
    yield "fused qkv", partial(plain, weights), "default", False
    yield "fused qkv, GELU in the product", partial(epilogue, weights), "default", False
    for backend in ("flash", "cuDNN"):
        step = compiled(partial(layer_step, heads=heads, gelu_in_product=True))
        yield f"compiled layer, GELU in the product, {backend} attention", partial(by_layers, step, weights), backend, True
    step = compiled(partial(layer_step, heads=heads, gelu_in_product=False))
    yield "compiled layer, GELU as a kernel", partial(by_layers, step, weights), "default", True
    for by_rows in (True, False):
        quantised = [in_fp8(layer, by_rows=by_rows) for layer in weights]
        step = compiled(partial(layer_step, heads=heads, gelu_in_product=False, by_rows=by_rows))
        yield f"FP8, a scale for each {'row' if by_rows else 'tensor'}", partial(by_layers, step, quantised), "default", True


@torch.no_grad()
def modules(built: TransformersTower, hidden_KNV: Tensor) -> Tensor:
    """transformers' own layers."""
    for layer in built.layers:
        hidden_KNV = layer(hidden_KNV, attention_mask=None)
    return hidden_KNV


@torch.no_grad()
def product_without_compiler(built: TransformersTower, hidden_KNV: Tensor) -> Tensor:
    """As `run_layers`, the norms in torch's own passes."""
    hidden_MV = hidden_KNV.reshape(-1, hidden_KNV.shape[-1])
    left_out_V = torch.zeros(hidden_MV.shape[1], device=hidden_MV.device)
    for layer in built.layers:
        left_out_V = run_layer(hidden_MV, left_out_V, layer, len(hidden_KNV), add_and_normalise)
    return (hidden_MV + left_out_V).to(hidden_MV.dtype).view_as(hidden_KNV)


@torch.no_grad()
def by_layers(step: Callable[[Tensor, Any], Tensor], weights: Iterable[Any], hidden_KNV: Tensor) -> Tensor:
    """One step after another."""
    hidden_KNV = hidden_KNV.contiguous()
    for layer in weights:
        hidden_KNV = step(hidden_KNV, layer)
    return hidden_KNV


def layer_step(hidden_KNV: Tensor, weights: Any, *, heads: int, gelu_in_product: bool, by_rows: bool = False) -> Tensor:
    """A layer as functions of tensors; weights that are `Fp8` are multiplied in FP8."""
    num_images, num_tokens, width = hidden_KNV.shape
    normed = F.layer_norm(hidden_KNV, (width,), *weights.first, 1e-6)
    qkv = linear(normed, weights.qkv, by_rows).view(num_images, num_tokens, 3, heads, width // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(hidden_KNV.shape)
    hidden_KNV = hidden_KNV + linear(mixed, weights.out, by_rows)
    normed = F.layer_norm(hidden_KNV, (width,), *weights.second, 1e-6)
    if gelu_in_product and hidden_KNV.is_cuda:
        weight, bias = weights.up
        inner = torch._addmm_activation(bias, normed.view(-1, width), weight.t(), use_gelu=True).unflatten(0, (num_images, -1))
    else:
        inner = F.gelu(linear(normed, weights.up, by_rows), approximate="tanh")
    return hidden_KNV + linear(inner, weights.down, by_rows)


def linear(given: Tensor, weights: tuple[Any, Tensor], by_rows: bool) -> Tensor:
    """A product with its bias."""
    weight, bias = weights
    if not isinstance(weight, Fp8):
        return F.linear(given, weight, bias)
    flat = given.reshape(-1, given.shape[-1])
    quantised, scale = quantise(flat, by_rows=by_rows)
    found: Tensor = torch._scaled_mm(
        quantised, weight.weight.t(), scale, weight.scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return found.unflatten(0, given.shape[:-1])


def quantise(given: Tensor, *, by_rows: bool) -> tuple[Tensor, Tensor]:
    """e4m3, and the scale that undoes it: of each row [M, 1], or of all [1, 1]."""
    largest = given.abs().amax(1, keepdim=True) if by_rows else given.abs().amax().view(1, 1)
    scale = largest.float().clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (given.float() / scale).to(torch.float8_e4m3fn), scale


def weights_of(layer: Any) -> Weights:
    """A module's tensors."""
    attention, mlp = layer.self_attn, layer.mlp

    def both(module: Any) -> tuple[Tensor, Tensor]:
        return module.weight.detach(), module.bias.detach()

    return Weights(
        first=both(layer.layer_norm1), qkv=pack_qkv(attention), out=both(attention.out_proj),
        second=both(layer.layer_norm2), up=both(mlp.fc1), down=both(mlp.fc2),
    )  # fmt: skip


def in_fp8(weights: Weights, *, by_rows: bool) -> Any:
    """The same layer with its matrices in FP8."""

    def of(pair: tuple[Tensor, Tensor]) -> tuple[Fp8, Tensor]:
        return Fp8(*quantise(pair[0], by_rows=by_rows)), pair[1]

    return weights._replace(qkv=of(weights.qkv), out=of(weights.out), up=of(weights.up), down=of(weights.down))


# ---- its parts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def products(built: TransformersTower, hidden_KNV: Tensor, peak: float) -> Iterator[Line]:
    """Share of the peak that each product of a layer reaches by itself."""
    layer = weights_of(built.layers[0])
    hidden = hidden_KNV.reshape(-1, hidden_KNV.shape[-1])
    inner, residual = F.linear(hidden, *layer.up), hidden.clone()
    steps: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "qkv": (lambda: F.linear(hidden, *layer.qkv), layer.qkv[0]),
        "out, adding to the residual": (lambda: residual.addmm_(hidden, layer.out[0].t(), alpha=0.01), layer.out[0]),
        "out": (lambda: F.linear(hidden, *layer.out), layer.out[0]),
        "up": (lambda: F.linear(hidden, *layer.up), layer.up[0]),
        "up with GELU": (
            lambda: torch._addmm_activation(layer.up[1], hidden, layer.up[0].t(), use_gelu=True),
            layer.up[0],
        ),
        "down": (lambda: F.linear(inner, *layer.down), layer.down[0]),
        "down, adding to the residual": (lambda: residual.addmm_(inner, layer.down[0].t(), alpha=0.01), layer.down[0]),
    }
    for name, (step, weight) in steps.items():
        yield Line(f"share of the peak: product {name}", 2 * len(hidden) * weight.numel() / median_seconds(step) / peak)


@torch.no_grad()
def attention(built: TransformersTower, num_images: int, num_tokens: int, peak: float) -> Iterator[Line]:
    """Share of the peak of attention by itself, heads padded with zeros counted as what they hold."""
    module = built.layers[0].self_attn
    weight: Tensor = module.q_proj.weight
    flops = 4 * num_images * num_tokens**2 * module.num_heads * module.head_dim
    for width in sorted({module.head_dim, 80, 96, 128}):
        qkv = torch.randn(num_images, num_tokens, 3, module.num_heads, width, dtype=weight.dtype, device=weight.device)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        for name, backend in ATTENTION.items():
            try:
                with only(name):
                    seconds = median_seconds(lambda q=query, k=key, v=value: F.scaled_dot_product_attention(q, k, v))
            except RuntimeError:
                if backend is None:
                    raise
                continue  # this one does not take the shape
            yield Line(f"share of the peak: attention alone, {name}, heads of {width}", flops / seconds / peak)


@torch.no_grad()
def patches_by_product(
    built: TransformersTower, pixels: Tensor, embedded: Callable[[], Tensor], *, on_gpu: bool
) -> Iterator[Line]:
    """The same hidden states from one kernel that normalises and cuts patches, and one product, in place of a convolution."""
    embeddings = built.embeddings
    size, weight = embeddings.patch_size, embeddings.patch_embedding.weight.detach().flatten(1)
    missing = -weight.shape[1] % 8  # rows of a multiple of 16 bytes
    weight, positions = F.pad(weight, (0, missing)), embeddings.position_embedding.weight.detach()
    mean, std = built.normalise._mean_std.to(pixels.device)

    def cut(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        images = ((pixels.float() / 255 - mean) / std).to(weight.dtype)
        side = images.shape[-1] // size
        images = images[:, :, : side * size, : side * size].unflatten(3, (side, size)).unflatten(2, (side, size))
        return F.pad(images.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), (0, missing))

    cut_compiled = torch.compile(cut, dynamic=False, backend="inductor" if on_gpu else "eager")

    def step() -> Tensor:
        return F.linear(cut_compiled(pixels, mean, std), weight, embeddings.patch_embedding.bias) + positions

    try:
        found, wanted = step().float(), embedded().float()
        yield Line("ms: the same by a product of patches", 1000 * median_seconds(step))
        yield Line("its relative difference", difference(found, wanted), MOST_DIFFERENCE, at_most=True)
    except Exception as error:  # as for the other ways
        yield Line(f"the same by a product of patches: does not run, {' '.join(str(error).split())[:120]}", math.nan)


# ---- measuring -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Attention by one backend; `default`: by torch's choice."""
    chosen = ATTENTION[backend]
    with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
        yield


def median_seconds(step: Callable[[], object]) -> float:
    """Of some repetitions, after one that is not counted."""
    step()
    return statistics.median(seconds_of(step) for _ in range(REPETITIONS))


def features_of(layers: Layers, embedded: Callable[[], Tensor]) -> Tensor:
    """What a way makes of the images, in float32."""
    with torch.no_grad():
        return layers(embedded()).float()


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative, over all features."""
    return float((found - wanted).norm() / wanted.norm())


def peak_flops() -> float:
    """Dense bf16. Raises: ValueError for a device that is not known."""
    found = device_of(torch.cuda.get_device_name())
    if found is None:
        raise ValueError(f"no peak is known for {torch.cuda.get_device_name()}")
    return found.bf16_flops


TOWER = Check("tower", "performance", 75.0, tower)
