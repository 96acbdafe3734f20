"""How this process was launched, and where its ranks meet. Flows in: environment variables; out: a Launch.

`torchrun`, `srun` and a single process are recognised by their variables, and give the same result.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..config import Config, check_ranks
from ..runtime.errors import RankError

_LOOPBACK = "127.0.0.1"


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


def check_interface(env: Mapping[str, str]) -> None:
    """Raises: ValueError where GLOO_SOCKET_IFNAME names a network interface that this node does not have."""
    asked, known = env.get("GLOO_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    if missing := [name for name in asked.split(",") if name and name not in known]:
        raise RankError(f"GLOO_SOCKET_IFNAME: there is no network interface {missing[0]!r}, this node has {', '.join(known)}")


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
