"""A micro-batch padded to one of a few sizes, and run as one CUDA graph, gives the loss and the gradients of the plain way."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.distributed import cpu_backend
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config

cpu_backend.activate_if_needed()

TEXTS = ([30, 1, 17, 40], [9, 60, 3], [88], [20, 20, 20, 20])
IMAGES = ([1, 0, 2, 1], [1, 1, 0], [3], [1, 1, 1, 0])


def packs(config: Any, device: torch.device, dtype: torch.dtype) -> list[Any]:
    """Packs of one width: other lengths, images and labels each."""
    from himix_megatron.data.loading.image_table import ImageTable
    from himix_megatron.model.stage_input import StageInput

    generator, inputs = torch.Generator().manual_seed(0), []
    for texts, images in zip(TEXTS, IMAGES, strict=True):
        ids = torch.randint(config.model.vocab_size, (1, 96), generator=generator)
        labels, end = torch.full_like(ids, -100), 0
        for length in texts:
            labels[0, end + length // 2 : end + length - 1] = ids[0, end + length // 2 + 1 : end + length]
            end += length
        table = ImageTable.of_features([[4 + k for k in range(count)] for count in images])
        features = torch.randn(sum(table.tokens), config.vision.hidden_size, generator=generator)
        labelled = (labels.flatten() >= 0).nonzero()[:, 0]
        given = StageInput(
            ids, features, torch.zeros(sum(images), dtype=torch.bool), table,
            labels=labels, packed_lengths=tuple(texts), labelled=labelled,
        )  # fmt: skip
        tensors = {name: getattr(given, name).to(device) for name in ("text_ids", "images", "blank", "labels", "labelled")}
        inputs.append(replace(given, **(tensors | {"images": tensors["images"].to(dtype)})))
    return inputs


def both_ways(options: dict[str, Any], precision: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(as graphs, plainly): reports and gradient sums of three steps of four packs."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.megatron_config import params_dtype
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks, finalize_gradients
    from himix_megatron.model.micro_batch_graphs import MicroBatchGraphs
    from himix_megatron.model.schedule import run_losses

    config = small_config(Path("unused"), Path("unused"), parts=("language", "vision_kv"), precision=precision)
    config = replace(
        config,
        model=replace(config.model, **options),
        data=replace(config.data, pack_max_text_tokens=96, pack_max_vision_tokens=16),
        train=replace(config.train, global_batch_samples=None, global_batch_packs=4, cuda_graphs="on"),
    )
    topology = init_distributed(config.parallel, seed=1)
    model_chunks = build_model_chunks(config, detect(), topology, torch.nn.Identity())
    model_chunks[0].config.finalize_model_grads_func = finalize_gradients
    inputs, graphs, found = packs(config, topology.device, params_dtype(config)), MicroBatchGraphs(config, model_chunks[0]), []
    for _, own in itertools.product(range(3), (graphs, None)):
        model_chunks[0].zero_grad_buffer()
        reports = run_losses(model_chunks, inputs, forward_only=False, graphs=own)
        found.append([torch.stack(reports).cpu(), *(buffer.grad_data.cpu().clone() for buffer in model_chunks[0].buffers)])
    shutdown_distributed()
    return [pair for way, plain in zip(found[::2], found[1::2], strict=True) for pair in zip(way, plain, strict=True)]


def on_a_cpu() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Padded to the sizes, but nothing recorded."""
    from himix_megatron.model import micro_batch_graphs

    micro_batch_graphs.MAX_GRAPHS = 0
    return both_ways({"layer_spec": "torch"}, "fp32")


def test_padding_to_a_size_changes_no_loss_and_no_gradient() -> None:
    for padded, plain in run_ranks(on_a_cpu, 1, start_gloo=False)[0]:
        assert torch.allclose(padded, plain.to(padded), rtol=1e-5, atol=1e-7)


@pytest.mark.requires_gpu
@pytest.mark.parametrize("spec", ["te", "torch"])
def test_graphs_change_no_loss_and_no_gradient(spec: str) -> None:
    if spec == "te":
        pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")
    for way, plain in both_ways({"layer_spec": spec}, "bf16"):
        assert (way - plain.to(way)).norm() <= 1e-2 * plain.norm()  # flash attention's gradients are added up in any order
