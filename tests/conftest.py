"""What all tests share: one thread per process; a GPU is for the tests that are marked as needing one; `--fast`.

Where there is none these skip. Where there is one they come first, and all others run on the CPU, as on a machine without one:
their ranks may be more than its GPUs, and they compare to the last bit.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from tests import support

# Before torch starts: several ranks share few cores, and sums must not depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


LEFT_OUT_OF_FAST = {
    *("campaigns", "checkpoint", "conversion", "costs", "distributed", "docs", "inference", "integration", "monitoring"),
    *("pipelines", "resilience", "slurm", "tools"),
    *("test_hostile.py", "test_preprocess.py", "test_preprocess_kills.py", "test_s3.py", "test_sources.py"),
    *("test_rehearsal.py", "test_second_sources.py", "test_training_attention.py", "test_triton_attention.py"),
}
"""Folders and files that `--fast` does not even import: nearly all of their tests start ranks, jobs, servers or commands."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fast`: what a contributor runs at every save."""
    parser.addoption(
        "--fast",
        action="store_true",
        help="only the quick tests of one process; tests/conftest.py lists what is left out",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tell the helpers that start such things to skip the test that calls them."""
    support.is_fast = config.getoption("--fast")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out whole folders and files in a fast run."""
    return True if config.getoption("--fast") and collection_path.name in LEFT_OUT_OF_FAST else None


def pytest_sessionstart() -> None:
    """Start the fork server that ranks come from, with what they need (there is one server a process, and the data room's
    tests would start it with less). It sees no GPU, and neither do they: a process that has asked for one cannot be forked."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.support.preload"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """All test modules and what they import stay until the end."""
    from himix_megatron.runtime.process import bulk_import

    with bulk_import():
        return (yield)


def needs_gpu(item: pytest.Item) -> bool:
    """Whether it is marked so."""
    return item.get_closest_marker("requires_gpu") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what is marked `requires_gpu`, and skip it where torch sees no CUDA device."""
    import torch

    if support.is_fast:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: not in a fast run"))
    if torch.cuda.is_available():
        # What follows may redirect this process to the CPU for good (himix_megatron/distributed/cpu_backend.py).
        items.sort(key=needs_gpu, reverse=True)
        return
    for item in filter(needs_gpu, items):
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Hide the GPUs from a test that is not marked, its fixtures and the processes that it starts."""
    import torch

    if needs_gpu(item) or not torch.cuda.is_available():
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        return (yield)


@pytest.fixture(autouse=True)
def _log_is_stopped() -> Iterator[None]:
    """No test leaves handlers to the next: their stream is the finished test's, closed."""
    from himix_megatron.runtime import log

    yield
    log.stop()


@pytest.fixture(scope="session")
def mixed_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard dataset of 40 samples with one image, two or none."""
    from tests.support.datasets import make_mixed_dataset

    return make_mixed_dataset(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="session")
def shapes_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with images of different sizes."""
    from tests.support.datasets import SHAPES, make_mixed_dataset

    return make_mixed_dataset(tmp_path_factory.mktemp("shapes"), sizes=SHAPES)
