"""The HiMix decoder layer: megatron-core's transformer layer, whose attention also receives the block's `context`.

Flows in: text states, as `context` what `vision_input.py` made of the features (in generation their cache), and as
`packed_seq_params` the PackedLayout that says which text sees which of them; out: text states, and the same context for the
next layer. A layer that injects nothing is megatron-core's own, and reads no context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from .attention.kv_cache import KVCache
from .attention.packed_layout import PackedLayout
from .cpu_ops import SwiGLU
from .vision_input import LayerVision


class HiMixLayer(TransformerLayer):  # type: ignore[misc]
    """norm, Mixture Attention, add; norm, MLP, add (the second half is megatron-core's own)."""

    def __init__(self, *args: Any, vision: LayerVision | None = None, vision_block: Any = None, **kwargs: Any):
        """Args:
        vision: None: the layer takes up no vision. Its `is_frozen` counts under full recompute, where features would look as if
            they needed a gradient: what a recomputed layer hands on asks for one.
        vision_block: the spec of a block of its own before the layer.
        """
        super().__init__(*args, **kwargs)
        self.vision, self.vision_block = vision, None
        if vision_block is not None:
            groups = {"layer_number": self.layer_number, "pg_collection": self.pg_collection}
            self.vision_block = build_module(vision_block, config=self.config, vision=vision, **groups)
        elif vision is not None:
            self.self_attention.input_norm = self._input_norm
            self.self_attention.text_weights = self._text_weights
            if vision.injection.keys_values == "text":
                # A second use of the weight adds its gradient by autograd, which a fused sum behind its back would lose.
                self.self_attention.linear_qkv.gradient_accumulation_fusion = False
                self.self_attention.linear_qkv.has_second_use = True

    def _forward_attention(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | KVCache | None = None,
        packed_seq_params: PackedLayout | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | KVCache | None]:
        """float[S, B, H] text and its `context`, handed on: the block gives each layer what the one before returned."""
        if isinstance(context, KVCache):
            if self.vision_block is not None:
                hidden_states = self.vision_block.decode(hidden_states, context)
            update_and_bias = self.self_attention.decode(self.input_layernorm(hidden_states), context)
        else:
            is_frozen = self.vision is not None and self.vision.is_frozen
            seen = context.detach() if is_frozen and context is not None else context
            if self.vision_block is not None:
                hidden_states = self.vision_block(hidden_states, seen, packed_seq_params)
            update_and_bias = self.self_attention(self.input_layernorm(hidden_states), seen, packed_seq_params)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden_states = add(update_and_bias, hidden_states, self.hidden_dropout)
        return hidden_states, context

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """megatron-core's sharded state, in which all layers' tensors of one name are one tensor; but what only some layers
        have has the layer's number in its key."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.vision is None or self.vision.is_everywhere:
            return state
        alone: dict[str, Any] = super().sharded_state_dict(prefix, (), metadata)
        for name in (name for name in state if "vision_" in name):
            state[name] = alone[name]
            # The block takes the prefix, with the layer's number in its chunk, off every key.
            state[name].key = f"{prefix}{self.layer_number - 1}.{name.removeprefix(prefix)}"
        return state

    def _input_norm(self) -> Tensor:
        """float[H]: the weight of the norm before attention, for this rank's heads of the vision."""
        fused = self.self_attention.linear_qkv
        weight: Tensor = fused.layer_norm_weight if hasattr(fused, "layer_norm_weight") else self.input_layernorm.weight
        # With sequence parallelism megatron-core sums its gradient over the tensor ranks; without, text's is already whole.
        if self.config.sequence_parallel or self.config.tensor_model_parallel_size == 1:
            return weight
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(weight)
        return copied

    def _text_weights(self) -> tuple[Tensor, Tensor | None]:
        """float[G*2*D, H] and float[G*2*D] or None: the rows of the text's projection that make keys and values."""
        attention = self.self_attention
        linear, groups = attention.linear_qkv, attention.num_query_groups_per_partition
        width = 2 * attention.hidden_size_per_attention_head
        weight = linear.weight.unflatten(0, (groups, -1))[:, -width:].flatten(0, 1)
        has_bias = self.config.add_qkv_bias
        return weight, linear.bias.unflatten(0, (groups, -1))[:, -width:].flatten() if has_bias else None


def residual_add(training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
    """In the place of megatron-core's bias-dropout-add, without dropout: compiled, its one addition costs the host three times
    as much; not compiled, asking for no dropout is a call of its own."""
    return _residual_add


def _residual_add(update_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
    update, bias = update_and_bias
    return residual + (update if bias is None else update + bias)


class TransformerEngineSwiGLU(SwiGLU):
    """The same by Transformer Engine, on a GPU. megatron-core's, compiled, took 5 times as long as its traffic in the backward
    pass at Llama-3.2-3B's width: a tenth of the whole step (H100)."""

    def __init__(self, config: Any):
        super().__init__(config)
        from transformer_engine.pytorch import ops

        self.op = ops.SwiGLU()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """float[..., 2F] to float[..., F]."""
        activated: Tensor = self.op(gate_and_up)
        return activated
