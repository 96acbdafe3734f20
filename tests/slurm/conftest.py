"""The private cluster that the tests in this folder share, and jobs that train in seconds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

from .cluster import PRETRAIN, Job, Slurm

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes of 4 CPUs and 2 (counted) GPUs, partitions `main` and `urgent`; gone after the last test."""
    missing = [
        name
        for name in NEEDED
        if shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin") is None
    ]
    if missing:
        pytest.skip(f"Slurm is not installed: {', '.join(missing)} not found (tools/dev_slurm.py says how to install it)")
    folder = Path(tempfile.mkdtemp(prefix="himix-slurm-"))
    command = [sys.executable, "-m", "tools.dev_slurm"]
    done = subprocess.run([*command, "up", "--dir", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        assert done.returncode == 0, done.stderr
        yield Slurm(folder)
    finally:
        subprocess.run([*command, "down", "--dir", folder], cwd=ROOT, check=True)


@pytest.fixture
def ended_with_test(slurm: Slurm) -> Iterator[None]:
    """No job outlives the test that submitted it."""
    yield
    slurm.run("scancel", "--me", check=False)


@pytest.fixture
def train(slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None) -> Callable[..., Job]:
    """Submit a small training over two nodes, one rank each: `train(*sbatch_options, run=, steps=, flags=)`."""

    def submit(*options: str, run: Path = tmp_path / "run", steps: int = 400, flags: tuple[str, ...] = (), **extra: str) -> Job:
        arguments = [
            "tiny_instruct", "--run.dir", run, "--data.datasets", mixed_dataset, "--train.steps", steps,
            "--train.global-batch-samples", 4, "--train.micro-batch-samples", 2, "--checkpoint.interval-steps", 100,
            "--log.interval-steps", 1, "--log.ledger", "--parallel.timeout-seconds", 120, *flags,
        ]  # fmt: skip
        layout = () if any(option.startswith(("--nodes", "--ntasks")) for option in options) else ("--nodes=2",)
        name = f"{run.name}-{len(list(tmp_path.glob('*.out')))}.out"
        return slurm.submit(tmp_path / name, *layout, *options, PRETRAIN, *map(str, arguments), **extra)

    return submit
