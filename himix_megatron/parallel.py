"""Start torch.distributed and megatron-core's process groups. Flows in: the environment and the layout; out: a Topology.

`torchrun`, `srun` and one process alone are told apart by their environment variables, and end in the same place.
The Topology is handed to whoever needs it: no other module asks the environment or megatron-core's globals.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from himix_megatron import cpu, kernels
from himix_megatron.config import Config, ParallelConfig, RankError, check_layout, check_ranks

_LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 15.0
"""A collective gives up so much later than `parallel.timeout_seconds`: the watch over the ranks, which can name the one that
hangs and show where all of them are, comes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How this process was started, and where the ranks meet."""

    kind: Literal["torchrun", "srun", "alone"]
    rank: int
    """Among all processes, 0 to world_size - 1."""
    world_size: int
    local_rank: int
    """Among the processes of this node: picks the GPU."""
    host: str
    """Name or address of the node of rank 0; a name may be known to Slurm alone."""
    port: int
    """TCP port that rank 0 listens on; 0 for a process alone, which needs none."""


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


def launch_from_environment(env: Mapping[str, str]) -> Launch:
    """How this process was started, read from environment variables alone.

    Raises: ValueError naming the variable that is missing, malformed or in contradiction to another.
    """
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        wanted_by = "torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        rank, world_size = _place(env, "RANK", "WORLD_SIZE", wanted_by)
        return Launch(
            kind="torchrun",
            rank=rank,
            world_size=world_size,
            local_rank=_local_rank(env, "LOCAL_RANK", rank, wanted_by),
            host=_text(env, "MASTER_ADDR", wanted_by),
            port=_port(env, wanted_by),
        )
    if _is_slurm_task(env):
        return _srun_launch(env)
    return Launch(kind="alone", rank=0, world_size=1, local_rank=0, host=_LOOPBACK, port=0)


def check_launch(config: Config) -> Launch:
    """How this process was started, checked against everything in the settings that depends on the number of ranks.

    Starts nothing. Raises: ValueError.
    """
    launch = launch_from_environment(os.environ)
    check_ranks(config, launch.world_size)
    return launch


def start(config: ParallelConfig, *, seed: int, launch: Launch | None = None) -> Topology:
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
    cpu.activate_if_needed()
    kernels.settle(kernels.detect())
    from megatron.core import parallel_state, tensor_parallel  # after the redirections of cpu.py

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


def ensure_ranks(world_size: int, module: str, arguments: Sequence[str]) -> None:
    """Start `python -m module arguments` again under torchrun when this process is alone and more ranks are needed.

    Does not return in that case: torchrun takes this process's place, and its exit code.
    """
    if world_size == 1 or launch_from_environment(os.environ).kind != "alone":
        return
    # One thread a rank: ranks that each take every core slow each other down many times over.
    env = {"OMP_NUM_THREADS": "1", **os.environ, "LOGLEVEL": "ERROR"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    os.execve(sys.executable, [sys.executable, *torchrun, "-m", module, *arguments], env)


def shutdown() -> None:
    """Leave the process groups; without this NCCL complains at exit, and the process could not `start` again."""
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
    if launch.kind == "alone":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    from himix_megatron.links import allow_files  # which takes a Topology of ours

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


# ---- srun ----------------------------------------------------------------------------------------------------------


def _is_slurm_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script has SLURM_PROCID too, always 0, whatever the job's size."""
    if "SLURM_PROCID" not in env:
        return False
    is_step = "SLURM_STEP_NUM_TASKS" in env or "SLURM_STEP_ID" in env
    return is_step or env.get("ENVIRONMENT") != "BATCH"


