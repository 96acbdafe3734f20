"""What is right, in float64 on the CPU: a decoder layer with embedding and head, spelled out; and how far from it a result is.

Flows in: sizes, weights and a micro-batch; out: decoder states, losses and all gradients. Nothing here is shared with the
model but the checkpoint's names: its attention is the one that the tests hold every backend against.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from himix_megatron.config import ModelConfig
from tests.model.test_training_attention import spelled_out

BF16_LIMIT = 2e-2
"""A rounding errs by 2^-9 at most, some ten follow one another, and a wrong key or mask moves results by 0.1 or more."""
FP32_LIMIT = 1e-5
"""Sums of some thousand products err by 1e-6; TF32, or bf16 anywhere, by 3e-4 and more."""
FP8_LIMIT = 0.15
"""e4m3 rounds by 2^-4: 3 to 4 % of each product, four of them one after the other."""
FP8_LEAST = 0.008
"""bf16 alone errs by 0.006 at most."""


@dataclass(frozen=True)
class Heads:
    """The heads of one attention layer."""

    query: int
    groups: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.groups} heads of {self.dim}"


@dataclass(frozen=True)
class Batch:
    """Lengths of a micro-batch of n samples."""

    name: str
    text: tuple[int, ...]
    """Text tokens of each; of rows all the same."""
    images: tuple[int, ...]
    """Images of each."""
    packed: bool
    padding: int = 0
    """Text tokens after a packed row."""

    @property
    def rows(self) -> tuple[int, int]:
        """Shape of the text ids."""
        return (1, sum(self.text) + self.padding) if self.packed else (len(self.text), self.text[0])


def random_batch(seed: int, most_text: int, multiple: int = 1) -> Batch:
    """A pack of 1 to 9 samples of 1 to `most_text` tokens and 0 to 3 images; padded to a multiple."""
    drawn = random.Random(seed)
    text = tuple(drawn.choice((1, 2, 5, drawn.randint(1, most_text))) for _ in range(drawn.randint(1, 9)))
    padding = drawn.randint(0, 7)
    padding += -(sum(text) + padding) % multiple
    return Batch(f"pack {seed}", text, tuple(drawn.randint(0, 3) for _ in text), packed=True, padding=padding)


def batches(most_text: int) -> list[Batch]:
    """Packs and rows of every kind."""
    return [
        *(random_batch(seed, most_text) for seed in range(4)),
        Batch("one token", (1,), (0,), packed=True),
        Batch("a pack without an image", (3, most_text, 1), (0, 0, 0), packed=True, padding=2),
        Batch("rows", (11, 11, 11), (1, 1, 1), packed=False),
        Batch("rows with other counts", (11, 11, 11, 11), (1, 1, 0, 3), packed=False),
        Batch("rows without an image", (4, 4), (0, 0), packed=False),
    ]


def drawn(name: str, shape: Sequence[int], scale: float = 1.0, centre: float = 0.0) -> Tensor:
    """float64 normal numbers that depend on the name alone, so that every side gets the same."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return centre + scale * torch.randn(tuple(shape), dtype=torch.float64, generator=generator)


def stored_name(parameter: str) -> str:
    """A parameter's name as Transformer Engine's layers, and checkpoints, have it."""
    for ours, on_disk in (
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ):
        parameter = parameter.replace(ours, on_disk)
    return parameter


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """A parameter's value: states, and what layers add to them, have a size of about 1, so that no error drowns."""
    if "norm" in name:
        return drawn(name, shape, 0.1, 1.0)
    if name.endswith("bias") or "embedding" in name:
        return drawn(name, shape, 0.1 if name.endswith("bias") else 1.0)
    return drawn(name, shape, shape[-1] ** -0.5)


@dataclass(frozen=True)
class Given:
    """A micro-batch's random tensors, text flat, in float64 on the CPU."""

    ids: Tensor
    labels: Tensor
    features: Tensor
    """[T, V] of all images."""
    by: Tensor
    """Each loss's weight; 0 for a token that has none."""
    tokens_per_image: int

    @staticmethod
    def of(batch: Batch, tokens: int, width: int) -> Given:
        """`tokens`, `width`: of an image's features."""
        number = sum(batch.text)
        ids, labels = (drawn(f"{batch.name} {kind}", (number,)).abs().mul(60).long() for kind in ("ids", "labels"))
        by = drawn(f"{batch.name} by", (number,)).abs() * (torch.arange(number) % 5 != 1)
        features = drawn(f"{batch.name} features", (sum(batch.images), tokens, width)).flatten(0, 1)
        return Given(ids.clamp(max=259), labels.clamp(max=259), features, by, tokens)


def outcome_of(model: ModelConfig, weights: Mapping[str, Tensor], batch: Batch, given: Given) -> dict[str, Tensor]:
    """The formula: "states" of real text tokens after the final norm, their "losses" where they have a weight, and of the
    weighted sum of the losses all gradients, by stored name and of the "features"."""
    own = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    seen = given.features.clone().requires_grad_()
    layer = "decoder.layers.0."
    query_groups, dim = model.num_query_groups, model.channels_per_head

    def normed(x: Tensor, name: str | None) -> Tensor:
        unit = x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt()
        return unit if name is None else unit * own[name]

    def product(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, own[f"{name}.weight"], own.get(f"{name}.bias"))

    x = own["embedding.word_embeddings.weight"][given.ids]
    qkv = product(normed(x, f"{layer}self_attention.linear_qkv.layer_norm_weight"), f"{layer}self_attention.linear_qkv")
    qkv = qkv.view(len(given.ids), query_groups, -1, dim)
    query, key, value = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]
    places = torch.cat([torch.arange(length, dtype=torch.float64) for length in batch.text])
    query, key = (_turned(part, places, model.rope_theta) for part in (query, key))
    unit = normed(seen, None) * own[f"{layer}self_attention.vision_norm.weight"]
    vision_kv = product(unit, f"{layer}self_attention.linear_vision_kv").view(-1, query_groups, 2, dim)
    lengths = tuple(count * given.tokens_per_image for count in batch.images)
    layout: Any = SimpleNamespace(text_lengths=batch.text, vision_lengths=lengths, packed=True)
    mixed = spelled_out(query[:, None], key[:, None], value[:, None], vision_kv, layout)[:, 0]
    x = x + product(mixed, f"{layer}self_attention.linear_proj")
    gate, up = product(normed(x, f"{layer}mlp.linear_fc1.layer_norm_weight"), f"{layer}mlp.linear_fc1").chunk(2, -1)
    x = x + product(torch.nn.functional.silu(gate) * up, f"{layer}mlp.linear_fc2")
    states = normed(x, "decoder.final_layernorm.weight")
    logits = product(states, "output_layer")[:, : model.vocab_size]  # the other rows pad the vocabulary
    losses = torch.nn.functional.cross_entropy(logits, given.labels, reduction="none")
    (losses * given.by).sum().backward()
    leaves = own | {"features": seen}
    gradients = {name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in leaves.items()}
    return {"states": states.detach(), "losses": losses.detach()[given.by > 0], **gradients}


def _turned(x_THD: Tensor, places: Tensor, theta: float) -> Tensor:
    """Rotary position embedding, the halves of a head as pairs."""
    half = x_THD.shape[-1] // 2
    angles = places[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x_THD.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def distance(found: Tensor, exact: Tensor, scale: float) -> float:
    """||found - exact|| / ||exact||; where nothing is expected (a gradient that is 0), of `scale` instead."""
    norm = float(exact.norm())
    return float((found - exact).norm()) / (norm if norm > 1e-9 * scale else max(scale, math.ulp(0.0)))
