"""The authors' parameter layout, and ours: the same numbers under other names, fused for megatron-core.

The published HiMix names are Hugging Face's Llama/Qwen2 names plus, per layer, `input_layernorm_img` and
`self_attn.k_proj_img`, `self_attn.v_proj_img`. Ours are megatron-core's: q, k and v of each key/value head lie together in
`linear_qkv`, the vision keys and values of each head in `linear_vision_kv`, gate and up in `linear_fc1`.
Flows in and out: whole (unsharded) tensors by name. Both directions only move numbers, so they serve gradients too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from ..config.families import FAMILIES
from .safetensors_io import NamedTensors

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


def layout(model: ModelConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """Every tensor of ours by its name: the authors' tensors that lie in it, and how many heads of each go to one
    key/value head (0: it is no tensor of heads, and the parts follow each other)."""
    found: dict[str, tuple[tuple[str, int], ...]] = {ours: ((theirs, 0),) for ours, theirs in _OUTER.items()}
    if model.tie_embeddings:
        del found["output_layer.weight"]
    for layer in range(model.num_layers):
        for ours, theirs in (_PLAIN | {w.name: w.published_name for w in FAMILIES[model.family].layer_weights}).items():
            found[f"decoder.layers.{layer}.{ours}"] = ((f"model.layers.{layer}.{theirs}", 0),)
        for ours, parts in _fused(model).items():
            found[f"decoder.layers.{layer}.{ours}"] = tuple((f"model.layers.{layer}.{name}", heads) for name, heads in parts)
    return found


def shapes(model: ModelConfig, vision_width: int) -> dict[str, tuple[int, ...]]:
    """The authors' tensors of a model, and the shape of each."""
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    queries, keys = (n * model.channels_per_head for n in (model.num_attention_heads, model.num_query_groups))
    widths = {
        **{"embed_tokens.weight": (model.vocab_size, hidden), "lm_head.weight": (model.vocab_size, hidden)},
        **{"norm.weight": (hidden,), "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)},
        **{"input_layernorm_img.weight": (vision_width,), "o_proj.weight": (hidden, queries)},
        **{"q_proj.weight": (queries, hidden), "k_proj.weight": (keys, hidden), "v_proj.weight": (keys, hidden)},
        **{"k_proj_img.weight": (keys, vision_width), "v_proj_img.weight": (keys, vision_width)},
        **{"gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden), "down_proj.weight": (hidden, inner)},
        **{"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)},
        **{"k_proj_img.bias": (keys,), "v_proj_img.bias": (keys,)},
        **{_tail(w.published_name): (getattr(model, w.length),) for w in FAMILIES[model.family].layer_weights},
    }
    return {name: widths[_tail(name)] for parts in layout(model).values() for name, _ in parts}


def _tail(name: str) -> str:
    """A tensor's name within its module."""
    return ".".join(name.split(".")[-2:])


def is_new(name: str) -> bool:
    """Whether a tensor, by its name in the authors' layout, is one that HiMix adds to the language model."""
    return "_img." in name


def from_authors(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our names and layout from the authors'. Raises: ValueError naming what is missing or left over."""
    places = layout(model)
    wanted = [name for parts in places.values() for name, _ in parts]
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"the weights hold no {missing[0]}")
    if left := sorted(weights.keys() - wanted):
        raise ValueError(f"the weights hold {', '.join(left[:4])}, which the model has no place for")
    return {ours: join([weights[n] for n, _ in parts], [heads for _, heads in parts], model) for ours, parts in places.items()}


def to_authors(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The authors' names and layout from ours."""
    return dict(AsAuthors(weights, model))


class AsAuthors(NamedTensors):
    """Our whole tensors seen by the authors' names; each is cut out when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], model: ModelConfig):
        self._weights, self._model = weights, model
        self.names = self._places = {name: (ours, parts) for ours, parts in layout(model).items() for name, _ in parts}

    def __getitem__(self, name: str) -> Tensor:
        ours, parts = self._places[name]
        tensors = split(self._weights[ours], [heads for _, heads in parts], self._model)
        return tensors[[theirs for theirs, _ in parts].index(name)]


def join(parts: Sequence[Tensor], heads: Sequence[int], model: ModelConfig, out: Tensor | None = None) -> Tensor:
    """The authors' parts as one tensor of ours, written to `out` if given."""
    if len(parts) == 1:
        return parts[0]
    if not any(heads):
        return torch.cat(list(parts), out=out)
    width, num_groups = model.channels_per_head, model.num_query_groups
    groups = [p.reshape(num_groups, h * width, *p.shape[1:]) for p, h in zip(parts, heads, strict=True)]
    if out is None:
        return torch.cat(groups, dim=1).flatten(0, 1)
    torch.cat(groups, dim=1, out=out.view(num_groups, -1, *out.shape[1:]))
    return out


def split(fused: Tensor, heads: Sequence[int], model: ModelConfig) -> list[Tensor]:
    """The authors' parts of one tensor of ours."""
    if not any(heads):
        return list(fused.chunk(len(heads)))
    groups = fused.reshape(model.num_query_groups, sum(heads) * model.channels_per_head, *fused.shape[1:])
    return [part.flatten(0, 1) for part in torch.split(groups, [h * model.channels_per_head for h in heads], dim=1)]
