"""The core of Mixture Attention, by two backends: softmax(q [k_v ; k_t]^T / sqrt(D) + mask) [v_v ; v_t].

Both take queries float[S, B, Q, D] and keys and values float[L, B, G, D] (L = N + S, vision first), give float[S, B, Q*D],
and are compared with each other by the tests. Neither holds parameters. The mask differs: torch wants it spelled out,
once per micro-batch (`mixture_mask`); Transformer Engine's kernels know the bottom-right causal form by name.
Text padding needs no mask: it lies on the right, where the causal form already hides it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor


class TorchMixtureAttention(torch.nn.Module):
    """torch's scaled_dot_product_attention with an explicit mask; runs anywhere."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any):
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    @staticmethod
    def mixture_mask(num_text: int, num_vision: int, vision_padding_BN: Tensor | None, device: torch.device) -> Tensor:
        """Which keys each text token sees: bool[B or 1, 1, S, L], True where it does.

        Causal and aligned to the bottom right; torch's own `is_causal` aligns to the top left when L differs from S.
        """
        text_SS = torch.ones(num_text, num_text, dtype=torch.bool, device=device).tril()
        if vision_padding_BN is None:
            vision = torch.ones(1, 1, num_text, num_vision, dtype=torch.bool, device=device)
        else:
            vision = ~vision_padding_BN[:, None, None, :].expand(-1, 1, num_text, -1)
        return torch.cat((vision, text_SS.expand(vision.shape[0], 1, -1, -1)), dim=-1)

    def forward(
        self, query_SBQD: Tensor, key_LBGD: Tensor, value_LBGD: Tensor, mask: Tensor, vision_padding_BN: Tensor | None = None
    ) -> Tensor:
        """float[S, B, Q*D]. The padding is already in the mask."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBQD, key_LBGD, value_LBGD))
        mixed_BQSD = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return mixed_BQSD.permute(2, 0, 1, 3).flatten(2)


class TransformerEngineMixtureAttention(torch.nn.Module):
    """Transformer Engine's fused attention, bottom-right causal.

    Where every sample has all N vision tokens the batch goes in as it is. Otherwise the keys that exist are packed
    (`thd`), since the fused kernels want a sample's keys without holes.
    """

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any):
        super().__init__()
        from transformer_engine.pytorch import DotProductAttention

        self.core = DotProductAttention(
            num_attention_heads=config.num_attention_heads,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal_bottom_right",
            tp_size=config.tensor_model_parallel_size,
            tp_group=None if pg_collection is None else pg_collection.tp,
            get_rng_state_tracker=get_cuda_rng_tracker if get_cuda_rng_tracker().is_initialized() else None,
            layer_number=layer_number,
            softmax_scale=softmax_scale,
        )

    @staticmethod
    def mixture_mask(num_text: int, num_vision: int, vision_padding_BN: Tensor | None, device: torch.device) -> None:
        """None: the kernels know the mask by name."""

    def forward(
        self, query_SBQD: Tensor, key_LBGD: Tensor, value_LBGD: Tensor, mask: None, vision_padding_BN: Tensor | None = None
    ) -> Tensor:
        """float[S, B, Q*D]."""
        if vision_padding_BN is None:
            mixed: Tensor = self.core(
                query_SBQD.contiguous(), key_LBGD, value_LBGD, qkv_format="sbhd", attn_mask_type="causal_bottom_right"
            )
            return mixed
        num_text, num_samples = query_SBQD.shape[:2]
        text_BS = vision_padding_BN.new_ones(num_samples, num_text)
        present_BL = torch.cat((~vision_padding_BN, text_BS), dim=1)
        key_TGD, value_TGD = (x.transpose(0, 1)[present_BL] for x in (key_LBGD, value_LBGD))
        lengths = present_BL.sum(1, dtype=torch.int32)
        mixed_TH: Tensor = self.core(
            query_SBQD.transpose(0, 1).flatten(0, 1),
            key_TGD,
            value_TGD,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=torch.arange(num_samples + 1, dtype=torch.int32, device=lengths.device) * num_text,
            cu_seqlens_kv=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            max_seqlen_q=num_text,
            max_seqlen_kv=key_LBGD.shape[0],
        )
        return mixed_TH.view(num_samples, num_text, -1).transpose(0, 1).contiguous()
