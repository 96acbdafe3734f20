"""The gradient's norm by the parts of the model: a vision path that stops learning is not seen in the norm of all.

Flows in: this rank's model chunks and optimizer after a step; out: the squares that this rank is the one to count.
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
def squared_norms(stages: list[Any], optimizer: Any, data_rank: int) -> dict[Part, float]:
    """Sums of squares by part, of what no other rank counts: added over all ranks they are the squared norms.

    After an update gradients are as it clipped them (`whole` undoes it). Copies are counted once: of the tensor ranks, of
    weights that two stages share, and of the data ranks, among which a distributed optimizer divides the gradient.
    """
    grads: dict[Part, list[Tensor]] = {part: [] for part in PARTS}
    for stage in stages:
        for name, parameter in unwrap_model(stage).named_parameters():
            counts = parameter.requires_grad and param_is_not_shared(parameter)
            if counts and param_is_not_tensor_parallel_duplicate(parameter):
                grads[part_of(name)] += _own(parameter, optimizer, data_rank)
    norms = [
        torch.nn.utils.get_total_norm(own).double() if own else torch.zeros((), dtype=torch.float64) for own in grads.values()
    ]
    return {part: norm.item() ** 2 for part, norm in zip(PARTS, norms, strict=True)}


def _own(parameter: Any, optimizer: Any, data_rank: int) -> Iterator[Tensor]:
    """What this data rank holds of a parameter's gradient."""
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


def whole(squares: Mapping[Part, float], grad_norm: float) -> dict[Part, float]:
    """Norms by part, before clipping. `squares`: added over all ranks; `grad_norm`: of all parts, before clipping."""
    total = math.sqrt(sum(squares.values()))
    scale = grad_norm / total if total > 0 else 1.0
    return {part: scale * math.sqrt(square) for part, square in squares.items()}
