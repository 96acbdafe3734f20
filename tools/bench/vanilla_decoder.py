"""Megatron-core's own decoder layers with the image among the text: the concatenation with which HiMix is compared.

Flows in: hidden states float[S, B, H] of a sample's image tokens, then its text tokens; out: the same shape. The layers are
megatron-core's local spec. Only its core attention, which materialises all scores, is replaced by the backend that HiMix's
layers use: torch's fused causal attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from himix_megatron.config import Config
from himix_megatron.distributed.fused_kernels import detect
from himix_megatron.distributed.megatron_config import ddp_config, transformer_config


class CausalAttention(torch.nn.Module):
    """torch's fused attention in the place of megatron-core's core attention."""

    def __init__(self, **_: Any):
        super().__init__()

    def forward(self, query_SBQD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *_: Any, **__: Any) -> Tensor:
        """float[S, B, Q*D]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBQD, key_SBGD, value_SBGD))
        attend = torch.nn.functional.scaled_dot_product_attention
        mixed: Tensor = attend(query, key, value, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
        return mixed


class VanillaDecoder(torch.nn.Module):
    """The layers and the final norm, in megatron-core's wrapper that adds gradients up in place."""

    def __init__(self, config: Config):
        super().__init__()
        mcore = dataclasses.replace(transformer_config(config, detect()), use_te_activation_func=False)
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
        layers = TransformerBlockSubmodules([layer] * config.model.num_layers, layer_norm=WrappedTorchNorm)
        self.wrapped = DistributedDataParallel(mcore, ddp_config(config), TransformerBlock(mcore, layers))
        self.wrapped.zero_grad_buffer()
        width = config.model.channels_per_head
        self.angles = RotaryEmbedding(width, 1.0, rotary_base=config.model.rope_theta, use_cpu_initialization=True)

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """float[S, B, H]."""
        updated: Tensor = self.wrapped(hidden_SBH, None, rotary_pos_emb=self.angles(len(hidden_SBH)))
        return updated
