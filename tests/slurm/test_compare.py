"""The arms of a comparison as an array of jobs: each job trains the arm of its number, and the report finds all of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from .cluster import Job, Slurm


@pytest.mark.campaign
def test_the_missing_arms_are_an_array_of_jobs(
    slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None
) -> None:
    words = [
        sys.executable, "-m", "pipelines.compare", "small", "--methods", "himix", "saisa", "--baseline", "himix", "--seeds",
        "1", "--points", "2", "--runs", tmp_path / "runs", "--results", tmp_path / "results", "--data.datasets", mixed_dataset,
        "--data.validation-path", mixed_dataset, "--train.steps", "4", "--train.global-batch-samples", "4",
        "--train.micro-batch-samples", "4", "--sizes", "64", "--vision.hidden-size", "32", "--vision.num-layers", "1",
    ]  # fmt: skip
    shown = slurm.run(*words, "--submit", "--sbatch=--time=10").stdout
    number = re.search(r"2 arms, job (\d+)", shown)
    assert number is not None, shown
    for task in ("0", "1"):
        job = Job(slurm, f"{number[1]}_{task}", tmp_path / "runs" / "small" / f"job-{task}.txt")
        assert job.wait(timeout_seconds=240) == "COMPLETED", job.text[-3000:]
    assert "all arms have finished" in slurm.run(*words, "--submit").stdout
    assert "report over 2 arms" in slurm.run(*words, "--report").stdout
