"""Mixture Attention: the one place where vision meets text.

Per decoder layer, for text hidden states x and the vision tower's features v (the same v at every layer):

    q   = RoPE(W_q h)    k_t = RoPE(W_k h)    v_t = W_v h        h = RMSNorm(x)
    k_v = W_vk (w * u)   v_v = W_vv (w * u)                      u = v / rms(v), w: this layer's vision norm
    out = W_o softmax(q [k_v ; k_t]^T / sqrt(D) + mask) [v_v ; v_t]

Every text token sees all vision tokens of its sample, and the text up to itself. Vision keys carry no position.
Source: HiMix, arXiv 2501.10318. Flows in: normed text states, and the normalised features u as the layer's `context`; out:
the update of the text states. The features themselves are never updated, so they never travel between pipeline stages.

u is the same at every layer: it is computed and stored once (`normalise`), and each layer's w goes into its projection,
W (w * u) = (W * w) u, which costs one product with a matrix of the weight's size. A frozen tower's features need no gradient,
and get none. A trainable tower's do, from every tensor rank's heads: summed once for all layers, in `normalise`.

Shape letters: S text tokens, B samples, H text width, T vision tokens of all samples, V vision width, Q query heads, G
key/value heads, D head width, X = Q * D; in generation N vision tokens of a sample (padded to the longest) and L keys. Heads
are this tensor rank's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from .kv_cache import KVCache
from .packed_layout import PackedLayout


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
        self.unfused = copy.copy(config)
        self.unfused.apply_rope_fusion = False
        # Features are whole on every tensor rank also where text is split (sequence parallelism).
        whole = copy.copy(config)
        whole.sequence_parallel = False
        self.vision_norm = build_module(submodules.vision_norm, config=whole, hidden_size=vision_hidden_size)
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

    def forward(self, hidden_SBH: Tensor, normalised_TV: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor | None]:
        """The attention's update of the text, and its bias.

        Args:
            hidden_SBH: float[S, B, H], normed text; with sequence parallelism float[S/TP, B, H].
            normalised_TV: the features as `normalise` gives them.
            layout: which text sees which vision.
        """
        text = self._project_text(hidden_SBH, layout.angles, self.config)
        attended = (*text, self.project_vision(normalised_TV))
        core_attention = partial(self.core_attention, layout=layout)
        if self.checkpoint_core_attention and self.training:
            mixed_SBX = tensor_parallel.checkpoint(core_attention, False, *attended)
        else:
            mixed_SBX = core_attention(*attended)
        output_SBH, bias = self.linear_proj(mixed_SBX)
        return output_SBH, bias

    def decode(self, hidden_SBH: Tensor, mask: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """The same in generation: the cache holds the images and all earlier text; `mask` is what `mixture_mask` gave."""
        # Each sample has angles of its own, which Transformer Engine's kernel does not take.
        query_SBQD, key_SBGD, value_SBGD = self._project_text(hidden_SBH, cache.angles_SB1D, self.unfused)
        key_LBGD, value_LBGD = cache.append(self.layer_number, key_SBGD, value_SBGD, self.project_features)
        output_SBH, bias = self.linear_proj(self.core_attention.decode(query_SBQD, key_LBGD, value_LBGD, mask))
        return output_SBH, bias

    def _project_text(self, hidden_SBH: Tensor, angles: Tensor | None, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by RoPE, and values of the text: float[S, B, heads, D]."""
        query_SBQD, key_SBGD, value_SBGD = self.get_query_key_value_tensors(hidden_SBH, None)
        rotate = {"config": config, "cp_group": self.pg_collection.cp}
        query_SBQD = apply_rotary_pos_emb(query_SBQD, angles, **rotate)
        return query_SBQD, apply_rotary_pos_emb(key_SBGD, angles, **rotate), value_SBGD

    def project_vision(self, normalised_TV: Tensor) -> Tensor:
        """This layer's vision keys and values, float[T, G, 2, D] (or [N, B, G, 2, D]), from u, float[T, V] (or [N, B, V])."""
        kv = self.linear_vision_kv(normalised_TV, self.vision_norm())
        return torch.unflatten(kv, -1, (self.num_query_groups_per_partition, 2, self.hidden_size_per_attention_head))

    def project_features(self, vision_NBV: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each float[N, B, G, D], from the tower's features; for generation: it does this once an image."""
        key_NBGD, value_NBGD = self.project_vision(normalise(vision_NBV, self.config.layernorm_epsilon)).unbind(-2)
        return key_NBGD, value_NBGD


def normalise(vision_TV: Tensor, eps: float) -> Tensor:
    """u = v / rms(v), each vision token for itself; its gradient, if it needs one, is summed over the tensor ranks."""
    normalised = torch.nn.functional.rms_norm(vision_TV, vision_TV.shape[-1:], eps=eps)
    if normalised.requires_grad:
        normalised = tensor_parallel.copy_to_tensor_model_parallel_region(normalised)
    return normalised


class VisionNorm(torch.nn.Module):
    """The weight of a layer's vision norm. Whole on every tensor rank, and used with the rank's own heads only: its gradient is
    summed over the ranks."""

    def __init__(self, config: Any, hidden_size: int):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.is_divided = config.tensor_model_parallel_size > 1

    def forward(self) -> Tensor:
        """float[V]."""
        if not self.is_divided:
            return self.weight  # megatron-core's function does nothing then, at 4 % of the host's time for a layer
        weight: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(self.weight)
        return weight


class VisionLinear(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """W (w * u) + b, by tensor ranks over the rows of W."""

    def forward(self, normalised_TV: Tensor, norm_V: Tensor) -> Tensor:
        """float[..., 2*G*D]. The backward pass takes one product for both weights: d(W * w) = dy^T u."""
        return torch.nn.functional.linear(normalised_TV, self.weight * norm_V, self.bias)