def _srun_launch(env: Mapping[str, str]) -> Launch:
    wanted_by = "srun sets it: start with srun or torchrun, or clear the SLURM_ variables for one process alone"
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    rank, world_size = _place(env, "SLURM_PROCID", size_name, wanted_by)
    local_rank = _local_rank(env, "SLURM_LOCALID", rank, wanted_by)
    if world_size == 1:
        return Launch(kind="alone", rank=0, world_size=1, local_rank=local_rank, host=_LOOPBACK, port=0)
    if "MASTER_ADDR" in env:
        host = _text(env, "MASTER_ADDR", wanted_by)
    else:
        names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
        nodes = next((env[name] for name in names if env.get(name)), None)
        if nodes is None:
            raise RankError(f"SLURM_STEP_NODELIST is missing (and so are SLURM_JOB_NODELIST and MASTER_ADDR): {wanted_by}")
        # One node needs no name service and no network.
        host = first_node(nodes) if re.search(r"[\[,]", nodes) else _LOOPBACK
    if "MASTER_PORT" in env:
        port = _port(env, wanted_by)
    else:
        job = _number(env, "SLURM_JOB_ID", f"{wanted_by}; the port is derived from it where MASTER_PORT is not set")
        step = _number(env, "SLURM_STEP_ID", wanted_by) if "SLURM_STEP_ID" in env else 0
        # 16384 to 32767: below the range from which Linux hands out ports by itself. Steps of one job get their own.
        port = 16384 + (job * 16 + step) % 16384
    return Launch(kind="srun", rank=rank, world_size=world_size, local_rank=local_rank, host=host, port=port)


def first_node(node_list: str) -> str:
    """First name of a Slurm node list, which is the node of rank 0: `a[03-07,9]b[1-2],c` gives `a03b1`."""
    first = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", node_list)
    if first is None:
        raise RankError(f"SLURM_STEP_NODELIST is {node_list!r}: wanted a Slurm node list such as node[01-04]")
    return re.sub(r"\[([^\]\-,]*)[^\]]*\]", r"\1", first.group())


def address_of(host: str) -> str:
    """What to connect to for a host. A node name that does not resolve is looked up in Slurm (NodeAddr).

    Raises: ValueError when neither knows it.
    """
    try:
        socket.getaddrinfo(host, None)
        return host
    except socket.gaierror:
        pass
    # Only now: a thousand ranks asking the controller at once is a load that a resolvable name spares it.
    if shutil.which("scontrol"):
        command = ["scontrol", "show", "node", "--oneliner", host]
        reply = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        found = re.search(r"\bNodeAddr=(\S+)", reply)
        if found:
            return found.group(1)
    raise RankError(
        f"the node of rank 0, {host!r}, does not resolve and Slurm does not know it: set MASTER_ADDR to its address"
    )


# ---- variables -----------------------------------------------------------------------------------------------------


def _text(env: Mapping[str, str], name: str, wanted_by: str) -> str:
    value = env.get(name, "").strip()
    if not value:
        raise RankError(f"{name} is missing or empty: {wanted_by}")
    return value


def _number(env: Mapping[str, str], name: str, wanted_by: str) -> int:
    value = _text(env, name, wanted_by)
    if not re.fullmatch(r"[0-9]{1,10}", value):
        raise RankError(f"{name} is {value!r}: wanted a whole number, 0 or above")
    return int(value)


def _port(env: Mapping[str, str], wanted_by: str) -> int:
    port = _number(env, "MASTER_PORT", wanted_by)
    if not 1 <= port <= 65535:
        raise RankError(f"MASTER_PORT is {port}: wanted 1 to 65535")
    return port


def _place(env: Mapping[str, str], rank_name: str, size_name: str, wanted_by: str) -> tuple[int, int]:
    rank, world_size = _number(env, rank_name, wanted_by), _number(env, size_name, wanted_by)
    if rank >= world_size:
        raise RankError(f"{rank_name} is {rank} but {size_name} is {world_size}: wanted a rank from 0 to {size_name} - 1")
    return rank, world_size


def _local_rank(env: Mapping[str, str], name: str, rank: int, wanted_by: str) -> int:
    local_rank = _number(env, name, wanted_by)
    if local_rank > rank:
        raise RankError(f"{name} is {local_rank} but the rank is {rank}: a node's processes cannot outnumber all")
    return local_rank
