"""The language families: what sets each apart from Llama's decoder. A family is a row of this table.

Pure data, without torch, because settings are checked against it, costs are counted from it, weights are named by it, and the
model is built from it. A family that computes something of its own adds one file, which its row names (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeight:
    """A vector that every decoder layer of a family has and Llama's has not; whole on every tensor rank."""

    name: str
    """Its name in our layer, e.g. `self_attention.q_layernorm.weight`."""
    published_name: str
    """Its name in a layer of the published model, e.g. `self_attn.q_norm.weight`."""
    length: Literal["channels_per_head", "hidden_size", "ffn_hidden_size"]
    """The property of ModelConfig that its length is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One language family. Its key in the table is also its `model_type` in Hugging Face's config.json."""

    transformers_config: str
    """The class of transformers that reads a config.json of this family."""
    template: Literal["vicuna", "llama3", "chatml", "tiny"]
    """The chat template of its tokenizers."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, those of the vision included."""
    layer_weights: tuple[LayerWeight, ...] = ()
    """Weights of a layer beyond Llama's."""
    layer: str | None = None
    """`package.module:function` that changes the layers, for a family that computes something of its own: called with the
    ModuleSpec of a layer and megatron-core's TransformerConfig, both to be changed in place."""


FAMILIES: dict[str, Family] = {
    "llama": Family(transformers_config="LlamaConfig", template="vicuna"),
    "qwen2": Family(transformers_config="Qwen2Config", template="chatml", qkv_bias=True),
}
