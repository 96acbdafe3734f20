"""The loss from answer tokens alone, a chunk at a time, equals the loss from all logits; values and gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
}
SAMPLES, TEXT = 3, 20


def labels_for(count: str) -> Tensor:
    """int64[B, S]: some labels, none, or one everywhere."""
    labels = torch.randint(260, (SAMPLES, TEXT), generator=torch.Generator().manual_seed(2))
    hidden = {"some": torch.rand(SAMPLES, TEXT, generator=torch.Generator().manual_seed(3)) < 0.6, "none": labels >= 0}
    return labels.masked_fill(hidden.get(count, labels < 0), -100)


def losses_and_gradients(options: dict[str, Any], tied: bool, count: str, chunk_logits: int) -> list[tuple[Tensor, Tensor]]:
    """(found, wanted) of the losses, and of the gradients of what goes into the head and of its weight; one rank's part."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model import loss
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model

    loss.CHUNK_LOGITS = chunk_logits
    config = small_config(Path("unused"), Path("unused"), parts=("language", "vision_kv"), **options)
    config = replace(config, model=replace(config.model, tie_embeddings=tied))
    topology = init_distributed(config.parallel, seed=1)
    stage = build_model_chunks(config, detect(), topology, torch.nn.Identity())[0]
    model, labels = unwrap_model(stage), labels_for(count)
    own = TEXT // topology.tensor_size if config.parallel.sequence else TEXT
    whole = torch.randn(TEXT, SAMPLES, 64, generator=torch.Generator().manual_seed(4))
    first = topology.tensor_rank * own if config.parallel.sequence else 0
    weight = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    weights_BS = torch.linspace(0.5, 1.5, SAMPLES * TEXT).view(SAMPLES, TEXT)

    def gradients(losses_BS: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stage.zero_grad_buffer()
        (losses_BS * weights_BS).sum().backward()
        assert states.grad is not None
        return losses_BS.detach(), states.grad, weight.main_grad.clone()

    states = whole[first : first + own].clone().requires_grad_()
    found = gradients(model._postprocess(states, labels=labels), states)
    states = whole[first : first + own].clone().requires_grad_()
    logits_SBW, _ = model.output_layer(states, weight=weight if tied else None)
    all_losses = vocab_parallel_cross_entropy(model.hide_padding(logits_SBW), labels.clamp(min=0).t().contiguous()).t()
    wanted = gradients(all_losses * (labels >= 0), states)
    shutdown_distributed()
    return list(zip(found, wanted, strict=True))


@pytest.mark.parametrize("count", ["some", "none", "all"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_all_logits(layout: str, tied: bool, count: str) -> None:
    ranks, options = LAYOUTS[layout]
    for pairs in run_ranks(losses_and_gradients, ranks, options, tied, count, 7 * 384, start_gloo=False):
        assert pairs[0][0].dtype == torch.float32
        for found, wanted in pairs:
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def largest_tensor() -> int:
    """Elements of the largest tensor that forward and backward make."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    with Largest() as largest:
        losses_and_gradients_alone()
    return largest.elements


def losses_and_gradients_alone() -> None:
    """The head by itself over 4,000 tokens and a vocabulary of 1,000."""
    from himix_megatron.model import loss

    weight = torch.randn(1000, 16, requires_grad=True)
    hidden = torch.randn(1000, 4, 16, requires_grad=True)
    labels = torch.randint(1000, (4, 1000))

    def losses_of(states: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy((states @ weight.t()).flatten(0, 1), labels.flatten(), reduction="none")[
            :, None
        ]

    loss.token_losses(hidden, labels, losses_of, num_logits=1000).sum().backward()


def test_a_micro_batchs_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("himix_megatron.model.loss.CHUNK_LOGITS", 50_000)
    assert largest_tensor() <= 64_000  # the states; all logits were 4 million
