"""Mixture Attention on a GPU without joining keys: text over the vision where it lies, and over the text up to itself.

Flows in: queries, keys and values of the text [S, B, heads, D], the vision's [T, G, 2, D] as their projection leaves them, and
where samples lie; out: the mixed values, and gradients in the same places. In Triton; other kernels want each sample's keys one
after the other, and copy them there and their gradients back.

The query heads of a key/value head are rows of one tile: with R heads for each, a text of 64 tokens fills 64 R rows where
kernels that go head by head leave half of a tile of 128 empty, and gradients of keys need no sum over heads. Nothing is added
up by several programs at once, so results are the same on every run.

The backward pass is three kernels: row sums of output times gradient; gradients of keys and values, a block of keys for all
rows; gradients of queries, a block of rows for all keys. Probabilities are computed again from the log-sum-exp, in base 2.
Source of the scheme: FlashAttention-2, arXiv 2307.08691.

Letters: R query heads of a key/value head, D head width; M rows and N keys of a tile.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# Arguments of Triton's functions have no types that mypy knows.
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packed_layout import PackedLayout


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and keys of a tile, and how many warps and copies in flight work on it."""

    rows: int
    keys: int
    warps: int
    model_chunks: int


FORWARD = {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3)}
OF_KEYS = {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 2)}
OF_QUERIES = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2)}
"""By head width, for each kernel. The first two of width 64 are the fastest of nine on an H200; the others are untuned."""


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """float[S, B, Q, D], from text float[S, B, heads, D] and vision float[T, G, 2, D]."""
    mixed: Tensor = _Mixture.apply(query, key, value, vision_kv, layout, scale)  # type: ignore[no-untyped-call]
    return mixed


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout, scale: float
    ) -> Tensor:
        # The values are a part of what the projection gives, all of which they would keep.
        given = (query.contiguous(), key.contiguous(), value.contiguous(), vision_kv.contiguous())
        mixed, lse = forward(*given, layout, scale, _tile(FORWARD, query))
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(*given, mixed, lse)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, mixed, lse = ctx.saved_tensors
        grad = grad.contiguous()
        delta, num_rows = torch.empty_like(lse), lse[0].numel()
        num_heads, width = grad.shape[2:]
        _row_sums[(triton.cdiv(num_rows, 16), num_heads)](mixed, grad, delta, num_rows, num_heads, D=width, M=16)
        query, key, value, vision_kv = given
        beside = (query, key, value, vision_kv, grad, lse, delta, ctx.layout, ctx.scale)
        of_key, of_value, of_vision = backward_of_keys(*beside, _tile(OF_KEYS, grad))
        of_query = backward_of_queries(*beside, _tile(OF_QUERIES, grad)) if any(ctx.needs_input_grad[:3]) else None
        return of_query, of_key, of_value, of_vision, None, None


