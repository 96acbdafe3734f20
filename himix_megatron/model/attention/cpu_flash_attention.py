"""Mixture Attention on a CPU: full attention to the vision and causal attention to the text, sample by sample.

A text token sees every vision token of its sample and the text up to itself. So no mask is needed: torch's CPU flash kernel
runs once without one (vision) and once causal (text), and the two results are merged by their log-sum-exp, exactly. The
backward kernels of both parts take the merged result and its log-sum-exp, which makes their gradients those of the whole.

All query heads that share a key head go through the vision part together, as more rows of one product: keys are read once.
No work is done across samples, nor in padding.

Source of the merge: Online softmax, arXiv 1805.02867; as parts of one attention: FlashAttention, arXiv 2205.14135, appendix B.

Shape letters: S text tokens of the micro-batch, B its columns, T vision tokens of all samples, Q query heads, G key/value
heads, R = Q / G, D head width; b samples of equal lengths that are taken together, s text and t vision tokens of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packed_layout import PackedLayout

# torch's own names for the CPU kernels behind scaled_dot_product_attention. They are private, but nothing public gives the
# log-sum-exp of each row, which the merge needs, or takes it, which the backward pass of the merged result needs.
_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_flash_attention(
    query_SBQD: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, vision_kv_TG2D: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """float[S, B, Q, D]; zeros in the padding of packed text."""
    given = (query_SBQD, key_SBGD, value_SBGD, vision_kv_TG2D, layout, scale)
    mixed_SBQD: Tensor = _CpuFlashAttention.apply(*given)  # type: ignore[no-untyped-call]
    return mixed_SBQD


class _CpuFlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout, scale: float
    ) -> Tensor:
        mixed = _room_for(query, layout)
        ctx.layout, ctx.scale = layout, scale
        queries, log_sums = [], []
        for group in layout.sample_groups():
            query_bGRsD = _by_group(group.of_text(query), key.shape[2])
            key_bGsD, value_bGsD = group.of_text(key).transpose(1, 2), group.of_text(value).transpose(1, 2)
            key_bGtD, value_bGtD = _heads_first(group.of_vision(vision_kv))
            causal = _causal(query_bGRsD, key_bGsD, value_bGsD, scale)
            full = _full(query_bGRsD, key_bGtD, value_bGtD, scale) if group.num_vision else None
            mixed_bGRsD, lse_bGRs = _merge(causal, full)
            group.of_text(mixed).copy_(_by_token(mixed_bGRsD))
            queries.append(query_bGRsD)
            log_sums.append(lse_bGRs)
        ctx.save_for_backward(key, value, vision_kv, mixed, *queries, *log_sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, value, vision_kv, mixed, *of_groups = ctx.saved_tensors
        groups = ctx.layout.sample_groups()
        queries, log_sums = of_groups[: len(groups)], of_groups[len(groups) :]
        text_counts = any(ctx.needs_input_grad[:3])  # not in the first layer of a frozen decoder
        of_query, of_key, of_value = (_room_for(x, ctx.layout) for x in (mixed, key, value))
        of_vision = torch.empty(vision_kv.shape, dtype=vision_kv.dtype)
        of_vision[sum(ctx.layout.vision_lengths) :] = 0
        for group, query_bGRsD, lse_bGRs in zip(groups, queries, log_sums, strict=True):
            mixed_bGRsD, grad_bGRsD = (_by_group(group.of_text(x), key.shape[2]) for x in (mixed, grad))
            given = (grad_bGRsD, query_bGRsD, mixed_bGRsD, lse_bGRs, ctx.scale)
            parts = []
            if text_counts:
                key_bGsD, value_bGsD = group.of_text(key).transpose(1, 2), group.of_text(value).transpose(1, 2)
                part, of_key_bGsD, of_value_bGsD = _causal_backward(*given, key_bGsD, value_bGsD)
                group.of_text(of_key).copy_(of_key_bGsD.transpose(1, 2))
                group.of_text(of_value).copy_(of_value_bGsD.transpose(1, 2))
                parts.append(part)
            if group.num_vision:
                part, of_key_bGtD, of_value_bGtD = _full_backward(*given, *_heads_first(group.of_vision(vision_kv)))
                of_vision_btG2D = group.of_vision(of_vision)
                of_vision_btG2D[..., 0, :], of_vision_btG2D[..., 1, :] = (
                    of_key_bGtD.transpose(1, 2),
                    of_value_bGtD.transpose(1, 2),
                )
                parts.append(part)
            if text_counts:
                group.of_text(of_query).copy_(_by_token(parts[0] + parts[1] if len(parts) > 1 else parts[0]))
        return of_query, of_key, of_value, of_vision, None, None


def _room_for(text_SBX: Tensor, layout: PackedLayout) -> Tensor:
    """A tensor of this shape whose padding is zero, the rest to be written."""
    room = torch.empty(text_SBX.shape, dtype=text_SBX.dtype)
    if layout.packed:
        room[sum(layout.text_lengths) :] = 0
    return room


def _by_group(tokens_bsQD: Tensor, num_groups: int) -> Tensor:
    """[b, s, Q, D] as [b, G, R, s, D], contiguous."""
    num_samples, num_tokens, num_heads, width = tokens_bsQD.shape
    grouped = tokens_bsQD.reshape(num_samples, num_tokens, num_groups, num_heads // num_groups, width)
    return grouped.permute(0, 2, 3, 1, 4).contiguous()


def _by_token(groups_bGRsD: Tensor) -> Tensor:
    """[b, G, R, s, D] as [b, s, Q, D]."""
    return groups_bGRsD.flatten(1, 2).transpose(1, 2)


def _heads_first(kv_btG2D: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [b, G, t, D], contiguous: the kernels read them many times."""
    key, value = kv_btG2D.permute(3, 0, 2, 1, 4).contiguous()
    return key, value


