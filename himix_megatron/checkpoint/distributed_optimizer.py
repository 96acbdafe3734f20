"""What a distributed optimizer holds, gathered beside training.

megatron-core describes a distributed optimizer for a checkpoint by gathering all of its state over the data ranks, which takes
about as long as a third of a save. Here each rank only copies its own part while training waits. The gathering is left to
megatron-core's own function, on a stand-in that holds the copies, in the save's thread, by groups that only saves use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from ..distributed.control_group import ControlGroup
from ..distributed.megatron_config import optimizer_parts
from .snapshot import HostCopies

_STATE = ("param", "exp_avg", "exp_avg_sq")


def divided_part(optimizer: Any) -> DistributedOptimizer | None:
    """megatron-core's distributed optimizer inside its wrapper; None if it is another kind."""
    parts = optimizer_parts(optimizer)
    return parts[0] if len(parts) == 1 and isinstance(parts[0], DistributedOptimizer) else None


class DistributedOptimizerCopy:
    """Copies a distributed optimizer's part on this rank, to be gathered later."""

    def __init__(self, part: DistributedOptimizer, ranks: ControlGroup):
        """All ranks together, where training's groups are idle."""
        self._part = part
        own = tuple(dist.get_process_group_ranks(part.data_parallel_group))
        groups = sorted(set(ranks.on_all_ranks(lambda: own)))
        self._group, _ = dist.new_subgroups_by_enumeration([list(g) for g in groups], backend="gloo", timeout=ranks.timeout)

    def copy_shard(self, copies: HostCopies, model_state: dict[str, Any]) -> Callable[[], Any]:
        """Copy this rank's part. `model_state`: of the parameters by any names, describing where each belongs.

        Returns: what gathers the whole as it is now; data ranks call it together, and the first of them gets it.
        """
        held = {}
        for number, parameter in enumerate(self._parameters()):
            state = self._part._get_main_param_and_optimizer_states(parameter)
            held[parameter] = {key: copies.copy((self, number, key), state[key].detach()) for key in _STATE}
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
