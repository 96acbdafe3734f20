"""The authors' parameter layout, and ours: the same numbers under other names, fused for megatron-core.

The published HiMix names are Hugging Face's Llama/Qwen2 names plus, per layer, `input_layernorm_img` and
`self_attn.k_proj_img`, `self_attn.v_proj_img`. What other choices of how vision enters (config/injection.py) add has names of
the same kind, which are ours: docs/conversion.md lists them. Our own names are megatron-core's: q, k and v of each key/value
head lie together in `linear_qkv`, the vision keys and values of each head in `linear_vision_kv`, gate and up in `linear_fc1`.
Flows in and out: whole (unsharded) tensors by name. Both directions only move numbers, so they serve gradients too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import InjectionConfig, ModelConfig, VisionConfig
from ..config.families import FAMILIES
from ..config.injection import HIMIX
from .safetensors_io import NamedTensors

Parts = tuple[tuple[str, int], ...]
"""The authors' tensors that lie in one of ours, and how many heads of each go to one key/value head (0: it is no tensor of
heads, and the parts follow each other)."""

_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_PLAIN = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_ADAPTER = {f"linear_fc{n}.{kind}": f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
_TABLES = ("row", "column", "image")


def _text_parts(model: ModelConfig) -> dict[str, Parts]:
    """What every layer has, by its name in the layer."""
    per_group = model.num_attention_heads // model.num_query_groups
    plain = _PLAIN | {w.name: w.published_name for w in FAMILIES[model.family].layer_weights}
    found: dict[str, Parts] = {ours: ((theirs, 0),) for ours, theirs in plain.items()}
    found["mlp.linear_fc1.weight"] = (("mlp.gate_proj.weight", 0), ("mlp.up_proj.weight", 0))
    for kind in _kinds(model):
        q, k, v = (f"self_attn.{x}_proj.{kind}" for x in "qkv")
        found[f"self_attention.linear_qkv.{kind}"] = ((q, per_group), (k, 1), (v, 1))
    return found


def _vision_parts(model: ModelConfig, injection: InjectionConfig) -> dict[str, Parts]:
    """What a layer that injects has besides."""
    has_block = injection.fusion == "block"
    ours, theirs, beside = ("vision_block.",) * 3 if has_block else ("self_attention.", "self_attn.", "")
    plain: dict[str, str] = {}
    if injection.norm == "own":
        plain[f"{ours}vision_norm.weight"] = f"{beside}input_layernorm_img.weight"
    if injection.adapter == "per_layer":
        plain |= {f"{ours}vision_adapter.{own}": f"{beside}vision_adapter.{name}" for own, name in _ADAPTER.items()}
    if has_block:
        as_text = ((own.removeprefix("self_attention."), name.removeprefix("self_attn.")) for own, name in _PLAIN.items())
        plain |= {ours + own: ours + name for own, name in as_text}
        plain |= {ours + name: ours + name for name in ("q_norm.weight", "k_norm.weight", "attention_gate", "mlp_gate")}
        plain |= {f"{ours}linear_q.{kind}": f"{ours}q_proj.{kind}" for kind in _kinds(model)}
    elif injection.gate == "tanh":
        plain[f"{ours}vision_gate"] = f"{theirs}vision_gate"
    elif injection.gate == "zero":
        plain[f"{ours}linear_vision_proj.weight"] = f"{theirs}o_proj_img.weight"
    norms_keys = any(w.name == "self_attention.k_layernorm.weight" for w in FAMILIES[model.family].layer_weights)
    if not has_block and norms_keys and injection.key_norm == "own":
        plain[f"{ours}vision_key_norm.weight"] = f"{theirs}k_norm_img.weight"
    found: dict[str, Parts] = {own: ((name, 0),) for own, name in plain.items()}
    if has_block:
        found[f"{ours}mlp.linear_fc1.weight"] = ((f"{ours}mlp.gate_proj.weight", 0), (f"{ours}mlp.up_proj.weight", 0))
    if injection.keys_values == "own":
        for kind in _kinds(model):
            found[f"{ours}linear_vision_kv.{kind}"] = ((f"{theirs}k_proj_img.{kind}", 1), (f"{theirs}v_proj_img.{kind}", 1))
    return found


def _kinds(model: ModelConfig) -> tuple[str, ...]:
    return ("weight", "bias") if model.has_qkv_bias else ("weight",)


def layout(model: ModelConfig, injection: InjectionConfig = HIMIX) -> dict[str, Parts]:
    """Every tensor of ours by its name, and what lies in it."""
    found: dict[str, Parts] = {ours: ((theirs, 0),) for ours, theirs in _OUTER.items()}
    if model.tie_embeddings:
        del found["output_layer.weight"]
    if injection.adapter == "shared":
        found |= {f"vision_input.adapter.{ours}": ((f"model.vision_adapter.{name}", 0),) for ours, name in _ADAPTER.items()}
    if injection.position == "learned":
        found |= {f"vision_input.{name}_positions": ((f"model.vision_{name}_positions", 0),) for name in _TABLES}
    text, vision = _text_parts(model), _vision_parts(model, injection)
    injecting = injection.injecting_layers(model.num_layers)
    for layer in range(model.num_layers):
        for ours, parts in (text | vision if layer in injecting else text).items():
            found[f"decoder.layers.{layer}.{ours}"] = tuple((f"model.layers.{layer}.{name}", heads) for name, heads in parts)
    return found


def shapes(model: ModelConfig, vision: VisionConfig | int, injection: InjectionConfig = HIMIX) -> dict[str, tuple[int, ...]]:
    """The authors' tensors of a model, and the shape of each. `vision`: or the channels of its features, for HiMix."""
    hidden, inner, head = model.hidden_size, model.ffn_hidden_size, model.channels_per_head
    queries, keys = (n * head for n in (model.num_attention_heads, model.num_query_groups))
    features = vision if isinstance(vision, int) else injection.feature_width(vision)
    width = features if injection.adapter == "none" else hidden
    widths = {
        **{"embed_tokens.weight": (model.vocab_size, hidden), "lm_head.weight": (model.vocab_size, hidden)},
        **{"norm.weight": (hidden,), "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)},
        **{"input_layernorm_img.weight": (width,), "o_proj.weight": (hidden, queries), "o_proj_img.weight": (hidden, queries)},
        **{"q_proj.weight": (queries, hidden), "k_proj.weight": (keys, hidden), "v_proj.weight": (keys, hidden)},
        **{"k_proj_img.weight": (keys, width), "v_proj_img.weight": (keys, width)},
        **{"gate_proj.weight": (inner, hidden), "up_proj.weight": (inner, hidden), "down_proj.weight": (hidden, inner)},
        **{"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)},
        **{"k_proj_img.bias": (keys,), "v_proj_img.bias": (keys,), "linear_1.bias": (hidden,), "linear_2.bias": (hidden,)},
        **{"linear_1.weight": (hidden, features), "linear_2.weight": (hidden, hidden)},
        **{"q_norm.weight": (head,), "k_norm.weight": (head,), "k_norm_img.weight": (head,)},
        **{f"{gate}_gate": (1,) for gate in ("self_attn.vision", "vision_block.attention", "vision_block.mlp")},
        **{_tail(w.published_name): (getattr(model, w.length),) for w in FAMILIES[model.family].layer_weights},
    }
    if not isinstance(vision, int):
        lengths = injection.position_tables(vision).items()
        widths |= {f"model.vision_{name}_positions": (n, features * len(vision.levels)) for name, n in lengths}
    return {name: widths[_tail(name)] for parts in layout(model, injection).values() for name, _ in parts}


def _tail(name: str) -> str:
    """A tensor's name within its module."""
    return ".".join(name.split(".")[-2:])


def is_new(name: str) -> bool:
    """Whether a tensor, by its name in the authors' layout, is one that vision adds to the language model."""
    return "_img." in name or "vision_" in name


def from_authors(weights: Mapping[str, Tensor], model: ModelConfig, injection: InjectionConfig = HIMIX) -> dict[str, Tensor]:
    """Our names and layout from the authors'. Raises: ValueError naming what is missing or left over."""
    places = layout(model, injection)
    wanted = [name for parts in places.values() for name, _ in parts]
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(f"the weights hold no {missing[0]}")
    if left := sorted(weights.keys() - wanted):
        raise ValueError(f"the weights hold {', '.join(left[:4])}, which the model has no place for")
    return {ours: join([weights[n] for n, _ in parts], [heads for _, heads in parts], model) for ours, parts in places.items()}


def to_authors(weights: Mapping[str, Tensor], model: ModelConfig, injection: InjectionConfig = HIMIX) -> dict[str, Tensor]:
    """The authors' names and layout from ours."""
    return dict(AsAuthors(weights, model, injection))


class AsAuthors(NamedTensors):
    """Our whole tensors seen by the authors' names; each is cut out when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], model: ModelConfig, injection: InjectionConfig = HIMIX):
        self._weights, self._model = weights, model
        places = layout(model, injection).items()
        self.names = self._places = {name: (ours, parts) for ours, parts in places for name, _ in parts}

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
