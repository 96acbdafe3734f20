"""Mixture Attention: the one place where vision meets text.

Per decoder layer, for text hidden states x and the vision tower's features v (the same v at every layer):

    q   = RoPE(W_q h)    k_t = RoPE(W_k h)    v_t = W_v h        h = RMSNorm(x)
    k_v = W_vk (w * u)   v_v = W_vv (w * u)                      u = v / rms(v), w: this layer's vision norm
    out = W_o softmax(q [k_v ; k_t]^T / sqrt(D) + mask) [v_v ; v_t]

Every text token sees all vision tokens of its sample, and the text up to itself. Vision keys carry no position. That is HiMix
(arXiv 2501.10318), and the default. The section `injection` of the settings changes it (docs/methods.md): other projections,
norms and positions of the vision, other images that a token sees, or a softmax of its own over them.

Flows in: normed text states, and as the layer's `context` what `vision_input.py` made of the features once for all layers; out:
the update of the text states. The features themselves are never updated, so they never travel between pipeline stages.

Each layer's w goes into its projection, W (w * u) = (W * w) u, which costs one product with a matrix of the weight's size. A
frozen tower's features need no gradient, and get none. A trainable tower's do, from every tensor rank's heads: summed once for
all layers, in `normalise`; behind an adapter of its own, in each layer.

Shape letters: S text tokens, B samples, H text width, T vision tokens of all samples, V vision width, Q query heads, G
key/value heads, D head width, X = Q * D; in generation N vision tokens of a sample (padded to the longest) and L keys. Heads
are this tensor rank's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch.nn import functional as F

from ..vision_input import LayerVision, VisionAdapter, normalise, without_sequence_parallel
from .kv_cache import KVCache
from .packed_layout import PackedLayout


@dataclass
class MixtureAttentionSubmodules(SelfAttentionSubmodules):  # type: ignore[misc]
    """Self-attention's parts and the two that HiMix adds."""

    vision_norm: Any = None
    linear_vision_kv: Any = None