def forward(
    query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout, scale: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The mixed values [S, B, Q, D], and each row's log-sum-exp in base 2, float32[Q, S, B]."""
    mixed, lse = torch.empty_like(query), query.new_empty((query.shape[2], *query.shape[:2]), dtype=torch.float32)
    _forward[_row_grid(query, key, layout, tile)](
        query, key, value, vision_kv, mixed, lse, *_sizes(query, key, value, layout), scale * math.log2(math.e),
        **_constants(query, key, tile),
    )  # fmt: skip
    return mixed, lse


def backward_of_keys(
    query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    layout: PackedLayout, scale: float, tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the text's keys and values, and of the vision's. `grad`: of the mixed values; `delta`: float32[Q, S, B]."""
    of_key, of_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    # Features that only pad belong to no sample, and no program writes theirs.
    of_vision = torch.zeros_like(vision_kv) if layout.pads_vision else torch.empty_like(vision_kv)
    blocks = triton.cdiv(layout.max_vision, tile.keys) + triton.cdiv(layout.max_seqlen_q, tile.keys)
    _backward_of_keys[(blocks, key.shape[2], _samples(layout).shape[1])](
        query, key, value, vision_kv, grad, lse, delta, of_key, of_value, of_vision,
        *_sizes(query, key, value, layout), scale * math.log2(math.e), scale, **_constants(query, key, tile),
    )  # fmt: skip
    return of_key, of_value, of_vision


def backward_of_queries(
    query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    layout: PackedLayout, scale: float, tile: Tile,
) -> Tensor:  # fmt: skip
    """Gradients of the queries; arguments as of `backward_of_keys`."""
    of_query = torch.empty_like(query)
    _backward_of_queries[_row_grid(query, key, layout, tile)](
        query, key, value, vision_kv, grad, lse, delta, of_query,
        *_sizes(query, key, value, layout), scale * math.log2(math.e), scale, **_constants(query, key, tile),
    )  # fmt: skip
    return of_query


def _tile(tiles: dict[int, Tile], query: Tensor) -> Tile:
    # Other widths are for tests in Triton's interpreter.
    return tiles.get(query.shape[3], Tile(16, 16, 4, 1))


def _row_grid(query: Tensor, key: Tensor, layout: PackedLayout, tile: Tile) -> tuple[int, int, int]:
    rows = layout.max_seqlen_q * (query.shape[2] // key.shape[2])
    return triton.cdiv(rows, tile.rows), key.shape[2], _samples(layout).shape[1]


def _samples(layout: PackedLayout) -> Tensor:
    assert layout.samples is not None
    return layout.samples


def _sizes(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> tuple[Any, ...]:
    assert key.stride(3) == value.stride(3) == 1
    num_rows = query.shape[0] * query.shape[1]
    # A token's row is s * B + b; keys and values may be parts of a wider tensor.
    strides = (key.stride(1), key.stride(2), value.stride(1), value.stride(2))
    assert all(x.stride(0) == x.stride(1) * x.shape[1] for x in (key, value))
    assert layout.max_vision * 2 * key.shape[2] * key.shape[3] < 2**31, layout.max_vision  # within a sample
    samples = _samples(layout)
    return samples, samples.shape[1], 1 if layout.packed else query.shape[1], num_rows, *strides


def _constants(query: Tensor, key: Tensor, tile: Tile) -> dict[str, int]:
    return {
        "R": query.shape[2] // key.shape[2], "G": key.shape[2], "D": query.shape[3], "M": tile.rows, "N": tile.keys,
        "num_warps": tile.warps, "num_stages": tile.model_chunks,
    }  # fmt: skip


@triton.jit
def _load_rows(pointer, begin, step, rows, inside, group, R: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Rows (token x head) of [S * B, Q, D]; zeros outside."""
    places = (begin + (rows // R).to(tl.int64) * step) * (G * R) + group * R + rows % R
    return tl.load(pointer + places[:, None] * D + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _score(query, key_block, qk_scale):
    return tl.dot(query, tl.trans(key_block)) * qk_scale


@triton.jit
def _forward_block(query, key_at, value_at, keys, seen, best, total, mixed, qk_scale):
    """One block of keys into the running softmax. `keys`: bool[N], which exist; `seen`: bool[M, N] or [1, N]."""
    key_block = tl.load(key_at, mask=keys[:, None], other=0.0)
    scores = tl.where(seen, _score(query, key_block, qk_scale), float("-inf"))
    larger = tl.maximum(best, tl.max(scores, 1))
    shares = tl.math.exp2(scores - larger[:, None])
    shrink = tl.math.exp2(best - larger)
    value_block = tl.load(value_at, mask=keys[:, None], other=0.0)
    mixed = tl.dot(shares.to(value_block.dtype), value_block, mixed * shrink[:, None])
    return larger, total * shrink + tl.sum(shares, 1), mixed


@triton.jit
def _forward(
    query_at, key_at, value_at, vision_at, mixed_at, lse_at, samples_at, num_samples, step, num_rows,
    key_row, key_group, value_row, value_group, qk_scale,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(samples_at + sample).to(tl.int64)
    num_text = tl.load(samples_at + num_samples + sample)
    vision_begin = tl.load(samples_at + 2 * num_samples + sample).to(tl.int64)
    num_vision = tl.load(samples_at + 3 * num_samples + sample)
    if block * M >= num_text * R:
        return
    rows = block * M + tl.arange(0, M)
    inside = rows < num_text * R
    tokens, width, column = rows // R, tl.arange(0, D), tl.arange(0, N)
    query = _load_rows(query_at, begin, step, rows, inside, group, R, G, D)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D], tl.float32)

    first = vision_at + (vision_begin * G + group) * (2 * D) + column[:, None] * (G * 2 * D) + width[None, :]
    whole = num_vision // N * N
    for start in range(0, whole, N):
        keys = column >= 0
        here = first + start * (G * 2 * D)
        best, total, mixed = _forward_block(query, here, here + D, keys, keys[None, :], best, total, mixed, qk_scale)
    if whole < num_vision:
        keys = whole + column < num_vision
        here = first + whole * (G * 2 * D)
        best, total, mixed = _forward_block(query, here, here + D, keys, keys[None, :], best, total, mixed, qk_scale)

    end = tl.minimum((block * M + M - 1) // R + 1, num_text)
    for start in range(0, end, N):
        keys = start + column < num_text
        places = begin + (start + column).to(tl.int64) * step
        seen = (tokens[:, None] >= (start + column)[None, :]) & keys[None, :]
        best, total, mixed = _forward_block(
            query,
            key_at + places[:, None] * key_row + group * key_group + width[None, :],
            value_at + places[:, None] * value_row + group * value_group + width[None, :],
            keys, seen, best, total, mixed, qk_scale,
        )  # fmt: skip

    places = begin + tokens.to(tl.int64) * step
    heads = group * R + rows % R
    out = (mixed / total[:, None]).to(mixed_at.dtype.element_ty)
    tl.store(mixed_at + (places * (G * R) + heads)[:, None] * D + width[None, :], out, mask=inside[:, None])
    tl.store(lse_at + heads.to(tl.int64) * num_rows + places, best + tl.math.log2(total), mask=inside)


@triton.jit
def _row_sums(mixed_at, grad_at, delta_at, num_rows, num_heads, D: tl.constexpr, M: tl.constexpr):
    """Of output times its gradient, for each row and head: float[Q, S * B]."""
    rows, head = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1)
    inside = rows < num_rows
    at = (rows.to(tl.int64) * num_heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    mixed = tl.load(mixed_at + at, mask=inside[:, None], other=0.0).to(tl.float32)
    grad = tl.load(grad_at + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(delta_at + head.to(tl.int64) * num_rows + rows, tl.sum(mixed * grad, 1), mask=inside)


@triton.jit
def _backward_of_keys(
    query_at, key_at, value_at, vision_at, grad_at, lse_at, delta_at, of_key_at, of_value_at, of_vision_at,
    samples_at, num_samples, step, num_rows, key_row, key_group, value_row, value_group, qk_scale, scale,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A block of keys, first the vision's, then the text's, for all rows that see it."""
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(samples_at + sample).to(tl.int64)
    num_text = tl.load(samples_at + num_samples + sample)
    vision_begin = tl.load(samples_at + 2 * num_samples + sample).to(tl.int64)
    num_vision = tl.load(samples_at + 3 * num_samples + sample)
    vision_blocks = tl.cdiv(num_vision, N)
    if block >= vision_blocks + tl.cdiv(num_text, N):
        return
    width = tl.arange(0, D)
    is_text = block >= vision_blocks
    start = tl.where(is_text, block - vision_blocks, block) * N
    column = start + tl.arange(0, N)
    keys = column < tl.where(is_text, num_text, num_vision)
    seen_from = tl.where(is_text, column, -1)
    if is_text:
        places = begin + column.to(tl.int64) * step
        key_from = key_at + places[:, None] * key_row + group * key_group + width[None, :]
        value_from = value_at + places[:, None] * value_row + group * value_group + width[None, :]
        key_to = of_key_at + (places * G + group)[:, None] * D + width[None, :]
        value_to = of_value_at + (places * G + group)[:, None] * D + width[None, :]
    else:
        places = ((vision_begin + column.to(tl.int64)) * G + group) * (2 * D)
        key_from = vision_at + places[:, None] + width[None, :]
        value_from = vision_at + places[:, None] + D + width[None, :]
        key_to = of_vision_at + places[:, None] + width[None, :]
        value_to = of_vision_at + places[:, None] + D + width[None, :]
    key_block = tl.load(key_from, mask=keys[:, None], other=0.0)
    value_block = tl.load(value_from, mask=keys[:, None], other=0.0)
    of_key = tl.zeros([N, D], tl.float32)
    of_value = tl.zeros([N, D], tl.float32)
    first = tl.where(is_text, start * R // M * M, 0)
    for row in range(first, num_text * R, M):
        rows = row + tl.arange(0, M)
        inside = rows < num_text * R
        tokens, heads = rows // R, group * R + rows % R
        at = heads.to(tl.int64) * num_rows + begin + tokens.to(tl.int64) * step
        query = _load_rows(query_at, begin, step, rows, inside, group, R, G, D)
        grad = _load_rows(grad_at, begin, step, rows, inside, group, R, G, D)
        lse = tl.load(lse_at + at, mask=inside, other=0.0)
        delta = tl.load(delta_at + at, mask=inside, other=0.0)
        shares = tl.math.exp2(_score(key_block, query, qk_scale) - lse[None, :])
        seen = (tokens[None, :] >= seen_from[:, None]) & inside[None, :] & keys[:, None]
        shares = tl.where(seen, shares, 0.0)
        of_value = tl.dot(shares.to(grad.dtype), grad, of_value)
        of_score = shares * (tl.dot(value_block, tl.trans(grad)) - delta[None, :])
        of_key = tl.dot(of_score.to(query.dtype), query, of_key)
    tl.store(key_to, (of_key * scale).to(of_key_at.dtype.element_ty), mask=keys[:, None])
    tl.store(value_to, of_value.to(of_value_at.dtype.element_ty), mask=keys[:, None])


@triton.jit
def _of_query_block(query, grad, lse, delta, key_at, value_at, keys, seen, of_query, qk_scale):
    key_block = tl.load(key_at, mask=keys[:, None], other=0.0)
    value_block = tl.load(value_at, mask=keys[:, None], other=0.0)
    shares = tl.where(seen, tl.math.exp2(_score(query, key_block, qk_scale) - lse[:, None]), 0.0)
    of_score = shares * (tl.dot(grad, tl.trans(value_block)) - delta[:, None])
    return tl.dot(of_score.to(key_block.dtype), key_block, of_query)


@triton.jit
def _backward_of_queries(
    query_at, key_at, value_at, vision_at, grad_at, lse_at, delta_at, of_query_at,
    samples_at, num_samples, step, num_rows, key_row, key_group, value_row, value_group, qk_scale, scale,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A block of rows, for all keys that they see."""
    block, group, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(samples_at + sample).to(tl.int64)
    num_text = tl.load(samples_at + num_samples + sample)
    vision_begin = tl.load(samples_at + 2 * num_samples + sample).to(tl.int64)
    num_vision = tl.load(samples_at + 3 * num_samples + sample)
    if block * M >= num_text * R:
        return
    rows = block * M + tl.arange(0, M)
    inside = rows < num_text * R
    tokens, heads, width, column = rows // R, group * R + rows % R, tl.arange(0, D), tl.arange(0, N)
    places = begin + tokens.to(tl.int64) * step
    query = _load_rows(query_at, begin, step, rows, inside, group, R, G, D)
    grad = _load_rows(grad_at, begin, step, rows, inside, group, R, G, D)
    lse = tl.load(lse_at + heads.to(tl.int64) * num_rows + places, mask=inside, other=0.0)
    delta = tl.load(delta_at + heads.to(tl.int64) * num_rows + places, mask=inside, other=0.0)
    of_query = tl.zeros([M, D], tl.float32)

    first = vision_at + (vision_begin * G + group) * (2 * D) + column[:, None] * (G * 2 * D) + width[None, :]
    whole = num_vision // N * N
    for start in range(0, whole, N):
        keys = column >= 0
        here = first + start * (G * 2 * D)
        of_query = _of_query_block(query, grad, lse, delta, here, here + D, keys, keys[None, :], of_query, qk_scale)
    if whole < num_vision:
        keys = whole + column < num_vision
        here = first + whole * (G * 2 * D)
        of_query = _of_query_block(query, grad, lse, delta, here, here + D, keys, keys[None, :], of_query, qk_scale)

    end = tl.minimum((block * M + M - 1) // R + 1, num_text)
    for start in range(0, end, N):
        keys = start + column < num_text
        at = begin + (start + column).to(tl.int64) * step
        seen = (tokens[:, None] >= (start + column)[None, :]) & keys[None, :]
        of_query = _of_query_block(
            query, grad, lse, delta,
            key_at + at[:, None] * key_row + group * key_group + width[None, :],
            value_at + at[:, None] * value_row + group * value_group + width[None, :],
            keys, seen, of_query, qk_scale,
        )  # fmt: skip
    out = (of_query * scale).to(of_query_at.dtype.element_ty)
    tl.store(of_query_at + (places * (G * R) + heads)[:, None] * D + width[None, :], out, mask=inside[:, None])
