"""What a run runs on: versions, kernels, ranks and the commit of the code, as rows of name and value."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from ..config import ParallelConfig
from ..distributed.topology import Topology

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "numpy", "himix-megatron")
ROOT = Path(__file__).parents[2]


def describe_environment(layout: ParallelConfig, topology: Topology, kernels: Iterable[str]) -> list[tuple[str, str]]:
    """What decides how a run goes, apart from its settings. `kernels`: a line for each choice of a kernel."""
    gpu = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else f"none; {os.cpu_count()} CPU cores"
    rows = [
        ("ranks", f"{topology.world_size}"),
        (
            "layout",
            f"tensor {layout.tensor}, pipeline {layout.pipeline} x {layout.virtual_pipeline}, data {topology.data_size}",
        ),
        ("GPU of rank 0", gpu),
        ("CUDA", torch.version.cuda or "none"),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        *((name, version(name)) for name in PACKAGES),
        ("code", code_version()),
        ("Slurm job", os.environ.get("SLURM_JOB_ID", "none")),
    ]
    return rows + [("kernels", line) for line in kernels]


def version(package: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def code_version() -> str:
    """The commit of this code, marked if files differ from it; unknown outside a git checkout."""
    if not (ROOT / ".git").exists():
        return "unknown: not a git checkout"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "unknown: git does not answer"
    return done.stdout.strip() or "unknown: git does not answer"
