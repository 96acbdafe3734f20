"""The core of Mixture Attention, by three backends: softmax(q [k_v ; k_t]^T / sqrt(D) + mask) [v_v ; v_t].

Training: `forward` takes queries, keys and values of the text, float[S, B, heads, D], keys and values of the vision, flat over
the samples, float[T, G, 2, D], and a PackedLayout that says which belong together. None pads vision or works across samples.

Generation: `decode` takes float[L, B, G, D] keys and values of all that came before and of the text, the text last, with
holes where a sample has fewer (`kv_cache.py`). All backends decode with torch's attention: the number of keys
grows with every token, and cuDNN would build a graph for each number. torch needs an explicit mask, made once per
pass (`mixture_mask`).

All give float[S, B, Q*D], hold no parameters, and are compared with each other by the tests. Text padding needs no mask: it
lies on the right, where causality hides it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor
from torch.nn import functional as F

from ...distributed.fused_kernels import has_variable_length, variable_length_arguments
from .attention_view import AttentionView, attend_by_groups
from .cpu_flash_attention import cpu_flash_attention
from .packed_layout import PackedLayout


class TorchMixtureAttention(torch.nn.Module):
    """torch alone. On a GPU in 16 bits its variable-length flash attention, on a CPU its flash kernel sample by sample;
    what is left (fp32 on a GPU) sample by sample with a mask."""

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any):
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query_SBQD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        vision_kv_TG2D: Tensor,
        layout: PackedLayout,
    ) -> Tensor:
        """float[S, B, Q*D]."""
        given = (query_SBQD, key_SBGD, value_SBGD, vision_kv_TG2D, layout, self.scale)
        if query_SBQD.device.type == "cpu":
            return cpu_flash_attention(*given).flatten(2)
        if query_SBQD.dtype in (torch.bfloat16, torch.float16) and has_variable_length():
            return _variable_length(*given)
        return _one_by_one(*given)

    def attend(
        self, query_SBQD: Tensor, key_RGD: Tensor, value_RGD: Tensor, layout: PackedLayout, view: AttentionView
    ) -> Tensor:
        """float[S, B, Q*D] of what the view lets text see, 0 where that is nothing. Rows of keys: as the view's."""
        is_16_bit = query_SBQD.dtype in (torch.bfloat16, torch.float16)
        if not query_SBQD.is_cpu and is_16_bit and has_variable_length():
            return self.attend_fused(query_SBQD, key_RGD, value_RGD, layout, view)
        mixed_MQD = attend_by_groups(layout.flatten_text(query_SBQD), key_RGD, value_RGD, view, self.scale)
        return layout.unflatten_text(mixed_MQD.flatten(1), len(query_SBQD))

    def attend_fused(
        self, query_SBQD: Tensor, key_RGD: Tensor, value_RGD: Tensor, layout: PackedLayout, view: AttentionView
    ) -> Tensor:
        """The same by the fused kernels of a GPU."""
        # A row of zeros is what a segment without any key attends to.
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(0, view.key_rows) for x in (key_RGD, value_RGD))
        mixed_MQD = self.attend_segments(layout.flatten_text(query_SBQD).contiguous(), keys, values, view)
        mixed_MX = mixed_MQD.flatten(1)
        return layout.unflatten_text(mixed_MX.masked_fill(~view.sees, 0.0) if view.has_blind else mixed_MX, len(query_SBQD))

    def attend_segments(self, query_MQD: Tensor, key_LGD: Tensor, value_LGD: Tensor, view: AttentionView) -> Tensor:
        """float[M, Q, D], on a GPU in 16 bits. Keys: of all segments, one after the other."""
        return _varlen(query_MQD, key_LGD, value_LGD, view, self.scale, causal=view.has_text)

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

    def decode(
        self, query_SBQD: Tensor, key_LBGD: Tensor, value_LBGD: Tensor, mask: Tensor, blind: Tensor | None = None
    ) -> Tensor:
        """float[S, B, Q*D]. `blind`: bool[B or 1, 1, S, 1], text that sees nothing and gets 0; None: none does."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBQD, key_LBGD, value_LBGD))
        repeats = query.shape[1] // key.shape[1]
        if query.is_cuda and repeats > 1:
            # torch's memory-efficient kernel takes a mask, but no grouped heads; its plain way would write all scores out.
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        mixed_BQSD = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask if blind is None else mask | blind, scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        if blind is not None:
            mixed_BQSD = mixed_BQSD.masked_fill(blind, 0.0)
        return mixed_BQSD.permute(2, 0, 1, 3).flatten(2)


class TritonMixtureAttention(TorchMixtureAttention):
    """This project's kernels in training; in generation torch's."""

    def forward(
        self, query_SBQD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, vision_kv_TG2D: Tensor, layout: PackedLayout
    ) -> Tensor:
        """float[S, B, Q*D]."""
        from .triton_attention import triton_attention

        return triton_attention(query_SBQD, key_SBGD, value_SBGD, vision_kv_TG2D, layout, self.scale).flatten(2)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    joined = layout.interleave_kv(vision_kv, key, value)
    mixed_MQD = _varlen(layout.flatten_text(query), *joined, layout, scale, causal=True)
    return layout.unflatten_text(mixed_MQD.flatten(1), len(query))


def _varlen(
    query_MQD: Tensor, key_LGD: Tensor, value_LGD: Tensor, ends: PackedLayout | AttentionView, scale: float, *, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Where the argument exists, grouped heads must be announced; torch 2.11 has none, and takes them as they are.
    grouped: dict[str, Any] = (
        {"enable_gqa": query_MQD.shape[1] != key_LGD.shape[1]} if "enable_gqa" in variable_length_arguments() else {}
    )
    mixed_MQD: Any = varlen_attn(
        query_MQD,
        key_LGD,
        value_LGD,
        ends.cu_seqlens_q,
        ends.cu_seqlens_kv,
        ends.max_seqlen_q,
        ends.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),  # causal: flash attention aligns it to the bottom right
        **grouped,
    )
    return mixed_MQD  # type: ignore[no-any-return]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Any device and dtype: one masked attention for each sample; zeros in the padding."""
    text_lengths, mixed = list(layout.text_lengths), []
    flat = [layout.flatten_text(x)[: sum(text_lengths)] for x in (query, key, value)]
    parts = (torch.split(x, text_lengths) for x in flat)
    visions = torch.split(vision_kv, list(layout.vision_lengths))
    for query_sQD, key_sGD, value_sGD, seen_tG2D in zip(*parts, visions, strict=True):
        key_lGD, value_lGD = (torch.cat((seen_tG2D[:, :, i], own)) for i, own in enumerate((key_sGD, value_sGD)))
        mask = TorchMixtureAttention.mixture_mask(len(query_sQD), len(seen_tG2D), None, query.device)
        query_QsD, key_GlD, value_GlD = (x.transpose(0, 1)[None] for x in (query_sQD, key_lGD, value_lGD))
        mixed_QsD = F.scaled_dot_product_attention(
            query_QsD, key_GlD, value_GlD, attn_mask=mask, scale=scale, enable_gqa=query_QsD.shape[1] != key_GlD.shape[1]
        )[0]
        mixed.append(mixed_QsD.transpose(0, 1).flatten(1))
    mixed_MX = torch.cat(mixed)
    padding = query.shape[0] * query.shape[1] - len(mixed_MX)
    return layout.unflatten_text(F.pad(mixed_MX, (0, 0, 0, padding)), len(query))


