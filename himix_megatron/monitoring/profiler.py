"""Traces of chosen steps: what the CPU and the GPU did, kernel by kernel. Off unless --log.profile-steps names steps.

Flows in: the step's number; out: RUN/profile/step-00000010-rank-000.json.gz, which ui.perfetto.dev and chrome://tracing open.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import Config
from ..distributed.topology import Topology

logger = logging.getLogger(__name__)


@contextmanager
def profiled(config: Config, topology: Topology, step: int) -> Iterator[None]:
    """Trace what happens within, if this step is to be traced, on one rank of each pipeline stage."""
    if step not in config.log.profile_steps or topology.data_rank or topology.tensor_rank:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if topology.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        yield
    path = config.run_dir / "profile" / f"step-{step:08d}-rank-{topology.rank:03d}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    logger.info("trace of step %d: %s (open it at ui.perfetto.dev)", step, path)
