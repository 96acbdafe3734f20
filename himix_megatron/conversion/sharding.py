"""Whole tensors in and out of a model that is cut over tensor ranks and pipeline stages.

Flows in: megatron-core's modules on every rank, and whole tensors by global name (`decoder.layers.7...`, 7 counted over the
whole model); out: filled parameters, or whole tensors gathered on every rank. This is for models small enough to be whole
somewhere; checkpoints use checkpoint/checkpointer.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.topology import Topology
from ..model.himix_model import unwrap_model

_LAYER = re.compile(r"(.*decoder\.layers\.)(\d+)(\..*)")
TE_NAMES = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}
"""Transformer Engine's names of the norms inside its linear layers, which are the names on disk, and the plain ones."""


def global_parameters(model_chunks: list[Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under names that are the same in every layout and backend."""
    for model_chunk in model_chunks:
        model = unwrap_model(model_chunk)
        for name, parameter in model.named_parameters():
            layer = _LAYER.fullmatch(name)
            if layer:
                number = model.decoder.layers[int(layer[2])].layer_number - 1
                name = f"{layer[1]}{number}{layer[3]}"
            for te_name, plain in TE_NAMES.items():
                name = name.replace(te_name, plain)
            yield name, parameter


def _is_gated(name: str) -> bool:
    # Each tensor rank holds its part of the gate, then its part of the up projection.
    return name.endswith("mlp.linear_fc1.weight")


@torch.no_grad()
def scatter(model_chunks: list[Any], whole: Mapping[str, Tensor], topology: Topology) -> None:
    """Fill this rank's parameters from whole tensors; rows that pad the vocabulary become 0."""
    for name, parameter in global_parameters(model_chunks):
        parameter.copy_(_own_part(name, whole[_source(name, whole)], parameter, topology))


def _source(name: str, whole: Mapping[str, Tensor]) -> str:
    # A tied head on the last stage is a copy of the embedding.
    return "embedding.word_embeddings.weight" if name == "output_layer.weight" and name not in whole else name


def _own_part(name: str, tensor: Tensor, parameter: nn.Parameter, topology: Topology) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    dim, size, rank = int(parameter.partition_dim), topology.tensor_size, topology.tensor_rank  # type: ignore[attr-defined]
    if _is_gated(name):
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    if dim == 0 and tensor.shape[0] != parameter.shape[0] * size:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, parameter.shape[0] * size - tensor.shape[0]))
    return tensor.chunk(size, dim)[rank]


@torch.no_grad()
def gather(
    model_chunks: list[Any], pick: Callable[[nn.Parameter], Tensor], topology: Topology, vocab_size: int
) -> dict[str, Tensor]:
    """Whole tensors by global name, on every rank: of the parameters, their gradients, or whatever `pick` takes."""
    own: dict[str, Tensor] = {}
    for name, parameter in global_parameters(model_chunks):
        tensor = pick(parameter).detach().contiguous()
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(tensor) for _ in range(topology.tensor_size)]
            torch.distributed.all_gather(parts, tensor, group=topology.tensor)
            if _is_gated(name):
                halves = [part.chunk(2) for part in parts]
                parts = [half[0] for half in halves] + [half[1] for half in halves]
            tensor = torch.cat(parts, dim=int(parameter.partition_dim))  # type: ignore[attr-defined]
        own[name] = tensor[:vocab_size] if "embedding" in name or "output_layer" in name else tensor
    everyone: list[Any] = [None] * topology.pipeline_size
    torch.distributed.all_gather_object(everyone, {n: t.cpu() for n, t in own.items()}, group=topology.pipeline)
    return {name: tensor for model_chunk in reversed(everyone) for name, tensor in model_chunk.items()}
