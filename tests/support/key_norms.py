"""A language family whose layers norm queries and keys, head by head, before their rotation. Importing it adds its row."""

from __future__ import annotations

from typing import Any

from himix_megatron.config.families import FAMILIES, Family, LayerWeight

NAME = "normed_keys"


def change_layer(layer: Any, config: Any) -> None:
    """Each tensor rank norms its own heads: megatron-core sums these weights' gradients where it is told of them."""
    from himix_megatron.model.cpu_ops import RMSNorm

    config.qk_layernorm = True
    attention = layer.submodules.self_attention
    attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm


FAMILIES[NAME] = Family(
    transformers_config="Qwen3Config",
    template="tiny",
    layer=f"{__name__}:change_layer",
    layer_weights=tuple(
        LayerWeight(
            name=f"self_attention.{part}_layernorm.weight",
            published_name=f"self_attn.{part}_norm.weight",
            length="channels_per_head",
        )
        for part in "qk"
    ),
)
