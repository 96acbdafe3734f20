"""The authors' parameter layout, and ours: the same numbers under other names, fused for megatron-core.

The published HiMix names are Hugging Face's Llama/Qwen2 names plus, per layer, `input_layernorm_img` and
`self_attn.k_proj_img`, `self_attn.v_proj_img`. Ours are megatron-core's: q, k and v of each key/value head lie together in
`linear_qkv`, the vision keys and values of each head in `linear_vision_kv`, gate and up in `linear_fc1`.
Flows in and out: whole (unsharded) tensors by name. Both directions only move numbers, so they serve gradients too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import ModelConfig

_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.vision_norm.weight": "input_layernorm_img.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def _fused(model: ModelConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """Our fused tensors: the parts, and how many heads of each go to one key/value head (0: not by heads)."""
    per_group = model.num_attention_heads // model.num_query_groups
    fused: dict[str, tuple[tuple[str, int], ...]] = {
        "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", 0), ("mlp.up_proj.weight", 0))
    }
    for kind in ("weight", "bias") if model.has_qkv_bias else ("weight",):
        q, k, v = (f"self_attn.{x}_proj.{kind}" for x in "qkv")
        k_img, v_img = (f"self_attn.{x}_proj_img.{kind}" for x in "kv")
        fused[f"self_attention.linear_qkv.{kind}"] = ((q, per_group), (k, 1), (v, 1))
        fused[f"self_attention.linear_vision_kv.{kind}"] = ((k_img, 1), (v_img, 1))
    return fused


def from_authors(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our names and layout from the authors'. Raises: ValueError naming what is missing or left over."""
    left = dict(weights)
    found: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"the weights hold no {name}")
        return left.pop(name)

    for ours, theirs in _outer(model).items():
        found[ours] = take(theirs)
    for layer in range(model.num_layers):
        for ours, theirs in _PLAIN.items():
            found[f"decoder.layers.{layer}.{ours}"] = take(f"model.layers.{layer}.{theirs}")
        for ours, parts in _fused(model).items():
            tensors = [take(f"model.layers.{layer}.{name}") for name, _ in parts]
            found[f"decoder.layers.{layer}.{ours}"] = _join(tensors, [heads for _, heads in parts], model)
    if left:
        raise ValueError(f"the weights hold {', '.join(sorted(left)[:4])}, which the model has no place for")
    return found


def to_authors(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The authors' names and layout from ours."""
    found = {theirs: weights[ours] for ours, theirs in _outer(model).items()}
    for layer in range(model.num_layers):
        for ours, theirs in _PLAIN.items():
            found[f"model.layers.{layer}.{theirs}"] = weights[f"decoder.layers.{layer}.{ours}"]
        for ours, parts in _fused(model).items():
            tensors = _split(weights[f"decoder.layers.{layer}.{ours}"], [heads for _, heads in parts], model)
            found.update({f"model.layers.{layer}.{name}": part for (name, _), part in zip(parts, tensors, strict=True)})
    return found


def _outer(model: ModelConfig) -> dict[str, str]:
    return {ours: theirs for ours, theirs in _OUTER.items() if not (model.tie_embeddings and ours == "output_layer.weight")}


def _join(parts: list[Tensor], heads: list[int], model: ModelConfig) -> Tensor:
    if not any(heads):
        return torch.cat(parts)
    width, num_groups = model.channels_per_head, model.num_query_groups
    groups = [p.reshape(num_groups, h * width, *p.shape[1:]) for p, h in zip(parts, heads, strict=True)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _split(fused: Tensor, heads: list[int], model: ModelConfig) -> list[Tensor]:
    if not any(heads):
        return list(fused.chunk(len(heads)))
    groups = fused.reshape(model.num_query_groups, sum(heads) * model.channels_per_head, *fused.shape[1:])
    return [part.flatten(0, 1) for part in torch.split(groups, [h * model.channels_per_head for h in heads], dim=1)]
