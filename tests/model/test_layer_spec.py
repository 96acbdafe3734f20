"""Both layer specs describe the same model: the same parameters, under the same names on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from himix_megatron.distributed.fused_kernels import detect
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config


def names_and_shapes(attention: str) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of a small model holds; on one rank."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from himix_megatron.checkpoint.checkpointer import model_state
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks
    from himix_megatron.model.towers import build_tower

    config = small_config(Path("unused"), Path("unused"), parts=("language", "vision_kv"))
    config = replace(config, model=replace(config.model, layer_spec=attention))
    topology = init_distributed(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    kernels = detect()
    # Transformer Engine's modules refuse to be built, not only to run, where torch sees no GPU.
    with patch("torch.cuda.is_available", return_value=attention == "te" or torch.cuda.is_available()):
        model_chunks = build_model_chunks(config, kernels, topology, tower)
    tensors = [t for t in model_state(model_chunks)["model0"].values() if isinstance(t, ShardedTensor)]
    shutdown_distributed()
    return {f"{tensor.key}{list(tensor.global_offset)}": tuple(tensor.global_shape) for tensor in tensors}


def test_torch_spec_names_every_vision_parameter() -> None:
    found = run_ranks(names_and_shapes, 1, "torch", start_gloo=False)[0]
    assert sum("vision_norm" in name for name in found) == 4
    assert sum("linear_vision_kv" in name for name in found) == 8


@pytest.mark.skipif(not detect().transformer_engine, reason=detect().transformer_engine_reason)
def test_te_spec_builds_the_same_parameters() -> None:
    te, torch_ = (run_ranks(names_and_shapes, 1, name, start_gloo=False)[0] for name in ("te", "torch"))
    assert te == torch_


@pytest.mark.parametrize("trains", [True, False])
def test_rms_norm_is_torchs(trains: bool) -> None:
    import torch

    from himix_megatron.model.cpu_ops import RMSNorm

    own = RMSNorm(SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False), 5, 1e-6)
    torch.nn.init.uniform_(own.weight.requires_grad_(trains))
    given = torch.randn(7, 2, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(own(given), torch.nn.functional.rms_norm(given, (5,), own.weight, 1e-6), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(own, (given,))
    if trains:
        assert torch.autograd.gradcheck(lambda weight: torch.func.functional_call(own, {"weight": weight}, given), own.weight)
    half = RMSNorm(SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False), 5, 1e-6)
    assert half(given.bfloat16()).dtype == torch.bfloat16


def test_swiglu_is_its_formula() -> None:
    import torch

    from himix_megatron.model.cpu_ops import SwiGLU

    given = torch.randn(23, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLU(None), (given,))
    assert torch.equal(SwiGLU(None)(given), torch.nn.functional.silu(given[..., :2]) * given[..., 2:])
