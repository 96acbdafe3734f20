"""One stage as a Slurm job. Flows in: a stage's command line and where it runs; out: sbatch's parameters, and the job itself.

submitit writes the batch script, saves the stage beside it, and submits. The script makes the environment and starts a process
per rank, as slurm/pretrain_himix.sh does; each of them becomes `python -m pipelines.pretrain ...`. submitit's own handling of
signals (TERM is ignored, rank 0 alone is asked to save) thereby ends before training begins.

Importing this costs little: each rank does so before it becomes its training process.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from himix_megatron.config import Config, Limit, check_limits

StageName = Literal["align", "instruct"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Where a job runs, and its size. Nothing here reaches a shell unchecked."""

    partition: str | None = None
    """Partition, or several with commas; None: the cluster's default."""
    nodes: Annotated[int, Limit(1, 65536)] = 1
    """Nodes of each job."""
    gpus_per_node: Annotated[int, Limit(0, 1024)] = 0
    """GPUs on each node; 0: train on CPUs."""
    tasks_per_node: Annotated[int, Limit(1, 1024)] | None = None
    """Ranks on each node; None: one for each GPU, or one."""
    cpus_per_task: Annotated[int, Limit(1, 4096)] | None = None
    """CPU cores for each rank (the decoding processes need them); None: what the cluster gives."""
    memory_gib: Annotated[int, Limit(1, 1 << 20)] | None = None
    """Memory on each node; None: what the cluster gives."""
    time_limit_minutes: Annotated[int, Limit(1, 60 * 24 * 365)] | None = None
    """Time limit of a job; a run that needs more is requeued and resumes. None: the partition's limit."""
    save_seconds: Annotated[int, Limit(1, 3600)] = 60
    """Seconds before the time limit at which the run is signalled to save (USR1)."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, as sbatch takes them, e.g. a100|h100."""

    def __post_init__(self) -> None:
        check_limits(self, "cluster")
        for name, allowed in (("partition", "_.,-"), ("account", "_.-"), ("qos", "_.-"), ("constraint", "_.,|&*:-")):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9{re.escape(allowed)}]*", value):
                raise ValueError(f"cluster.{name} is {value!r}: wanted letters, digits and {' '.join(allowed)}, no more")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"cluster.tasks_per_node is {self.tasks_per_node} with cluster.gpus_per_node {self.gpus_per_node}: each rank "
                "takes one GPU, so leave cluster.tasks_per_node out"
            )
        if self.time_limit_minutes is not None and self.save_seconds >= 60 * self.time_limit_minutes:
            raise ValueError(
                f"cluster.save_seconds ({self.save_seconds}) leaves nothing of cluster.time_limit_minutes "
                f"({self.time_limit_minutes}): the run would be signalled to save at once, every time"
            )

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Processes of a job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a family, ready to run."""

    name: StageName
    words: tuple[str, ...]
    """Command line after `python -m pipelines.pretrain`."""
    config: Config

    @property
    def run_dir(self) -> Path:
        """The run folder, absolute and without links: jobs are recognised by it."""
        return self.config.run_dir.resolve()

    @property
    def folder(self) -> Path:
        """Where the job's script, save file and output lie: RUN/slurm."""
        return self.run_dir / "slurm"

    def check_folders(self) -> None:
        """Raises: ValueError for a folder whose name Slurm's output patterns or its script's header cannot say."""
        for what, folder in (("the run folder", self.run_dir), ("this folder", Path.cwd())):
            bad = re.search(r"""[%"'\\\x00-\x1f\x7f]|\s$""", str(folder))
            if bad:
                raise ValueError(
                    f"{self.name}: {what} {str(folder)!r} has {bad.group()!r} in its name, which Slurm reads as something "
                    f"else: {'give another --run.dir' if folder == self.run_dir else 'submit from another one'}"
                )

    def output(self, job_id: str) -> Path:
        """What a job prints, over all its launches."""
        return self.folder / f"{job_id}_0_log.out"


@dataclass(frozen=True, slots=True)
class Training:
    """What submitit saves and each rank of the job calls, to become the training process."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, training_command(self.words))


def training_command(words: tuple[str, ...]) -> list[str]:
    """A rank's process."""
    return [sys.executable, "-m", "pipelines.pretrain", *words]


PYTHON = "run_and_leave"
"""How the batch script starts Python: in every task, and with a requeue after 85. A function of slurm/environment.sh."""


def _environment() -> list[str]:
    """The batch script before it starts Python: by default in the virtual environment of this process.

    Raises: ValueError if there is none, and in another folder than the repository's.
    """
    if not Path("slurm/environment.sh").is_file():
        raise ValueError(f"{Path.cwd()} is not the root of himix-megatron, in which jobs start: submit from there")
    if os.environ.get("HIMIX_CONTAINER"):
        return ["source slurm/environment.sh"]
    venv = os.environ.get("HIMIX_VENV") or sys.prefix
    if not (Path(venv) / "bin" / "activate").is_file():
        raise ValueError(f"{venv} is no virtual environment: run this with .venv/bin/python, or name one with HIMIX_VENV")
    return [f"export HIMIX_VENV={shlex.quote(venv)}", "source slurm/environment.sh"]


def sbatch_parameters(stage: Stage, cluster: Cluster, after: str | None) -> dict[str, Any]:
    """submitit's parameters of a stage's job, which starts when job `after` has ended well."""
    further = {
        "signal": f"USR1@{cluster.save_seconds}",
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "chdir": str(Path.cwd()),
    }
    if cluster.memory_gib is not None:
        further["mem"] = f"{cluster.memory_gib}G"
    return {
        "job_name": f"himix-{stage.config.recipe.replace(':', '.')}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.ranks_per_node,
        "gpus_per_node": cluster.gpus_per_node or None,
        "cpus_per_task": cluster.cpus_per_task,
        "time": cluster.time_limit_minutes,
        "dependency": None if after is None else f"afterok:{after}",
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,  # run_and_leave does
        "additional_parameters": further,
        "setup": _environment(),
    }
