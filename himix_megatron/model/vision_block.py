"""A cross-attention block of its own before a decoder layer, as in Flamingo and Llama-3.2-Vision.

    x = x + tanh(a) * W_o softmax(norm(W_q h) norm(K)^T / sqrt(D)) V        h = RMSNorm(x)
    x = x + tanh(b) * MLP(RMSNorm(x))

K and V are the vision's, queries the text's; a and b start at 0, so that a language model is unchanged at first. A text token
that sees no image gets neither part. Source: Flamingo, arXiv 2204.14198, section 2.2; Llama 3, arXiv 2407.21783, section 7.

Flows in: text states, the context (in generation the cache) and the PackedLayout; out: text states. Shape letters as in
attention/mixture_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from .attention.kv_cache import KVCache
from .attention.mixture_attention import MixtureAttentionSubmodules, TakesVision, rms_norm, zero_gate
from .attention.packed_layout import PackedLayout
from .cpu_ops import RMSNorm, SwiGLU
from .vision_input import LayerVision, without_sequence_parallel


class VisionBlock(TakesVision, MegatronModule):  # type: ignore[misc]
    """Attention to the vision, and an MLP, each behind a gate. Its matrices are megatron-core's own under every layer spec."""

    def __init__(
        self, config: Any, submodules: MixtureAttentionSubmodules, layer_number: int, vision: LayerVision, pg_collection: Any
    ):
        """The parts `vision` calls for."""
        super().__init__(config)
        self.pg_collection, self.layer_number = pg_collection, layer_number
        self.unfused = without_sequence_parallel(config)
        self.unfused.apply_rope_fusion = False
        width, hidden = config.kv_channels, config.hidden_size
        shared: dict[str, Any] = {"config": config, "skip_bias_add": False, "is_expert": False, "tp_group": pg_collection.tp}
        self.input_layernorm = RMSNorm(config, hidden, config.layernorm_epsilon)
        self.linear_q = ColumnParallelLinear(
            hidden, width * config.num_attention_heads, init_method=config.init_method, gather_output=False,
            bias=config.add_qkv_bias, **shared,
        )  # fmt: skip
        self.build_vision(submodules, vision)
        whole = without_sequence_parallel(config)
        self.q_norm, self.k_norm = (build_module(submodules.vision_norm, config=whole, hidden_size=width) for _ in range(2))
        self.core_attention = build_module(
            submodules.core_attention, config=config, layer_number=layer_number, softmax_scale=1.0 / math.sqrt(width),
            pg_collection=pg_collection,
        )  # fmt: skip
        self.linear_proj = RowParallelLinear(
            width * config.num_attention_heads, hidden, init_method=config.output_layer_init_method, bias=False,
            input_is_parallel=True, **shared,
        )  # fmt: skip
        self.pre_mlp_layernorm = RMSNorm(config, hidden, config.layernorm_epsilon)
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear)
        self.mlp = MLP(config, parts, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)
        self.attention_gate, self.mlp_gate = zero_gate(config), zero_gate(config)
        for gate in (self.attention_gate, self.mlp_gate):
            # Each tensor rank sees a part of the text: megatron-core sums the gradients over them.
            gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: Tensor, context_TX: Tensor | None, layout: PackedLayout) -> Tensor:
        """float[S, B, H] (S/TP with sequence parallelism): the text's new states."""
        assert layout.view is not None
        assert context_TX is not None
        query = self._query(hidden_SBH, layout.angles)
        rows = self.project_vision(context_TX, layout.vision_angles).unbind(2)
        attend = partial(self.core_attention.attend, layout=layout, view=layout.view)
        if self.config.recompute_granularity == "selective" and self.training:
            seen = tensor_parallel.checkpoint(attend, False, query, *rows)
        else:
            seen = attend(query, *rows)
        sees = None
        if layout.view.has_blind:
            sees = layout.unflatten_text(layout.view.sees, len(query))
            if self.config.sequence_parallel:
                sees = sees.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
        return self._add(hidden_SBH, seen, sees)

    def decode(self, hidden_SBH: Tensor, cache: KVCache) -> Tensor:
        """The same in generation."""
        if not cache.num_vision:
            return hidden_SBH
        query = self._query(hidden_SBH, cache.angles_SB1D)
        keys = cache.vision_of(self.layer_number, self.project_features)
        masks = cache.masks
        seen = self.core_attention.decode(query, *keys, masks.seen, masks.blind)
        return self._add(hidden_SBH, seen, None if masks.blind is None else ~masks.blind[:, 0].transpose(0, 1))

    def _query(self, hidden_SBH: Tensor, angles: Tensor | None) -> Tensor:
        """float[S, B, Q, D], normed; turned where the vision's keys are."""
        flat, _ = self.linear_q(self.input_layernorm(hidden_SBH))
        query = rms_norm(flat.unflatten(-1, (-1, self.config.kv_channels)), self.q_norm(), self.config.layernorm_epsilon)
        if self.vision.injection.position not in ("rotary", "rotary_image"):
            return query
        turned: Tensor = apply_rotary_pos_emb(query, angles, config=self.unfused, cp_group=self.pg_collection.cp)
        return turned

    def _add(self, hidden_SBH: Tensor, seen_SBX: Tensor, sees_SB1: Tensor | None) -> Tensor:
        """`sees_SB1`: which text sees vision; None: all of it."""
        attended, _ = self.linear_proj(seen_SBX)
        hidden_SBH = hidden_SBH + self.attention_gate.tanh() * attended
        made, _ = self.mlp(self.pre_mlp_layernorm(hidden_SBH))
        gate = self.mlp_gate.tanh()
        output_SBH: Tensor = hidden_SBH + (gate if sees_SB1 is None else gate * sees_SB1) * made
        return output_SBH

    def norm_of_vision_keys(self) -> Callable[[Tensor], Tensor]:
        """Of each head, with the block's own weight."""
        return partial(rms_norm, weight=self.k_norm(), eps=self.config.layernorm_epsilon)
