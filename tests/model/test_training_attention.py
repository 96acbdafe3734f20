"""Training's attention, rows and packs, against a softmax spelled out sample by sample; values and gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from himix_megatron.distributed import cpu_backend

cpu_backend.activate_if_needed()

from himix_megatron.data.loading.image_table import ImageTable  # noqa: E402
from himix_megatron.distributed.fused_kernels import has_variable_length, variable_length_arguments  # noqa: E402
from himix_megatron.model.attention.backends import (  # noqa: E402
    TorchMixtureAttention,
    TransformerEngineMixtureAttention,
    _one_by_one,
    _variable_length,
)
from himix_megatron.model.attention.packed_layout import PackedLayout, make_layout  # noqa: E402

from .test_backends import SpelledOutKernel  # noqa: E402

DIM, IMAGE = 16, 9
HEADS = {"grouped": (4, 2), "one key head": (4, 1), "a key head each": (4, 4)}


def rotary(num_text: int) -> Tensor:
    """Angles that say their position."""
    return torch.arange(num_text, dtype=torch.float64)[:, None, None, None].expand(-1, 1, 1, DIM)


def table(images: list[int]) -> ImageTable:
    """Samples with so many images, of different numbers of tokens."""
    return ImageTable.of_features([[IMAGE + k % 3 for k in range(count)] for count in images])


def packed(text: list[int], images: list[int], padding: int) -> PackedLayout:
    row = torch.zeros(1, sum(text) + padding, dtype=torch.long)
    return make_layout(row, text, table(images), rotary)


def rows(num_text: int, images: list[int]) -> PackedLayout:
    return make_layout(torch.zeros(len(images), num_text, dtype=torch.long), None, table(images), rotary)


def random_pack(seed: int) -> PackedLayout:
    drawn = random.Random(seed)
    count = drawn.randint(1, 9)
    text = [drawn.choice((1, 2, 5, 5, drawn.randint(1, 90))) for _ in range(count)]
    return packed(text, [drawn.randint(0, 3) for _ in text], drawn.randint(0, 7))


LAYOUTS: dict[str, PackedLayout] = {
    **{f"random pack {seed}": random_pack(seed) for seed in range(6)},
    "one token": packed([1], [0], 0),
    "a pack without an image": packed([3, 40, 1], [0, 0, 0], 2),
    "text longer than a block": packed([300, 7], [1, 3], 5),
    "rows": rows(11, [1, 1, 1]),
    "rows with other counts": rows(11, [1, 1, 0, 3]),
    "rows without an image": rows(4, [0, 0]),
}


def inputs(layout: PackedLayout, heads: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Query, key and value of the text, keys and values of the vision, and the gradient of the outcome."""
    generator = torch.Generator().manual_seed(0)
    num_text = len(layout.angles) if layout.angles is not None else 0
    columns = 1 if layout.packed else len(layout.text_lengths)
    shapes = [(num_text, columns, n, DIM) for n in (heads[0], heads[1], heads[1])]
    shapes += [(sum(layout.vision_lengths), heads[1], 2, DIM), (num_text, columns, heads[0] * DIM)]
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype) for shape in shapes]
    for tensor in drawn[:4]:
        tensor.requires_grad_()
    return drawn


