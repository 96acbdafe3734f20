"""What all tests share: one thread per process, and tests for a GPU skip where there is none."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

import pytest

# Before torch starts: several ranks share few cores, and sums must not depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


def pytest_sessionstart() -> None:
    """Start the fork server that ranks come from, with what they need (there is one server a process, and the data room's
    tests would start it with less)."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preload"])
    forkserver.ensure_running()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `requires_gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("requires_gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


@pytest.fixture(scope="session")
def mixed_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard dataset of 40 samples with one image, two or none."""
    from tests.datasets import make_mixed_dataset

    return make_mixed_dataset(tmp_path_factory.mktemp("mixed"))
