"""The attention in Triton against a softmax spelled out, in float64: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from .test_training_attention import LAYOUTS, on_device, outcome, spelled_out
from .test_training_attention import inputs as inputs_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SMALL = [name for name, layout in LAYOUTS.items() if sum(layout.text_lengths) <= 120]
HEADS = {"grouped": (4, 2), "a key head each": (4, 4), "seven for each": (14, 2)}


def interpreted() -> dict[str, float]:
    """The largest differences, by layout and heads."""
    from himix_megatron.model.attention.triton_attention import triton_attention

    def attend(*given: Any) -> torch.Tensor:
        return triton_attention(*given, given[0].shape[3] ** -0.5).flatten(2)

    found = {}
    for heads_name, heads in HEADS.items():
        for name in SMALL if heads == (4, 2) else SMALL[-4:]:
            wanted = outcome(spelled_out, LAYOUTS[name], inputs_of(LAYOUTS[name], heads, torch.float64))
            own = outcome(attend, LAYOUTS[name], inputs_of(LAYOUTS[name], heads, torch.float32))
            pairs = [(a, b) for a, b in zip(own, wanted, strict=True) if a.numel()]
            found[f"{name}, {heads_name}"] = max(float((a - b).abs().max()) for a, b in pairs)
    return found


@pytest.mark.skipif(
    tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4),
    reason="Triton's interpreter makes numbers of arrays of one element, which numpy refuses from 2.4 on",
)
def test_the_interpreted_kernels_are_the_formula() -> None:
    # In a process of its own: Triton decides when it is imported.
    program = "import json; from tests.model.test_triton_attention import interpreted; print(json.dumps(interpreted()))"
    command, env = [sys.executable, "-c", program], {**os.environ, "TRITON_INTERPRET": "1"}
    output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=300, check=True).stdout
    differences = json.loads(output.splitlines()[-1])
    assert len(differences) > 12
    assert max(differences.values()) < 5e-6, differences


@pytest.mark.requires_gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_compiled_kernels_are_the_formula_and_repeat_to_the_bit(layout: str, dim: int, monkeypatch: Any) -> None:
    from himix_megatron.model.attention.triton_attention import triton_attention

    monkeypatch.setattr("tests.model.test_training_attention.DIM", dim)

    def attend(*given: Any) -> torch.Tensor:
        return triton_attention(*given, dim**-0.5).flatten(2)

    own, on_gpu = LAYOUTS[layout], on_device(LAYOUTS[layout])
    wanted = outcome(spelled_out, own, inputs_of(own, (14, 2), torch.float64))
    found, again = (outcome(attend, on_gpu, inputs_of(own, (14, 2), torch.bfloat16, "cuda")) for _ in range(2))
    for first, second, exact in zip(found, again, wanted, strict=True):
        assert torch.equal(first, second)
        assert (first - exact).norm() <= 2e-2 * exact.norm() + 1e-2