def spelled_out(query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout) -> Tensor:
    """softmax(q [k_v ; k_t]^T / sqrt(d)) [v_v ; v_t], one sample at a time; zeros in the padding."""
    repeats, out, text, vision = query.shape[2] // key.shape[2], torch.zeros_like(query), 0, 0
    for sample, (num_text, num_vision) in enumerate(zip(layout.text_lengths, layout.vision_lengths, strict=True)):
        column, own = (0, slice(text, text + num_text)) if layout.packed else (sample, slice(0, num_text))
        seen = vision_kv[vision : vision + num_vision]
        keys, values = (
            torch.cat((seen[:, :, part], of_text[own, column])).repeat_interleave(repeats, 1)
            for part, of_text in enumerate((key, value))
        )
        scores = torch.einsum("shd,lhd->hsl", query[own, column], keys) / query.shape[-1] ** 0.5
        hidden = torch.ones(num_text, num_vision + num_text, dtype=torch.bool, device=query.device).triu(num_vision + 1)
        out = out.index_put(
            (torch.arange(own.start, own.stop, device=query.device), torch.tensor(column, device=query.device)),
            torch.einsum("hsl,lhd->shd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values),
        )
        text, vision = text + num_text, vision + num_vision
    return out.flatten(2)


def outcome(attend: Any, layout: PackedLayout, given: list[Tensor]) -> list[Tensor]:
    """What attention gives and its gradients, in float64 on the CPU."""
    mixed = attend(*given[:4], layout)
    if layout.packed:  # what padding comes to is nobody's business, as long as no gradient flows from it
        exists = (torch.arange(len(mixed), device=mixed.device) < sum(layout.text_lengths))[:, None, None]
        mixed = torch.where(exists, mixed, 0)
    mixed.backward(given[4])
    return [x.detach().double().cpu() for x in (mixed, *(tensor.grad for tensor in given[:4])) if x is not None]


class Sizes:
    """The configuration fields that the backends read."""

    num_attention_heads, num_query_groups, kv_channels, tensor_model_parallel_size = 4, 2, DIM, 1


def test_positions_start_again_at_every_sample() -> None:
    angles = packed([3, 1, 2], [0, 1, 0], 2).angles
    assert angles is not None
    assert angles[:6, 0, 0, 0].tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_torch_on_a_cpu_is_the_formula(layout: PackedLayout, heads: tuple[int, int], dtype: torch.dtype) -> None:
    wanted = outcome(spelled_out, layout, inputs(layout, heads, torch.float64))
    found = outcome(TorchMixtureAttention(Sizes), layout, inputs(layout, heads, dtype))
    for of_cpu, exact in zip(found, wanted, strict=True):
        assert torch.allclose(of_cpu, exact, rtol=0, atol=1e-13 if dtype == torch.float64 else 5e-6)


def test_a_merge_of_two_attentions_is_wrong_where_autograd_goes_back_through_it() -> None:
    """Why both parts' backward kernels are called with the merged result: each drops the gradient of its log-sum-exp."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def naive(query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: PackedLayout) -> Tensor:
        heads_first = [x[:, 0].transpose(0, 1)[None] for x in (query, key, value)]
        text, text_lse = flash(*heads_first, 0.0, True)
        vision, vision_lse = flash(heads_first[0], *(x.transpose(0, 1)[None] for x in vision_kv.unbind(2)), 0.0, False)
        share = torch.sigmoid(vision_lse - text_lse)[..., None]
        return torch.lerp(text, vision, share)[0].transpose(0, 1).flatten(1)[:, None]

    one, heads = packed([30], [1], 0), (4, 4)
    wanted = outcome(spelled_out, one, inputs(one, heads, torch.float64))
    merged = outcome(naive, one, inputs(one, heads, torch.float64))
    assert torch.allclose(merged[0], wanted[0], rtol=0, atol=1e-13)
    of_query, exact = merged[1], wanted[1]
    assert (of_query - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_one_sample_after_the_other_is_the_formula(layout: PackedLayout) -> None:
    wanted = outcome(spelled_out, layout, inputs(layout, (4, 2), torch.float64))
    found = outcome(lambda *given: _one_by_one(*given, DIM**-0.5), layout, inputs(layout, (4, 2), torch.float64))
    for one_by_one, exact in zip(found, wanted, strict=True):
        assert torch.allclose(one_by_one, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_te_is_handed_each_samples_own_keys(layout: PackedLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels take a GPU: in their place what they compute for this call, in plain torch."""
    monkeypatch.setattr("tests.model.test_backends.DIM", DIM)
    backend = TransformerEngineMixtureAttention.__new__(TransformerEngineMixtureAttention)
    nn.Module.__init__(backend)
    backend.core = SpelledOutKernel()
    wanted = outcome(spelled_out, layout, inputs(layout, (4, 2), torch.float64))
    for of_te, exact in zip(outcome(backend, layout, inputs(layout, (4, 2), torch.float64)), wanted, strict=True):
        assert torch.allclose(of_te, exact, rtol=0, atol=1e-13)


def test_a_frozen_decoders_first_layer_asks_for_the_visions_gradient_alone() -> None:
    layout = LAYOUTS["random pack 1"]
    query, key, value, vision_kv, grad = inputs(layout, (4, 2), torch.float64)
    TorchMixtureAttention(Sizes)(query.detach(), key.detach(), value.detach(), vision_kv, layout).backward(grad)
    wanted = outcome(spelled_out, layout, inputs(layout, (4, 2), torch.float64))[4]
    assert vision_kv.grad is not None
    assert torch.allclose(vision_kv.grad, wanted, rtol=0, atol=1e-13)


def varlen_of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """torch's function of this signature takes grouped heads as they are, and a GPU; here, what it computes, in plain torch."""
    assert window_size == (-1, 0), "causal from the bottom right"
    assert (cu_seq_q.dtype, cu_seq_k.dtype, scale) == (torch.int32, torch.int32, DIM**-0.5)
    ends = {"cu_seqlens_q": cu_seq_q, "cu_seqlens_kv": cu_seq_k, "max_seqlen_q": max_q, "max_seqlen_kv": max_k}
    return SpelledOutKernel()(query, key, value, qkv_format="thd", attn_mask_type=SpelledOutKernel.PACKED, **ends).view_as(
        query
    )


def varlen_of_torch_2_13(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    seqused_k: Tensor | None = None, block_table: Tensor | None = None, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """The same; this one wants to be told of grouped heads."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert cu_seq_k is not None
    return varlen_of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def put_in_place(monkeypatch: pytest.MonkeyPatch, varlen_attn: Any) -> None:
    """Of torch's; its arguments, which are kept once asked for, are asked for anew."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    anew = variable_length_arguments.__wrapped__
    for module in ("distributed.fused_kernels", "model.attention.backends"):
        monkeypatch.setattr(f"himix_megatron.{module}.variable_length_arguments", anew)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("varlen_attn", [varlen_of_torch_2_11, varlen_of_torch_2_13])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_torchs_flash_attention_is_called_as_each_version_wants_it(
    layout: PackedLayout, varlen_attn: Any, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_place(monkeypatch, varlen_attn)
    monkeypatch.setattr("tests.model.test_backends.DIM", DIM)
    assert has_variable_length()
    wanted = outcome(spelled_out, layout, inputs(layout, heads, torch.float64))
    found = outcome(lambda *given: _variable_length(*given, DIM**-0.5), layout, inputs(layout, heads, torch.float64))
    for of_varlen, exact in zip(found, wanted, strict=True):
        assert torch.allclose(of_varlen, exact, rtol=0, atol=1e-13)


def test_without_a_window_torchs_flash_attention_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.10: causal alone is aligned to the top left there."""
    put_in_place(monkeypatch, lambda query, key, value, *, is_causal=False, scale=None: query)
    assert not has_variable_length()


@pytest.mark.requires_gpu
@pytest.mark.parametrize("backend", ["te", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gpu_backends_in_bf16_agree_with_float64(layout: PackedLayout, backend: str) -> None:
    if backend == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
        attend: Any = TransformerEngineMixtureAttention(Sizes, 1).cuda()
    else:
        assert has_variable_length()
        attend = TorchMixtureAttention(Sizes)
    wanted = outcome(spelled_out, layout, inputs(layout, (4, 2), torch.float64))
    on_gpu = on_device(layout)
    for found, exact in zip(outcome(attend, on_gpu, inputs(layout, (4, 2), torch.bfloat16, "cuda")), wanted, strict=True):
        assert torch.allclose(found, exact, rtol=0, atol=5e-2)


@pytest.mark.requires_gpu
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_torch_on_a_gpu_in_fp32_agrees_with_float64(layout: PackedLayout) -> None:
    wanted = outcome(spelled_out, layout, inputs(layout, (4, 2), torch.float64))
    found = outcome(TorchMixtureAttention(Sizes), on_device(layout), inputs(layout, (4, 2), torch.float32, "cuda"))
    for of_gpu, exact in zip(found, wanted, strict=True):
        assert torch.allclose(of_gpu, exact, rtol=0, atol=2e-3)  # TF32 products, where they are on


def on_device(layout: PackedLayout) -> PackedLayout:
    """The same on the GPU."""
    num_text = len(layout.angles) if layout.angles is not None else 0
    rows = 1 if layout.packed else len(layout.text_lengths)
    text_ids = torch.zeros(rows, num_text, dtype=torch.long, device="cuda")
    lengths = layout.text_lengths if layout.packed else None
    images = ImageTable.of_features([[tokens] for tokens in layout.vision_lengths])
    return make_layout(text_ids, lengths, images, lambda n: rotary(n).cuda())
