"""The gradient norm of each part of the model: a vision path that stops learning does not show in the norm of all parameters.

Flows in: this rank's model chunks and optimizer after a step; out: the sums of squares that this rank counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from ..config import Part
from ..distributed.megatron_config import optimizer_parts
from ..model.himix_model import part_of, unwrap_model

PARTS: tuple[Part, ...] = ("language", "vision_kv", "tower")


@torch.no_grad()
def squared_norms(model_chunks: list[Any], optimizer: Any, data_rank: int) -> dict[Part, float]:
    """Sums of squares by part; summed over all ranks they are the squared norms.

    After an update the gradients are clipped; `unclipped_norms` undoes it. What several ranks hold is counted once: by one of
    the tensor ranks, by one of two stages that share weights, and by one data rank, or by the data rank whose shard of a
    distributed optimizer it is.
    """
    grads: dict[Part, list[Tensor]] = {part: [] for part in PARTS}
    for model_chunk in model_chunks:
        for name, parameter in unwrap_model(model_chunk).named_parameters():
            counts = parameter.requires_grad and param_is_not_shared(parameter)
            if counts and param_is_not_tensor_parallel_duplicate(parameter):
                grads[part_of(name)] += _own(parameter, optimizer, data_rank)
    norms = [torch.nn.utils.get_total_norm(own) for own in grads.values()]  # of none 0
    return {part: norm.item() ** 2 for part, norm in zip(PARTS, norms, strict=True)}


def _own(parameter: Any, optimizer: Any, data_rank: int) -> Iterator[Tensor]:
    """The piece of a parameter's gradient that this data rank counts."""
    grad: Tensor = parameter.main_grad
    for part in optimizer_parts(optimizer):
        if not isinstance(part, DistributedOptimizer):
            if data_rank == 0:
                yield grad
            return
        if parameter in getattr(part, "model_param_gbuf_map", {}):
            buffer, dtype, bucket = part.model_param_gbuf_map[parameter]
            owned = part.gbuf_ranges[buffer][dtype][bucket]["param_map"].get(parameter)
            if owned is not None:
                yield grad.view(-1)[owned["param"].start : owned["param"].end]
            return


def unclipped_norms(squares: Mapping[Part, float], grad_norm: float) -> dict[Part, float]:
    """Norms by part before clipping. `squares`: summed over all ranks; `grad_norm`: of all parts, before clipping."""
    total = math.sqrt(sum(squares.values()))
    scale = grad_norm / total if total > 0 else 1.0
    return {part: scale * math.sqrt(square) for part, square in squares.items()}
