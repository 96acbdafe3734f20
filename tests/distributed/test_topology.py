"""However the ranks are started, they find the same places; a contradiction in the environment is one line that names it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.config import ParallelConfig
from himix_megatron.distributed.launch import Launch, address_of, first_node, launch_from_environment
from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
from tests.support import ROOT
from tests.support.ranks import run_ranks

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
# Recorded from Slurm 22.05: what srun sets for task 3 of 4 on two nodes, inside a batch script.
BATCH = {
    "ENVIRONMENT": "BATCH",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
}
SRUN = {
    **BATCH,
    "SLURM_LOCALID": "1",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
}
ALONE = Launch(kind="alone", rank=0, world_size=1, local_rank=0, host="127.0.0.1", port=0)


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def test_torchrun_is_read_from_its_five_variables() -> None:
    launch = launch_from_environment({**SRUN, **TORCHRUN})
    assert launch == Launch(kind="torchrun", rank=5, world_size=8, local_rank=1, host="10.0.0.1", port=29500)


def test_srun_is_read_from_the_steps_variables() -> None:
    launch = launch_from_environment(SRUN)
    assert launch == Launch(kind="srun", rank=3, world_size=4, local_rank=1, host="n1", port=16384 + 16)


def test_plain_slurm_variables_without_a_step_are_srun() -> None:
    env = without(SRUN, "ENVIRONMENT", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    assert launch_from_environment(env) == launch_from_environment(SRUN)


def test_a_step_smaller_than_its_job_counts_its_own_tasks() -> None:
    launch = launch_from_environment({**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n2"})
    assert (launch.world_size, launch.host) == (2, "127.0.0.1"), "one node needs no name"


def test_master_address_and_port_win_over_slurms() -> None:
    launch = launch_from_environment({**SRUN, "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "4000"})
    assert (launch.kind, launch.host, launch.port) == ("srun", "10.1.2.3", 4000)


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({}, id="by hand"),
        pytest.param({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, id="an exported address starts nothing"),
        pytest.param(BATCH, id="in a batch script, not under srun"),
        pytest.param(without(BATCH, "SLURM_PROCID", "SLURM_LOCALID", "ENVIRONMENT"), id="in the shell of salloc"),
        pytest.param({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}, id="a step of one task"),
    ],
)
def test_one_process_alone_is_recognised(env: dict[str, str]) -> None:
    assert launch_from_environment(env) == ALONE


def test_two_steps_of_a_job_and_two_jobs_meet_at_different_ports() -> None:
    ports = [
        launch_from_environment({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in (1, 2, 1_000_000)
        for step in (0, 1)
    ]
    assert len(set(ports)) == 6
    assert all(16384 <= port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        *((without(TORCHRUN, name), name) for name in TORCHRUN),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8 but WORLD_SIZE is 8"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1'"),
        ({**TORCHRUN, "RANK": "1.0"}, "RANK is '1.0'"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({**TORCHRUN, "WORLD_SIZE": "eight"}, "WORLD_SIZE is 'eight'"),
        ({**TORCHRUN, "WORLD_SIZE": "9" * 40}, "WORLD_SIZE is '999"),
        ({**TORCHRUN, "LOCAL_RANK": "6"}, "LOCAL_RANK is 6 but the rank is 5"),
        ({**TORCHRUN, "MASTER_ADDR": " "}, "MASTER_ADDR is missing or empty"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({**TORCHRUN, "MASTER_PORT": "$(id)"}, "MASTER_PORT is '$(id)'"),
        (without(SRUN, "SLURM_LOCALID"), "SLURM_LOCALID"),
        (without(SRUN, "SLURM_JOB_ID"), "SLURM_JOB_ID"),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_NTASKS"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "SLURM_STEP_NODELIST"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID is 4 but SLURM_STEP_NUM_TASKS is 4"),
        ({**SRUN, "SLURM_STEP_NODELIST": "[", "SLURM_JOB_NODELIST": "["}, "SLURM_STEP_NODELIST is '['"),
    ],
)
def test_a_missing_or_contradictory_variable_is_named_in_one_line(env: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        launch_from_environment(env)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("node[003-128,200]", "node003"),
        ("b,a[1-4]", "b"),
        ("a[03-07,9]b[1-2],c", "a03b1"),
        ("gpu-a[7]-ib.cluster,x", "gpu-a7-ib.cluster"),
    ],
)
def test_the_first_node_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_a_node_name_that_does_not_resolve_is_looked_up_in_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of("127.0.0.1") == "127.0.0.1"
    name = "himix-no-such-node.invalid"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        address_of(name)
    # Slurm itself may not be installed: its reply is recorded, cut to the fields around the address.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\n[ "$*" = "show node --oneliner {name}" ] && echo "NodeName=$4 NodeAddr=127.0.0.7 Port=1"\n'
    )
    scontrol.chmod(0o755)
    assert address_of(name) == "127.0.0.7"


def test_ranks_that_do_not_fit_the_layout_are_refused_before_they_meet() -> None:
    launch = Launch(kind="torchrun", rank=0, world_size=3, local_rank=0, host="himix-no-such-node.invalid", port=1)
    with pytest.raises(ValueError, match=r"3 ranks cannot hold parallel\.tensor \(2\)"):
        init_distributed(ParallelConfig(tensor=2), seed=1, launch=launch)


def place(config: ParallelConfig, seed: int) -> dict[str, Any]:
    """Start as a rank of `config`, and tell what the Topology says."""
    import torch
    import torch.distributed as dist

    topology = init_distributed(config, seed=seed)
    ones = torch.ones(1)
    dist.all_reduce(ones, group=topology.replica)
    told = {
        "groups": {
            name: dist.get_process_group_ranks(getattr(topology, name)) for name in ("tensor", "pipeline", "data", "replica")
        },
        "ranks": (topology.tensor_rank, topology.data_rank, topology.pipeline_rank, topology.replica_rank),
        "sizes": (topology.tensor_size, topology.data_size, topology.pipeline_size, topology.replica_size),
        "ends": (topology.is_first_stage, topology.is_last_stage),
        "seed": torch.initial_seed(),
        "sum": int(ones),
    }
    shutdown_distributed()
    return told


def test_tensor_and_pipeline_ranks_form_one_replica() -> None:
    told = run_ranks(place, 4, ParallelConfig(tensor=2, pipeline=2), 7, start_gloo=False)
    assert [rank["ranks"] for rank in told] == [(0, 0, 0, 0), (1, 0, 0, 1), (0, 0, 1, 2), (1, 0, 1, 3)]
    assert all(rank["sizes"] == (2, 1, 2, 4) and rank["sum"] == 4 for rank in told)
    assert told[1]["groups"] == {"tensor": [0, 1], "pipeline": [1, 3], "data": [1], "replica": [0, 1, 2, 3]}
    assert [rank["ends"] for rank in told] == [(True, False)] * 2 + [(False, True)] * 2
    assert told[0]["seed"] == told[1]["seed"] != told[2]["seed"] == told[3]["seed"]


def test_stages_of_two_replicas_keep_their_replica_ranks() -> None:
    """Ranks 0 and 1 are stage 0 of two replicas, 2 and 3 stage 1: a replica is not a run of neighbouring ranks."""
    told = run_ranks(place, 4, ParallelConfig(pipeline=2), 7, start_gloo=False)
    assert [rank["ranks"] for rank in told] == [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 1), (0, 1, 1, 1)]
    assert [rank["groups"]["replica"] for rank in told] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["groups"]["data"] for rank in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert len({rank["seed"] for rank in told}) == 2


def test_one_process_starts_stops_and_starts_again() -> None:
    script = (
        "from himix_megatron.distributed.topology import init_distributed, shutdown_distributed\n"
        "from himix_megatron.config import ParallelConfig\n"
        "for _ in range(2):\n"
        "    topology = init_distributed(ParallelConfig(), seed=1)\n"
        "    assert (topology.world_size, topology.replica_size, topology.data_size) == (1, 1, 1)\n"
        "    shutdown_distributed()\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_", "LOCAL_"))}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def busy_port_refusal(port: int) -> str:
    launch = Launch(kind="torchrun", rank=0, world_size=2, local_rank=0, host="127.0.0.1", port=port)
    with pytest.raises(ValueError, match="MASTER_PORT") as caught:
        init_distributed(ParallelConfig(timeout_seconds=20), seed=1, launch=launch)
    return str(caught.value)


def test_a_busy_port_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (line,) = run_ranks(busy_port_refusal, 1, port, start_gloo=False)
    assert f"127.0.0.1:{port}" in line
    assert "\n" not in line


def unknown_interface_refusal() -> str:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo,himix-none"
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME") as caught:
        init_distributed(ParallelConfig(), seed=1, launch=ALONE)
    return str(caught.value)


def test_a_network_interface_that_is_none_is_one_line() -> None:
    (line,) = run_ranks(unknown_interface_refusal, 1, start_gloo=False)
    assert line.startswith("GLOO_SOCKET_IFNAME: there is no network interface 'himix-none', this node has lo")