class TakesVision:
    """What projects the context to a layer's vision keys and values. Mixed into a module that has `config`, `pg_collection` and
    a tensor rank's heads; adds what the choices call for:

    `vision_adapter`; `vision_norm`, weight `[V]`; `linear_vision_kv`, weight `[G*2*D, V]`, rows ordered key then value within
    each key/value head, so that tensor ranks split it by heads; `vision_key_norm`, weight `[D]`.
    """

    vision: Any
    """LayerVision; None where the module takes up no vision."""
    text_weights: Callable[[], tuple[Tensor, Tensor | None]]
    """The text's projection to keys and values, where vision shares it; the layer sets it."""
    input_norm: Callable[[], Tensor]
    """The weight of the layer's input norm, where vision shares it; the layer sets it."""

    def build_vision(self: Any, submodules: MixtureAttentionSubmodules, vision: LayerVision) -> None:
        """Make the parts."""
        injection, config, tp_group = vision.injection, self.config, self.pg_collection.tp
        # Features are whole on every tensor rank also where text is split (sequence parallelism).
        whole = without_sequence_parallel(config)
        self.vision = vision
        if injection.adapter == "per_layer":
            self.vision_adapter = VisionAdapter(config, vision.feature_width, tp_group)
        if injection.norm == "own":
            self.vision_norm = build_module(submodules.vision_norm, config=whole, hidden_size=vision.width)
        if injection.keys_values == "own":
            self.linear_vision_kv = build_module(
                submodules.linear_vision_kv,
                vision.width,
                2 * config.kv_channels * config.num_query_groups,
                config=whole,
                init_method=config.init_method,
                gather_output=False,
                bias=config.add_qkv_bias,
                skip_bias_add=False,
                is_expert=False,
                tp_comm_buffer_name="vision_kv",
                tp_group=tp_group,
            )

    def project_vision(self: Any, context_TX: Tensor, angles: Tensor | None = None) -> Tensor:
        """This layer's vision keys and values, float[T, G, 2, D], from the context, float[T, X] (or [N, B, G, 2, D] from
        [N, B, X]). `angles`: of the keys, None: they are not turned."""
        vision: LayerVision = self.vision
        norm = vision.injection.norm
        own = vision.own_level(context_TX)
        if vision.injection.adapter == "per_layer":
            own = normalise(self.vision_adapter(own), None if norm == "none" else self.config.layernorm_epsilon)
        weight = None if norm == "none" else self.vision_norm() if norm == "own" else self.input_norm()
        if vision.injection.keys_values == "own":
            kv = self.linear_vision_kv(own, weight)
        else:
            text_weight, bias = self.text_weights()
            kv = F.linear(own, text_weight if weight is None else text_weight * weight, bias)
        kv = torch.unflatten(kv, -1, (-1, 2, self.config.kv_channels))
        key_norm = self.norm_of_vision_keys()
        if key_norm is None and angles is None:
            return kv
        key, value = kv.unbind(-2)
        key = key if key_norm is None else key_norm(key)
        if angles is not None:
            shape = key.shape  # flat vision is one column
            key = key.unsqueeze(1) if key.dim() == 3 else key
            key = apply_rotary_pos_emb(key, angles, config=self.unfused, cp_group=self.pg_collection.cp).view(shape)
        return torch.stack((key, value), dim=-2)

    def project_features(self, context_NBX: Tensor, angles_NB1D: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values, each float[N, B, G, D], from the context; for generation: it does this once an image."""
        key_NBGD, value_NBGD = self.project_vision(context_NBX, angles_NB1D).unbind(-2)
        return key_NBGD, value_NBGD

    def norm_of_vision_keys(self) -> Callable[[Tensor], Tensor] | None:
        """float[..., D] to the same; None: they are not normed."""
        return None


class MixtureAttention(TakesVision, SelfAttention):  # type: ignore[misc]
    """Text queries over vision and text keys: megatron-core's self-attention, and what TakesVision adds; with a gate of its own
    also `vision_gate`, one number, or `linear_vision_proj`, weight `[H, Q*D]`. Without `vision` it is self-attention alone."""

    def __init__(
        self, config: Any, submodules: MixtureAttentionSubmodules, *args: Any, vision: LayerVision | None = None, **kwargs: Any
    ):
        super().__init__(config, submodules, *args, **kwargs)
        self.unfused = copy.copy(config)
        self.unfused.apply_rope_fusion = False
        self.vision: Any = vision
        if vision is None:
            return
        self.build_vision(submodules, vision)
        if self.k_layernorm is not None and vision.injection.key_norm == "own":
            self.vision_key_norm = build_module(
                submodules.vision_norm, config=without_sequence_parallel(config), hidden_size=config.kv_channels
            )
        if vision.injection.gate == "tanh":
            self.vision_gate = zero_gate(config)
        elif vision.injection.gate == "zero":
            self.linear_vision_proj = build_module(
                submodules.linear_proj,
                config.kv_channels * config.num_attention_heads,
                config.hidden_size,
                config=config,
                init_method=torch.nn.init.zeros_,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=True,
                is_expert=False,
                tp_comm_buffer_name="vision_proj",
                tp_group=self.pg_collection.tp,
            )

    def forward(self, hidden_SBH: Tensor, context_TX: Tensor | None, layout: PackedLayout) -> tuple[Tensor, Tensor | None]:
        """The attention's update of the text, and its bias.

        Args:
            hidden_SBH: float[S, B, H], normed text; with sequence parallelism float[S/TP, B, H].
            context_TX: what `vision_input.py` made of the features; not read where the layer takes up no vision.
            layout: which text sees which vision.
        """
        # Transformer Engine's kernel does not take angles of each sample's own.
        shared = layout.angles is None or layout.angles.shape[1] == 1
        attended = [*self._project_text(hidden_SBH, layout.angles, self.config if shared else self.unfused)]
        if self.vision is not None:
            assert context_TX is not None
            attended.append(self.project_vision(context_TX, layout.vision_angles))
        mix = partial(self._mix, layout=layout)
        if self.checkpoint_core_attention and self.training:
            mixed = tensor_parallel.checkpoint(mix, False, *attended)
        else:
            mixed = mix(*attended)
        return self._project_out(*(mixed if isinstance(mixed, tuple) else (mixed,)))

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor | None = None, *, layout: PackedLayout
    ) -> Tensor | tuple[Tensor, Tensor]:
        """float[S, B, X] of one softmax, or of two: over the text, and over what else is seen of the vision."""
        if vision_kv is None or self.vision.injection.fusion == "separate":
            assert layout.text is not None or not any(layout.vision_lengths)
            nothing = key.new_empty(0, *key.shape[2:3], 2, key.shape[3])
            mixed: Tensor = self.core_attention(query, key, value, nothing, layout.text or layout)
            if vision_kv is None:
                return mixed
        elif layout.view is None:
            mixed = self.core_attention(query, key, value, vision_kv, layout)
            return mixed
        assert layout.view is not None
        rows = list(vision_kv.unbind(2))
        if layout.view.has_text:
            rows = [torch.cat((own, layout.flatten_text(text))) for own, text in zip(rows, (key, value), strict=True)]
        seen: Tensor = self.core_attention.attend(query, *rows, layout, layout.view)
        return seen if self.vision.injection.fusion == "joint" else (mixed, seen)

    def _project_out(self, mixed: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The update of the text from what both softmaxes gave."""
        if seen is None:
            output_SBH, bias = self.linear_proj(mixed)
            return output_SBH, bias
        if self.vision.injection.gate == "tanh":
            gate = tensor_parallel.copy_to_tensor_model_parallel_region(self.vision_gate)
            output_SBH, bias = self.linear_proj(mixed + gate.tanh() * seen)
            return output_SBH, bias
        output_SBH, bias = self.linear_proj(mixed)
        return output_SBH + self.linear_vision_proj(seen)[0], bias

    def decode(self, hidden_SBH: Tensor, cache: KVCache) -> tuple[Tensor, Tensor | None]:
        """The same in generation: the cache holds the images and all earlier text."""
        # Each sample has angles of its own, which Transformer Engine's kernel does not take.
        query_SBQD, key_SBGD, value_SBGD = self._project_text(hidden_SBH, cache.angles_SB1D, self.unfused)
        project = None if self.vision is None else self.project_features
        key_LBGD, value_LBGD = cache.append(self.layer_number, key_SBGD, value_SBGD, project)
        masks, num_vision = cache.masks, 0 if self.vision is None else cache.num_vision
        attend = self.core_attention.decode
        if self.vision is not None and self.vision.injection.fusion == "joint":
            return self._project_out(attend(query_SBQD, key_LBGD, value_LBGD, masks.joint))
        mixed = attend(query_SBQD, key_LBGD[num_vision:], value_LBGD[num_vision:], masks.text)
        if self.vision is None or not num_vision:
            return self._project_out(mixed)
        number = len(key_LBGD) if self.vision.injection.local_text else num_vision
        seen = attend(query_SBQD, key_LBGD[:number], value_LBGD[:number], masks.seen, masks.blind)
        return self._project_out(mixed, seen)

    def _project_text(self, hidden_SBH: Tensor, angles: Tensor | None, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned by RoPE, and values of the text: float[S, B, heads, D]."""
        query_SBQD, key_SBGD, value_SBGD = self.get_query_key_value_tensors(hidden_SBH, None)
        rotate = {"config": config, "cp_group": self.pg_collection.cp}
        query_SBQD = apply_rotary_pos_emb(query_SBQD, angles, **rotate)
        return query_SBQD, apply_rotary_pos_emb(key_SBGD, angles, **rotate), value_SBGD

    def norm_of_vision_keys(self) -> Callable[[Tensor], Tensor] | None:
        """As the choice says, where the family norms its keys."""
        if self.k_layernorm is None or self.vision.injection.key_norm == "none":
            return None
        if self.vision.injection.key_norm == "shared":
            shared: Callable[[Tensor], Tensor] = self.k_layernorm
            return shared
        return partial(rms_norm, weight=self.vision_key_norm(), eps=self.config.layernorm_epsilon)


def rms_norm(heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float[..., D], each head for itself."""
    return F.rms_norm(heads, heads.shape[-1:], weight, eps)


def zero_gate(config: Any) -> torch.nn.Parameter:
    """One learned number that starts at 0."""
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    return torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype, device=device))


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
