"""What the vision path costs: one stored copy of the features, and no work for what is frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from himix_megatron.data.loading.image_table import ImageTable
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config

SAMPLES, TEXT, VISION = 3, 24, 400


def build(parts: tuple[Any, ...], num_layers: int = 4, **options: Any) -> tuple[Any, Any]:
    """One rank's model and its configuration."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model

    config = small_config(Path("unused"), Path("unused"), parts=parts, **options)
    config = replace(config, model=replace(config.model, num_layers=num_layers))
    topology = init_distributed(config.parallel, seed=1)
    model_chunks = build_model_chunks(config, detect(), topology, torch.nn.Identity())
    for stage in model_chunks:
        stage.zero_grad_buffer()
    return unwrap_model(model_chunks[0]), (config, model_chunks)


def run(model: Any, config: Any, features_TV: Tensor) -> Tensor:
    """Forward with the loss on all but the first tokens."""
    ids = torch.randint(config.model.vocab_size, (SAMPLES, TEXT), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[:, :3] = -100
    images = ImageTable.of_features([[VISION]] * SAMPLES)
    losses: Tensor = model(ids, features_TV, torch.zeros(SAMPLES, dtype=torch.bool), images, labels=labels)
    return losses.sum()


def features(config: Any) -> Tensor:
    """One image a sample."""
    return torch.randn(SAMPLES * VISION, config.vision.hidden_size, generator=torch.Generator().manual_seed(1))


def stored_features(num_layers: int) -> int:
    """How many tensors as large as the features are kept for the backward pass."""
    from himix_megatron.distributed.topology import shutdown_distributed

    model, (config, _) = build(("language", "vision_kv"), num_layers)
    given = features(config)
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() == given.numel():
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run(model, config, given)
    loss.backward()
    shutdown_distributed()
    return len(kept)


def test_normalised_features_are_stored_once_for_all_layers() -> None:
    # The small model's features are as wide as its vision keys and values are not: nothing else has their size.
    assert [run_ranks(stored_features, 1, layers, start_gloo=False) for layers in (2, 4)] == [[1], [1]]


def folded_and_plain() -> list[tuple[Tensor, Tensor]]:
    """A layer's vision keys and values and its two gradients, beside the formula's: RMSNorm, then the projection."""
    from himix_megatron.distributed.topology import shutdown_distributed
    from himix_megatron.model.vision_input import normalise

    model, (config, _) = build(("language", "vision_kv"))
    attention = model.decoder.layers[1].self_attention
    norm, linear = attention.vision_norm.weight, attention.linear_vision_kv
    with torch.no_grad():
        norm.copy_(torch.linspace(0.5, 2.0, len(norm)))
    given, eps = features(config).requires_grad_(), config.model.norm_eps
    found_kv = attention.project_vision(normalise(given, eps))
    weights = torch.linspace(-1, 1, found_kv.numel()).view_as(found_kv)
    found = torch.autograd.grad((found_kv * weights).sum(), (norm, linear.weight, linear.bias, given))
    wanted_kv = F.linear(F.rms_norm(given, norm.shape, norm, eps), linear.weight, linear.bias).view_as(found_kv)
    wanted = torch.autograd.grad((wanted_kv * weights).sum(), (norm, linear.weight, linear.bias, given))
    shutdown_distributed()
    return [(a.detach(), b.detach()) for a, b in zip((found_kv, *found), (wanted_kv, *wanted), strict=True)]


def test_folding_the_norm_into_the_projection_changes_nothing() -> None:
    for found, wanted in run_ranks(folded_and_plain, 1, start_gloo=False)[0]:
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def backward_products(parts: tuple[Any, ...]) -> int:
    """FLOPs of the matrix products in the backward pass (torch counts none for fused attention on a CPU)."""
    from himix_megatron.distributed.topology import shutdown_distributed

    model, (config, _) = build(parts)
    loss = run(model, config, features(config))

    def added_in_place(_: Any, left: Any, right: Any, **__: Any) -> int:
        """How weight gradients are taken; the counter does not know it."""
        return 2 * left[0] * left[1] * right[1]  # type: ignore[no-any-return]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place}) as counter:
        loss.backward()
    shutdown_distributed()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen
    return int(counter.get_total_flops())


@pytest.mark.parametrize("parts", [("vision_kv",), ("language", "vision_kv")], ids=["align", "instruct"])
def test_no_product_is_taken_for_what_is_frozen(parts: tuple[Any, ...]) -> None:
    config = small_config(Path("unused"), Path("unused"), parts=parts)
    model, width = config.model, config.vision.hidden_size
    keys = 2 * model.num_query_groups * model.channels_per_head
    qkv, out, mlp = (
        2 * SAMPLES * TEXT * model.hidden_size * n
        for n in (model.hidden_size + keys, model.hidden_size, 3 * model.ffn_hidden_size)
    )
    vision = 2 * SAMPLES * VISION * width * keys  # for its weights; the frozen tower's features need nothing
    head = 2 * SAMPLES * (TEXT - 3) * model.hidden_size * 384  # padded vocabulary; logits are computed again
    layers = model.num_layers
    # In align text's gradient ends at the first layer's attention, whose output projection still passes it on to vision.
    to_text = layers * (out + mlp) + (layers - 1) * qkv
    wanted = to_text + layers * vision + 2 * head
    if "language" in parts:
        wanted += layers * (qkv + out + mlp) + qkv + head
    assert run_ranks(backward_products, 1, parts, start_gloo=False) == [wanted]


def norm_gradients(parallel_options: dict[str, Any]) -> tuple[float, Tensor]:
    """Loss, and the vision norms' gradients of all layers, with weights that are the same for every tensor size."""
    from himix_megatron.distributed.topology import shutdown_distributed

    model, (config, model_chunks) = build(("language", "vision_kv"), **parallel_options)
    loss = run(model, config, features(config))
    loss.backward()
    model_chunks[0].config.finalize_model_grads_func = None
    found = torch.stack([layer.self_attention.vision_norm.weight.main_grad for layer in model.decoder.layers])
    shutdown_distributed()
    return float(loss.detach()), found


@pytest.mark.parametrize("options", [{"tensor": 2}, {"tensor": 2, "sequence": True}], ids=["tensor 2", "tensor 2, sequence"])
def test_vision_norms_gradient_is_whole_on_every_tensor_rank(options: dict[str, Any]) -> None:
    [(loss, wanted)] = run_ranks(norm_gradients, 1, {}, start_gloo=False)
    for found_loss, found in run_ranks(norm_gradients, 2, options, start_gloo=False):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()
