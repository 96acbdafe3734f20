"""Traces of chosen steps (--log.profile-steps): what the CPU and the GPU did, kernel by kernel.

Flows in: the step's number; out: RUN/profile/step-00000010-rank-000.json.gz, for ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..distributed.topology import Topology

logger = logging.getLogger(__name__)


@contextmanager
def profiled(run_dir: Path, topology: Topology, *, enabled: bool, step: int) -> Iterator[None]:
    """Trace what happens within, if `enabled`, on one rank of each pipeline stage."""
    if not enabled or topology.data_rank or topology.tensor_rank:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if topology.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        yield
    path = run_dir / "profile" / f"step-{step:08d}-rank-{topology.rank:03d}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    logger.info("trace of step %d: %s (open it at ui.perfetto.dev)", step, path)
