"""Join the ranks: torch.distributed and megatron-core's process groups. Flows in: a Launch and the layout; out: a Topology.

Other modules receive the Topology instead of reading rank variables or megatron-core's globals themselves.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config import ParallelConfig, check_layout
from ..runtime.errors import RankError
from ..runtime.process import allow_files
from . import cpu_backend, fused_kernels
from .launch import Launch, address_of, check_interface, launch_from_environment

GRACE_SECONDS = 15.0
"""A collective gives up so much later than `parallel.timeout_seconds`: the watch over the ranks, which can name the one that
hangs and show where all of them are, comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """This rank's place among the others, and the process groups. Groups are torch.distributed's."""

    rank: int
    world_size: int
    device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    """Pipeline stage."""
    pipeline_size: int
    data_rank: int
    data_size: int
    replica_rank: int
    """Place among the tensor x pipeline ranks of this model replica: pipeline_rank * tensor_size + tensor_rank."""
    replica_size: int
    tensor: Any
    """Group of the ranks that share each layer."""
    pipeline: Any
    """Group of the stages."""
    data: Any
    """Group of the ranks that hold the same weights."""
    replica: Any
    """Group of all ranks of this model replica."""
    encoding: Any
    """The same ranks once more: in it the next step's features are gathered while this step uses the other groups."""
    control: Any
    """Group of all ranks, for what hosts know: on gloo, so that no host waits for its device."""
    replica_control: Any
    """The same of this model replica."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the text."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.pipeline_size - 1


def init_distributed(config: ParallelConfig, *, seed: int, launch: Launch | None = None) -> Topology:
    """Join the other ranks, build megatron-core's groups, seed the random generators.

    The number of ranks is checked against the layout before the first collective; `check_launch`, called beforehand,
    also checks the batch.

    Args: seed: of weights and dropout; data-parallel ranks share it, pipeline and tensor ranks derive their own.
    Raises: ValueError when the ranks do not fit the layout, the environment is inconsistent, or the ranks cannot meet.
    """
    launch = launch or launch_from_environment(os.environ)
    check_layout(config, launch.world_size)
    if config.tensor > 1:
        # One hardware queue keeps tensor-parallel communication ahead of the compute that hides it: megatron-core asks
        # for it on every generation before Blackwell. It is read when the CUDA context is made, in _device.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cpu_backend.activate_if_needed()
    fused_kernels.patch_megatron(fused_kernels.detect())
    from megatron.core import parallel_state, tensor_parallel  # after the redirections of cpu_backend.py

    device = _device(launch)
    timeout = timedelta(seconds=config.timeout_seconds + GRACE_SECONDS)
    _join(launch, device, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    topology = _topology(config, launch, device)
    # Stages hold different layers: with one seed they would all start as copies of stage 0's.
    stage_seed = seed + 100 * topology.pipeline_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
    return topology


def shutdown_distributed() -> None:
    """Leave the process groups; without this NCCL complains at exit, and the process could not join ranks again."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _replicas(config: ParallelConfig, world_size: int) -> list[list[int]]:
    """The ranks of each model replica, by replica rank: megatron-core numbers tensor ranks first, then data, then stages."""
    tensor, data = config.tensor, world_size // (config.tensor * config.pipeline)
    return [[t + tensor * (d + data * p) for p in range(config.pipeline) for t in range(tensor)] for d in range(data)]


def _topology(config: ParallelConfig, launch: Launch, device: torch.device) -> Topology:
    from megatron.core import parallel_state

    tensor, pipeline = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group()
    data, replica = parallel_state.get_data_parallel_group(), parallel_state.get_model_parallel_group()
    replicas, timeout = _replicas(config, launch.world_size), timedelta(seconds=config.timeout_seconds + GRACE_SECONDS)
    encoding, _ = dist.new_subgroups_by_enumeration(replicas, timeout=timeout)
    assert dist.get_process_group_ranks(encoding) == dist.get_process_group_ranks(replica)
    control, replica_control = dist.group.WORLD, encoding
    if device.type != "cpu":
        control = dist.new_group(backend="gloo", timeout=timeout)
        replica_control, _ = dist.new_subgroups_by_enumeration(replicas, backend="gloo", timeout=timeout)
    return Topology(
        rank=launch.rank,
        world_size=launch.world_size,
        device=device,
        tensor_rank=dist.get_rank(tensor),
        tensor_size=dist.get_world_size(tensor),
        pipeline_rank=dist.get_rank(pipeline),
        pipeline_size=dist.get_world_size(pipeline),
        data_rank=dist.get_rank(data),
        data_size=dist.get_world_size(data),
        replica_rank=dist.get_rank(replica),
        replica_size=dist.get_world_size(replica),
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        replica=replica,
        encoding=encoding,
        control=control,
        replica_control=replica_control,
    )


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = launch.local_rank, torch.cuda.device_count()
    if launch.kind == "srun" and count == 1:
        index = 0  # srun --gpus-per-task=1 shows each task its own GPU only
    if index >= count:
        raise RankError(f"local rank {index} has no GPU: this node shows {count}; start at most {count} processes per node")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _join(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    # No device_id: torch would make subgroups of NCCL by splitting the world's communicator, in which ranks that are not in a
    # subgroup take part, those of gloo's too, whose members do not: wherever such a group leaves ranks out, they would hang.
    backend = "nccl" if device.type == "cuda" else "gloo"
    check_interface(os.environ)
    if launch.kind == "alone":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    allow_files(8 * launch.world_size)  # gloo connects each rank with each other one, for every group
    address = address_of(launch.host)
    where = f"tcp://[{address}]:{launch.port}" if ":" in address else f"tcp://{address}:{launch.port}"
    try:
        dist.init_process_group(backend, init_method=where, rank=launch.rank, world_size=launch.world_size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise RankError(
            f"rank {launch.rank} of {launch.world_size} could not meet the others at {launch.host}:{launch.port} ({reason}): "
            "is that port free on the node of rank 0 (MASTER_PORT chooses another), and were all ranks started?"
        ) from error
