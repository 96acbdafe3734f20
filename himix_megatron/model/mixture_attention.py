"""Mixture Attention: the one place where vision meets text.

Per decoder layer, for text hidden states x and the vision tower's features v (the same v at every layer):

    q   = RoPE(W_q h)    k_t = RoPE(W_k h)    v_t = W_v h        h = RMSNorm(x)
    k_v = W_vk u         v_v = W_vv u                            u = RMSNorm_vision(v), this layer's own weight
    out = W_o softmax(q [k_v ; k_t]^T / sqrt(D) + mask) [v_v ; v_t]

Every text token sees all vision tokens of its sample, and the text up to itself. Vision keys carry no position.
Source: HiMix, arXiv 2501.10318. Flows in: normed text states, and features as the layer's `context`; out: the update of
the text states. The features themselves are never updated, so they never travel between pipeline stages.

Shape letters: S text tokens, B samples, H text width, N vision tokens of a sample (padded to the longest), V vision width,
L = N + S keys, Q query heads, G key/value heads, D head width. Heads are this tensor rank's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from .kv_cache import KVCache


@dataclass
class MixtureAttentionSubmodules(SelfAttentionSubmodules):  # type: ignore[misc]
    """Self-attention's parts and the two that HiMix adds."""

    vision_norm: Any = None
    linear_vision_kv: Any = None


class MixtureAttention(SelfAttention):  # type: ignore[misc]
    """Text queries over vision and text keys.

    Adds to megatron-core's self-attention: `vision_norm`, weight `[V]`, and `linear_vision_kv`, weight `[G*2*D, V]`,
    rows ordered key then value within each key/value head, so that tensor ranks split it by heads.
    """

    def __init__(self, config: Any, submodules: MixtureAttentionSubmodules, *args: Any, vision_hidden_size: int, **kwargs: Any):
        super().__init__(config, submodules, *args, **kwargs)
        # Features are whole on every tensor rank also where text is split (sequence parallelism).
        whole = copy.copy(config)
        whole.sequence_parallel = False
        self.vision_norm = build_module(
            submodules.vision_norm, config=whole, hidden_size=vision_hidden_size, eps=config.layernorm_epsilon
        )
        self.linear_vision_kv = build_module(
            submodules.linear_vision_kv,
            vision_hidden_size,
            2 * self.kv_projection_size,
            config=whole,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="vision_kv",
            tp_group=self.pg_collection.tp,
        )

    def forward(
        self,
        hidden_SBH: Tensor,
        attention_mask: Tensor | None,
        vision: Tensor | KVCache,
        vision_padding_BN: Tensor | None,
        rotary_pos_emb: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's update of the text.

        Args:
            hidden_SBH: float[S, B, H], normed text; with sequence parallelism float[S/TP, B, H].
            attention_mask: what the backend's `mixture_mask` gave for this micro-batch.
            vision: float[N, B, V], the tower's features; in generation the cache that holds them, and all keys and values
                of earlier text, which then count to N.
            vision_padding_BN: bool[B, N], True where a sample has fewer vision tokens than N; None: nowhere.
            rotary_pos_emb: float[S, 1, 1, D], angles of text that begins at position 0; a cache brings its own.
        """
        query_SBQD, key_SBGD, value_SBGD = self.get_query_key_value_tensors(hidden_SBH, None)
        angles = vision.angles_SB1D if isinstance(vision, KVCache) else rotary_pos_emb
        rotate = {"config": self.config, "cp_group": self.pg_collection.cp}
        query_SBQD = apply_rotary_pos_emb(query_SBQD, angles, **rotate)
        key_SBGD = apply_rotary_pos_emb(key_SBGD, angles, **rotate)

        if isinstance(vision, KVCache):
            key_LBGD, value_LBGD = vision.extend(self.layer_number, key_SBGD, value_SBGD, self.project_vision)
        else:
            vision_key_NBGD, vision_value_NBGD = self.project_vision(vision)
            key_LBGD = torch.cat((vision_key_NBGD, key_SBGD))
            value_LBGD = torch.cat((vision_value_NBGD, value_SBGD))

        attended = (query_SBQD, key_LBGD, value_LBGD, attention_mask, vision_padding_BN)
        if self.checkpoint_core_attention and self.training:
            mixed_SBH = tensor_parallel.checkpoint(self.core_attention, False, *attended)
        else:
            mixed_SBH = self.core_attention(*attended)
        output_SBH, bias = self.linear_proj(mixed_SBH)
        return output_SBH, bias

    def project_vision(self, vision_NBV: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's vision keys and values, each float[N, B, G, D], from features float[N, B, V]."""
        kv, _ = self.linear_vision_kv(self.vision_norm(vision_NBV))
        kv_NBG2D = kv.unflatten(-1, (self.num_query_groups_per_partition, 2, self.hidden_size_per_attention_head))
        key_NBGD, value_NBGD = kv_NBG2D.unbind(-2)
        return key_NBGD, value_NBGD
