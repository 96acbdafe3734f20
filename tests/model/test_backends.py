"""Generation's attention against a spelled-out softmax, and how features are laid out by sample."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from himix_megatron.config import InjectionConfig
from himix_megatron.data.loading.image_table import ImageTable
from himix_megatron.distributed import cpu_backend

cpu_backend.activate_if_needed()


from himix_megatron.model.attention.backends import (  # noqa: E402
    TorchMixtureAttention,
    TransformerEngineMixtureAttention,
)
from himix_megatron.model.attention.kv_cache import KVCache  # noqa: E402
from himix_megatron.model.attention.packed_layout import make_layout  # noqa: E402

HEADS, GROUPS, DIM, TEXT = 4, 2, 8, 5


class Sizes:
    """The configuration fields that the backends read."""

    num_attention_heads, num_query_groups, kv_channels, tensor_model_parallel_size = HEADS, GROUPS, DIM, 1


def inputs(vision_counts: list[int], dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Any, ...]:
    """Random queries, keys and values; vision padded to the longest sample; bool[B, N] padding or None."""
    torch.manual_seed(0)
    batch, longest = len(vision_counts), max(vision_counts)
    query = torch.randn(TEXT, batch, HEADS, DIM, dtype=dtype, device=device)
    key, value = (torch.randn(longest + TEXT, batch, GROUPS, DIM, dtype=dtype, device=device) for _ in range(2))
    padding = torch.arange(longest, device=device)[None] >= torch.tensor(vision_counts, device=device)[:, None]
    return query, key, value, (padding if padding.any() else None)


def spelled_out(query: Tensor, key: Tensor, value: Tensor, vision_counts: list[int]) -> Tensor:
    """softmax(q [k_v ; k_t]^T / sqrt(d)) [v_v ; v_t], one sample, head and token at a time."""
    longest = key.shape[0] - TEXT
    out = torch.empty_like(query)
    for b, count in enumerate(vision_counts):
        for head in range(HEADS):
            group = head * GROUPS // HEADS
            for t in range(TEXT):
                seen = [*range(count), *range(longest, longest + t + 1)]
                weights = torch.softmax(key[seen, b, group] @ query[t, b, head] / math.sqrt(DIM), dim=0)
                out[t, b, head] = weights @ value[seen, b, group]
    return out.flatten(2)


CASES = {"one image each": [6, 6, 6], "other counts": [6, 0, 3], "no image at all": [0, 0]}


@pytest.mark.parametrize("vision_counts", CASES.values(), ids=CASES)
def test_torch_backend_is_the_formula(vision_counts: list[int]) -> None:
    query, key, value, padding = inputs(vision_counts)
    mask = TorchMixtureAttention.mixture_mask(TEXT, max(vision_counts), padding, query.device)
    found = TorchMixtureAttention(Sizes).decode(query, key, value, mask)
    assert torch.allclose(found, spelled_out(query, key, value, vision_counts), atol=1e-12)


class SpelledOutKernel(nn.Module):
    """What Transformer Engine's kernels compute for the calls we make, in plain torch; stands for them where no GPU is."""

    PACKED, FULL = "padding_causal_bottom_right", "padding"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, qkv_format: str, attn_mask_type: str, **lengths: Any
    ) -> Tensor:
        assert qkv_format == "thd"
        assert attn_mask_type in (self.PACKED, self.FULL)
        ends_q, ends_kv = lengths["cu_seqlens_q"].tolist(), lengths["cu_seqlens_kv"].tolist()
        assert lengths["max_seqlen_q"] >= max(b - a for a, b in itertools.pairwise(ends_q))
        assert lengths["max_seqlen_kv"] >= max(b - a for a, b in itertools.pairwise(ends_kv))
        assert (ends_q[-1], ends_kv[-1]) == (len(query), len(key)) == (len(query), len(value))
        spans = zip(ends_q, ends_q[1:], ends_kv, ends_kv[1:], strict=False)
        causal = attn_mask_type == self.PACKED
        return torch.cat([self.one(query[a:b], key[c:d], value[c:d], causal=causal) for a, b, c, d in spans])

    @staticmethod
    def one(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """One sample, causal from the bottom right or seeing all."""
        num_query, num_key = len(query), len(key)
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(DIM)
        hidden = torch.ones(num_query, num_key, dtype=torch.bool).triu(num_key - num_query + 1)
        weights = (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


@pytest.mark.requires_gpu
@pytest.mark.parametrize("vision_counts", CASES.values(), ids=CASES)
def test_generation_in_bf16_on_a_gpu_is_the_formula(vision_counts: list[int]) -> None:
    wanted = spelled_out(*inputs(vision_counts)[:3], vision_counts)
    query, key, value, padding = (x if x is None else x.cuda() for x in inputs(vision_counts))
    query, key, value = (x.bfloat16() for x in (query, key, value))
    mask = TorchMixtureAttention.mixture_mask(TEXT, max(vision_counts), padding, query.device)
    found = TorchMixtureAttention(Sizes).decode(query, key, value, mask).cpu().double()
    assert torch.allclose(found, wanted, atol=2e-2)


def test_features_are_laid_out_by_sample() -> None:
    features = torch.arange(7 * 3, dtype=torch.float32).view(7, 3)
    cache = KVCache(ImageTable.of_features([[2], [], [3, 1], [1]]), torch.tensor([1, 1, 1, 1]), 1, 2)
    cache.take_context(features)
    vision = cache.context_NBX
    assert vision is not None
    assert vision.shape == (4, 4, 3)
    assert cache.padding is not None
    assert cache.padding.tolist() == [[False] * 2 + [True] * 2, [True] * 4, [False] * 4, [False] + [True] * 3]
    assert torch.equal(vision[:2, 0], features[:2])
    assert torch.equal(vision[:, 2], features[2:6])
    assert torch.equal(vision[:1, 3], features[6:])


def test_equal_counts_need_no_padding() -> None:
    features = torch.randn(8, 3)
    cache = KVCache(ImageTable.of_features([[4], [4]]), torch.tensor([1, 1]), 1, 2)
    cache.take_context(features)
    assert cache.padding is None
    assert cache.context_NBX is not None
    assert torch.equal(cache.context_NBX[:, 1], features[4:])
    assert KVCache(ImageTable.of_features([[], []]), torch.tensor([1, 1]), 1, 2).num_vision == 0


CHOICES = {
    "joint, earlier": InjectionConfig(visibility="earlier"),
    "joint, latest": InjectionConfig(visibility="latest"),
    "block": InjectionConfig(fusion="block", gate="tanh", norm="none", visibility="latest"),
    "separate": InjectionConfig(fusion="separate", gate="tanh", visibility="earlier"),
    "local text": InjectionConfig(fusion="separate", gate="zero", local_text=True, visibility="latest"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("injection", CHOICES.values(), ids=CHOICES)
def test_segments_give_fused_kernels_what_they_give_torch(injection: InjectionConfig, packed: bool) -> None:
    """Keys, ends and masks as Transformer Engine and flash attention get them, against attention group by group."""
    images = ImageTable((2, 0, 1), ((0, 0),) * 3, (3, 2, 4), places=(0, 4, 2))
    lengths = [6, 4, 5] if packed else [6, 6, 6]
    ids = torch.zeros((1, 18) if packed else (3, 6), dtype=torch.int64)
    layout = make_layout(ids, lengths if packed else None, images, lambda n: torch.zeros(n, 1, 1, DIM), injection=injection)
    assert layout.view is not None
    torch.manual_seed(0)
    query = torch.randn(ids.shape[1], ids.shape[0], HEADS, DIM, dtype=torch.float64)
    rows = layout.num_vision_rows + ids.numel()
    key, value = (torch.randn(rows, GROUPS, DIM, dtype=torch.float64) for _ in range(2))
    attend = TransformerEngineMixtureAttention.__new__(TransformerEngineMixtureAttention)
    nn.Module.__init__(attend)
    attend.core, attend.scale = SpelledOutKernel(), 1 / math.sqrt(DIM)
    wanted = TorchMixtureAttention(Sizes).attend(query, key, value, layout, layout.view)
    found = attend.attend_fused(query, key, value, layout, layout.view)
    assert wanted.abs().sum() > 0
    assert torch.allclose(found, wanted, atol=1e-12)
