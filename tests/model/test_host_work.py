"""What a layer costs the host, which on a GPU queues kernels faster than they run or becomes what a step waits for.

Counted are calls of aten, forward and backward, with a kernel that does nothing in the place of attention over joined keys.
The budget is what the first version took, 291 calls and 977 views with 26 samples a pack, times 0.65 and 0.4.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support.ranks import run_ranks

SAMPLES, TEXT, VISION, HIDDEN = 26, 4, 8, 64
VIEW = re.compile(
    "aten::(_reshape_alias|_unsafe_view|alias|as_strided|chunk|detach|expand|expand_as|flatten|narrow|permute|reshape|select"
    "|slice|split|split_with_sizes|squeeze|t|transpose|unbind|unflatten|unsqueeze|view|view_as)"
)


class Kernel(torch.autograd.Function):
    """Reads nothing; gives what attention would."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, vision_kv: Tensor, layout: Any) -> Tensor:
    """As the cores do that want a sample's keys one after the other."""
    mixed = Kernel.apply(layout.flatten_text(query), *layout.interleave_kv(vision_kv, key, value))  # type: ignore[no-untyped-call]
    return layout.unflatten_text(mixed.flatten(1), len(query))  # type: ignore[no-any-return]


def activate(_: Any, gate_and_up: Tensor) -> Tensor:
    """The activation as few calls: the CPU's own goes row by row."""
    gate, up = gate_and_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def rotate(tensor: Tensor, angles: Tensor, **_: Any) -> Tensor:
    """RoPE as one kernel, as on a GPU."""
    return tensor.clone()


def calls_of_a_layer() -> tuple[float, float]:
    """Calls and views of one decoder layer, forward and backward; on one rank."""
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model import cpu_ops
    from himix_megatron.model.attention import backends, mixture_attention
    from pipelines.recipes import RECIPES

    backends.TorchMixtureAttention.forward = attend  # type: ignore[assignment, method-assign]
    cpu_ops.SwiGLU.forward = activate  # type: ignore[assignment, method-assign]
    mixture_attention.apply_rotary_pos_emb = rotate
    config = RECIPES["qwen2_0_5b_instruct"]()
    small = {
        "vocab_size": 128,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    }
    config = replace(
        config,
        vision=replace(config.vision, hidden_size=HIDDEN, num_attention_heads=4),
        train=replace(config.train, precision="fp32"),
        parallel=replace(config.parallel, tensor=1, pipeline=1, sequence=False, split="even"),
    )
    topology = init_distributed(config.parallel, seed=0)
    counts = []
    for num_layers in (2, 4):
        model = replace(config.model, num_layers=num_layers, layer_spec="torch", **small)
        counts.append(_count(replace(config, model=model), topology))
    shutdown_distributed()
    of_layer = {name: (counts[1][name] - counts[0][name]) / 2 for name in counts[1] if name.startswith("aten::")}
    views = sum(count for name, count in of_layer.items() if VIEW.fullmatch(name))
    return sum(of_layer.values()) - views, views


def _count(config: Any, topology: Any) -> Counter[str]:
    from torch.profiler import ProfilerActivity, profile

    from himix_megatron.data.loading.image_table import ImageTable
    from himix_megatron.model.attention.packed_layout import make_layout
    from himix_megatron.model.vision_input import normalise
    from tools.bench.decoder_setup import build

    model = build(config, topology)
    ids = torch.zeros(1, SAMPLES * TEXT, dtype=torch.long)
    layout = make_layout(ids, [TEXT] * SAMPLES, ImageTable.of_features([[VISION]] * SAMPLES), model.rotary_pos_emb)
    features = normalise(torch.randn(SAMPLES * VISION, HIDDEN), 1e-6)
    hidden = torch.randn(SAMPLES * TEXT, 1, HIDDEN, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as calls:
        out = model.decoder(hidden, None, context=features, packed_seq_params=layout)
        out.backward(torch.ones_like(out))
    return Counter({event.key: event.count for event in calls.key_averages()})


def test_a_layer_makes_few_calls() -> None:
    calls, views = run_ranks(calls_of_a_layer, 1, start_gloo=False)[0]
    assert 100 < calls <= 0.65 * 291
    assert 50 < views <= 0.4 * 977
