"""The optimizer's state in a checkpoint, as megatron-core describes, gathers and loads it.

Flows in: megatron-core's optimizer and the model's sharded state; out: the optimizer's sharded state, or a rank's copy of its
shard that is gathered later.

megatron-core describes a distributed optimizer by gathering all of its state over the data ranks, which takes about a third of
a save. `DistributedOptimizerCopy` only copies this rank's shard while training waits. A stand-in that holds the copies gathers
them with megatron-core's own function, on the save's thread, in groups that only saves use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from ..distributed.control_group import ControlGroup
from ..distributed.megatron_config import optimizer_parts
from .snapshot import HostCopies

_STATE = ("param", "exp_avg", "exp_avg_sq")
SHARDING = "fully_reshardable"
"""megatron-core describes a distributed optimizer as an undivided one, which loads at any layout."""


def sharding_metadata() -> dict[str, Any]:
    """How megatron-core is to describe model and optimizer."""
    return {
        "distrib_optim_sharding_type": SHARDING,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def optimizer_state(optimizer: Any, model_state: dict[str, Any], *, loading: bool) -> Any:
    """The optimizer's sharded state. `model_state`: as `checkpointer.model_state` gives it."""
    if loading:
        _allocate_moments(optimizer)
    return optimizer.sharded_state_dict(merged_chunks(model_state), is_loading=loading, metadata=sharding_metadata())


def merged_chunks(model_state: dict[str, Any]) -> dict[str, Any]:
    """The parameters of all model chunks under unique names: interleaved chunks repeat local names, and the optimizer matches
    parameters by identity."""
    return {f"{id(value)}.{name}": value for chunk in model_state.values() for name, value in chunk.items()}


def _over_torch_adam(optimizer: Any) -> list[DistributedOptimizer]:
    """The distributed optimizers over torch's AdamW (not Transformer Engine's or Apex's)."""
    plain = (torch.optim.Adam, torch.optim.AdamW)
    parts = optimizer_parts(optimizer)
    return [part for part in parts if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, plain)]


def _allocate_moments(optimizer: Any) -> None:
    """Allocate what AdamW's first step would: a distributed optimizer describes these tensors and loads into them."""
    for part in _over_torch_adam(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def load_optimizer(optimizer: Any, state: Any) -> None:
    """Put a loaded state into the optimizer.

    megatron-core's distributed optimizer fails on torch's per-parameter `step`, and gives all parameters one shared counter,
    which each of them would then advance; so the counters are removed while the moments load.
    """
    parts = _over_torch_adam(optimizer)
    if not parts:
        optimizer.load_state_dict(state)
        return
    (part,) = parts
    moments = state.pop("param_state")
    part.load_state_dict(state)
    steps = {parameter: own.pop("step") for parameter, own in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step.clone()


def distributed_part(optimizer: Any) -> DistributedOptimizer | None:
    """megatron-core's distributed optimizer inside its wrapper; None if it is another kind."""
    parts = optimizer_parts(optimizer)
    return parts[0] if len(parts) == 1 and isinstance(parts[0], DistributedOptimizer) else None


class DistributedOptimizerCopy:
    """Copies this rank's shard of a distributed optimizer, to be gathered later."""

    def __init__(self, part: DistributedOptimizer, ranks: ControlGroup):
        """All ranks call it together, while training's groups are idle."""
        self._part = part
        own = tuple(dist.get_process_group_ranks(part.data_parallel_group))
        groups = sorted(set(ranks.on_all_ranks(lambda: own)))
        self._group, _ = dist.new_subgroups_by_enumeration([list(g) for g in groups], backend="gloo", timeout=ranks.timeout)

    def copy_shard(self, copies: HostCopies, model_state: dict[str, Any]) -> Callable[[], Any]:
        """Copy this rank's shard. `model_state`: as `merged_chunks` gives it.

        Returns: a function that gathers the state as it is now; data ranks call it together, and their first one gets it.
        """
        held = {}
        for number, parameter in enumerate(self._parameters()):
            state = self._part._get_main_param_and_optimizer_states(parameter)
            held[parameter] = {key: copies.copy((self, number, key), state[key].detach()) for key in _STATE}
        # The stand-in differs from the optimizer in its group and in where it finds a parameter's state.
        stand_in = copy.copy(self._part)
        stand_in.data_parallel_group_gloo = self._group
        stand_in._get_main_param_and_optimizer_states = held.__getitem__
        by_gloo = {"distrib_optim_fully_reshardable_mem_efficient": True}
        return lambda: stand_in.sharded_param_state_fully_reshardable(model_state, False, by_gloo)

    def _parameters(self) -> Iterator[nn.Parameter]:
        for buffer in self._part.gbuf_ranges:
            for buckets in buffer.values():
                for bucket in buckets:
                    yield from bucket["param_map"]
