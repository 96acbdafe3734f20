"""The HiMix decoder layer: megatron-core's transformer layer, whose attention also receives the block's `context`.

Flows in: text states, the normalised vision features (in generation their cache) as `context`, and as `packed_seq_params` the
PackedLayout that says which text sees which of them; out: text states, and the same context for the next layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from .attention.kv_cache import KVCache
from .attention.packed_layout import PackedLayout
from .cpu_ops import SwiGLU


class HiMixLayer(TransformerLayer):  # type: ignore[misc]
    """norm, Mixture Attention, add; norm, MLP, add (the second half is megatron-core's own)."""

    def __init__(self, *args: Any, vision_is_frozen: bool, **kwargs: Any):
        """Args: vision_is_frozen: whether the features need no gradient. Under full recompute they would look as if they did:
        what a recomputed layer hands on asks for one."""
        super().__init__(*args, **kwargs)
        self.vision_is_frozen = vision_is_frozen

    def _forward_attention(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | KVCache | None = None,
        packed_seq_params: PackedLayout | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | KVCache | None]:
        """float[S, B, H] text and its `context`, handed on: the block gives each layer what the one before returned."""
        normed = self.input_layernorm(hidden_states)
        if isinstance(context, KVCache):
            update_and_bias = self.self_attention.decode(normed, attention_mask, context)
        else:
            seen = context.detach() if self.vision_is_frozen and context is not None else context
            update_and_bias = self.self_attention(normed, seen, packed_seq_params)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        hidden_states = add(update_and_bias, hidden_states, self.hidden_dropout)
        return hidden_states, context


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