class TransformerEngineMixtureAttention(TorchMixtureAttention):
    """Transformer Engine's fused attention, bottom-right causal, with each sample's keys one after the other (`thd`); in
    generation torch's."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any):
        super().__init__(config, softmax_scale)
        from transformer_engine.pytorch import DotProductAttention

        self.core = DotProductAttention(
            num_attention_heads=config.num_attention_heads,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            # Where it writes masks out (fp32), "self" would take the keys' lengths from the queries'.
            attention_type="cross",
            tp_size=config.tensor_model_parallel_size,
            tp_group=None if pg_collection is None else pg_collection.tp,
            get_rng_state_tracker=get_cuda_rng_tracker if get_cuda_rng_tracker().is_initialized() else None,
            layer_number=layer_number,
            softmax_scale=softmax_scale,
        )

    def forward(
        self,
        query_SBQD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        vision_kv_TG2D: Tensor,
        layout: PackedLayout,
    ) -> Tensor:
        """float[S, B, Q*D]."""
        joined = layout.interleave_kv(vision_kv_TG2D, key_SBGD, value_SBGD)
        mixed_MX = self._fused(layout.flatten_text(query_SBQD).contiguous(), *joined, layout, causal=True)
        return layout.unflatten_text(mixed_MX.flatten(1), len(query_SBQD))

    def attend_segments(self, query_MQD: Tensor, key_LGD: Tensor, value_LGD: Tensor, view: AttentionView) -> Tensor:
        """float[M, Q, D]."""
        return self._fused(query_MQD, key_LGD, value_LGD, view, causal=view.has_text).view(query_MQD.shape)

    def _fused(
        self, query_MQD: Tensor, key_LGD: Tensor, value_LGD: Tensor, ends: PackedLayout | AttentionView, *, causal: bool
    ) -> Tensor:
        mixed_MX: Tensor = self.core(
            query_MQD,
            key_LGD,
            value_LGD,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right" if causal else "padding",
            cu_seqlens_q=ends.cu_seqlens_q,
            cu_seqlens_kv=ends.cu_seqlens_kv,
            max_seqlen_q=ends.max_seqlen_q,
            max_seqlen_kv=ends.max_seqlen_kv,
        )
        return mixed_MX