def _full(query_bGRsD: Tensor, key_bGtD: Tensor, value_bGtD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query over every key: [b, G, R, s, D] and log-sum-exp [b, G, R, s]."""
    mixed, lse = _flash_forward(query_bGRsD.flatten(2, 3), key_bGtD, value_bGtD, 0.0, False, scale=scale)
    return mixed.reshape(query_bGRsD.shape), lse.reshape(query_bGRsD.shape[:-1])


def _causal(query_bGRsD: Tensor, key_bGsD: Tensor, value_bGsD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query over the keys up to its own place, head by head."""
    key_bQsD, value_bQsD = (x.repeat_interleave(query_bGRsD.shape[2], 1) for x in (key_bGsD, value_bGsD))
    mixed, lse = _flash_forward(query_bGRsD.flatten(1, 2), key_bQsD, value_bQsD, 0.0, True, scale=scale)
    return mixed.reshape(query_bGRsD.shape), lse.reshape(query_bGRsD.shape[:-1])


def _merge(text: tuple[Tensor, Tensor], vision: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The softmax over both sets of keys."""
    if vision is None:
        return text
    lse = torch.logaddexp(text[1], vision[1])
    share = (vision[1] - lse).exp()[..., None].to(text[0].dtype)
    return torch.lerp(text[0], vision[0], share), lse


def _full_backward(
    grad: Tensor, query: Tensor, mixed: Tensor, lse: Tensor, scale: float, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, rows, mixed, lse = (x.flatten(2, 3) for x in (grad, query, mixed, lse))
    of_query, of_key, of_value = _flash_backward(grad, rows, key, value, mixed, lse, 0.0, False, scale=scale)
    return of_query.reshape(query.shape), of_key, of_value


def _causal_backward(
    grad: Tensor, query: Tensor, mixed: Tensor, lse: Tensor, scale: float, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    repeats = query.shape[2]
    grad, heads, mixed, lse = (x.flatten(1, 2) for x in (grad, query, mixed, lse))
    key_bQsD, value_bQsD = (x.repeat_interleave(repeats, 1) for x in (key, value))
    of_query, of_key, of_value = _flash_backward(grad, heads, key_bQsD, value_bQsD, mixed, lse, 0.0, True, scale=scale)
    of_key, of_value = (torch.unflatten(x, 1, (-1, repeats)).sum(2) for x in (of_key, of_value))
    return of_query.reshape(query.shape), of_key, of_value
