"""Mixture Attention on a CPU: sample by sample, its vision as a full rectangle and its text as a causal triangle.

A text token sees every vision token of its sample and the text up to itself. So no mask is needed: torch's CPU flash kernel
runs once without one (vision) and once causal (text), and the two results are merged by their log-sum-exp, exactly. The
backward kernels of both parts take the merged result and its log-sum-exp, which makes their gradients those of the whole.

All query heads that share a key head go through the vision part together, as more rows of one product: keys are read once.
No work is done across samples, nor in padding.

Source of the merge: Online softmax, arXiv 1805.02867; as parts of one attention: FlashAttention, arXiv 2205.14135, appendix B.

Shape letters: S text tokens of the micro-batch, B its columns, s text tokens of one sample, n its vision tokens, T vision
tokens of all samples, Q query heads, G key/value heads, R = Q / G, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import Layout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def ragged_attention(
    query_SBQD: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    vision_key_TGD: Tensor,
    vision_value_TGD: Tensor,
    layout: Layout,
    scale: float,
) -> Tensor:
    """float[S, B, Q, D]; zeros in the padding of packed text."""
    given = (query_SBQD, key_SBGD, value_SBGD, vision_key_TGD, vision_value_TGD, layout, scale)
    mixed_SBQD: Tensor = _Ragged.apply(*given)  # type: ignore[no-untyped-call]
    return mixed_SBQD


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        vision_key: Tensor,
        vision_value: Tensor,
        layout: Layout,
        scale: float,
    ) -> Tensor:
        mixed = torch.zeros_like(query, memory_format=torch.contiguous_format)
        ctx.layout, ctx.scale, statistics = layout, scale, []
        for column, text, vision in layout.samples():
            query_GRsD = _by_group(query[text, column], key.shape[2])
            key_GsD, value_GsD = key[text, column].transpose(0, 1), value[text, column].transpose(0, 1)
            key_GnD, value_GnD = _heads_first(vision_key[vision]), _heads_first(vision_value[vision])
            mixed_GRsD, lse_GRs = _merge(
                _triangle(query_GRsD, key_GsD, value_GsD, scale), _rectangle(query_GRsD, key_GnD, value_GnD, scale)
            )
            mixed[text, column] = _by_token(mixed_GRsD)
            statistics.append(lse_GRs)
        ctx.save_for_backward(query, key, value, vision_key, vision_value, mixed, *statistics)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, vision_key, vision_value, mixed, *statistics = ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value, vision_key, vision_value)]
        for (column, text, vision), lse in zip(ctx.layout.samples(), statistics, strict=True):
            num_groups = key.shape[2]
            query_GRsD, mixed_GRsD, grad_GRsD = (_by_group(x[text, column], num_groups) for x in (query, mixed, grad))
            given = (grad_GRsD, query_GRsD, mixed_GRsD, lse, ctx.scale)
            key_GsD, value_GsD = key[text, column].transpose(0, 1), value[text, column].transpose(0, 1)
            of_query, of_key, of_value = _triangle_backward(*given, key_GsD, value_GsD)
            if vision.stop > vision.start:
                key_GnD, value_GnD = _heads_first(vision_key[vision]), _heads_first(vision_value[vision])
                of_vision_query, of_vision_key, of_vision_value = _rectangle_backward(*given, key_GnD, value_GnD)
                of_query = of_query + of_vision_query
                grads[3][vision], grads[4][vision] = of_vision_key.transpose(0, 1), of_vision_value.transpose(0, 1)
            grads[0][text, column] = _by_token(of_query)
            grads[1][text, column], grads[2][text, column] = of_key.transpose(0, 1), of_value.transpose(0, 1)
        return (*grads, None, None)


def _by_group(tokens_sQD: Tensor, num_groups: int) -> Tensor:
    """[s, Q, D] as [G, R, s, D], contiguous."""
    num_tokens, num_heads, width = tokens_sQD.shape
    return tokens_sQD.reshape(num_tokens, num_groups, num_heads // num_groups, width).permute(1, 2, 0, 3).contiguous()


def _by_token(groups_GRsD: Tensor) -> Tensor:
    """[G, R, s, D] as [s, Q, D]."""
    return groups_GRsD.flatten(0, 1).transpose(0, 1)


def _heads_first(tokens_nGD: Tensor) -> Tensor:
    """[n, G, D] as [G, n, D], contiguous: the kernels read it many times."""
    return tokens_nGD.transpose(0, 1).contiguous()


def _rectangle(query_GRsD: Tensor, key_GnD: Tensor, value_GnD: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Every query over every key: [G, R, s, D] and log-sum-exp [G, R, s]; None without keys."""
    if key_GnD.shape[1] == 0:
        return None
    mixed, lse = _forward(query_GRsD.flatten(1, 2)[None], key_GnD[None], value_GnD[None], 0.0, False, scale=scale)
    return mixed.reshape(query_GRsD.shape), lse.reshape(query_GRsD.shape[:-1])


def _triangle(query_GRsD: Tensor, key_GsD: Tensor, value_GsD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query over the keys up to its own place, head by head."""
    repeats = query_GRsD.shape[1]
    key_QsD, value_QsD = (x.repeat_interleave(repeats, 0) for x in (key_GsD, value_GsD))
    mixed, lse = _forward(query_GRsD.flatten(0, 1)[None], key_QsD[None], value_QsD[None], 0.0, True, scale=scale)
    return mixed.reshape(query_GRsD.shape), lse.reshape(query_GRsD.shape[:-1])


def _merge(text: tuple[Tensor, Tensor], vision: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The softmax over both sets of keys."""
    if vision is None:
        return text
    lse = torch.logaddexp(text[1], vision[1])
    share = (vision[1] - lse).exp()[..., None].to(text[0].dtype)
    return torch.lerp(text[0], vision[0], share), lse


def _rectangle_backward(
    grad: Tensor, query: Tensor, mixed: Tensor, lse: Tensor, scale: float, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = [x.flatten(1, 2)[None] for x in (grad, query, mixed, lse)]
    of_query, of_key, of_value = _backward(rows[0], rows[1], key[None], value[None], rows[2], rows[3], 0.0, False, scale=scale)
    return of_query.reshape(query.shape), of_key[0], of_value[0]


def _triangle_backward(
    grad: Tensor, query: Tensor, mixed: Tensor, lse: Tensor, scale: float, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    repeats = query.shape[1]
    rows = [x.flatten(0, 1)[None] for x in (grad, query, mixed, lse)]
    key_QsD, value_QsD = (x.repeat_interleave(repeats, 0)[None] for x in (key, value))
    of_query, of_key, of_value = _backward(rows[0], rows[1], key_QsD, value_QsD, rows[2], rows[3], 0.0, True, scale=scale)
    of_key, of_value = (x[0].view(-1, repeats, *key.shape[1:]).sum(1) for x in (of_key, of_value))
    return of_query.reshape(query.shape), of_key, of_value
