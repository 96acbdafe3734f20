"""The tests' own way to run a function on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT
from tests.support.ranks import run_ranks


def _fail_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("planted")
    torch.distributed.barrier()


def test_run_ranks_raises_with_the_failing_ranks_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*KeyError: 'planted'"):
        run_ranks(_fail_on_rank_one, 2)


def seen() -> tuple[str | None, bool]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available()


def test_ranks_see_no_gpu() -> None:
    """There may be fewer than ranks, and the server that they are forked from has asked torch for them."""
    assert run_ranks(seen, 2) == [("", False)] * 2


GPU_MACHINE = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
"""
TESTS = """
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def fixture():
    return torch.cuda.is_available()


def test_unmarked(fixture):
    assert not fixture
    assert not torch.cuda.is_available()
    assert subprocess.check_output([sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]) == b"\\n"
    torch.cuda.is_redirected = True


@pytest.mark.requires_gpu
def test_marked():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert not hasattr(torch.cuda, "is_redirected")
"""


def test_on_a_gpu_machine_marked_tests_see_the_gpu_and_come_first(tmp_path: Path) -> None:
    """As if there were one: conftest.py's hooks in a run of their own."""
    (tmp_path / "tests" / "support").mkdir(parents=True)
    (tmp_path / "tests" / "__init__.py").write_text("")
    (tmp_path / "tests" / "support" / "__init__.py").write_text((ROOT / "tests" / "support" / "__init__.py").read_text())
    (tmp_path / "tests" / "support" / "preload.py").write_text("")
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "tests" / "test_both.py").write_text(TESTS)
    (tmp_path / "gpu_machine.py").write_text(GPU_MACHINE)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-p", "gpu_machine", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
