"""On two nodes: the doctor measures the network between them, and a scaling series is submitted with its nodes computed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from .cluster import Job, Slurm


def test_the_doctor_measures_between_nodes_and_sees_one_folder(slurm: Slurm, tmp_path: Path) -> None:
    doctor = [sys.executable, "-m", "tools.doctor", "--folder", tmp_path]
    done = slurm.run("srun", "--nodes=2", "--ntasks=2", *doctor, check=False, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"ok +network +1 pairs of 2 nodes by TCP: .*between n1 \(rank 0\) and n2 \(rank 1\)", done.stdout)
    for wanted in (r"ok +versions ", r"ok +shared folder ", r"ok +all-reduce +gloo, 2 ranks", r"ok +slurm "):
        assert re.search(wanted, done.stdout), done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.campaign
def test_a_series_is_submitted_once_with_its_nodes_computed(
    slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None
) -> None:
    series = [
        sys.executable, "-m", "pipelines.scaling", "tiny_align", "--world-sizes", "2", "4", "--runs", tmp_path, "--submit",
        "--gpus-per-node", "2", "--sbatch=--time=10", "--train.steps", "3", "--data.datasets", mixed_dataset,
        "--train.global-batch-samples", "4", "--train.micro-batch-samples", "2",
    ]  # fmt: skip
    shown = slurm.run(*map(str, series)).stdout
    assert "2 ranks, 4 samples a step: 1 node x 2 GPUs, job" in shown
    assert "4 ranks, 8 samples a step: 2 nodes x 2 GPUs, job" in shown
    runs = json.loads((tmp_path / "tiny_align-weak" / "series.json").read_text())["runs"]
    jobs = {
        size: Job(slurm, run["job"], tmp_path / "tiny_align-weak" / f"output-{int(size):03d}.txt") for size, run in runs.items()
    }
    # A job that waits has "2-2".
    assert {size: job.field("NumNodes")[0] for size, job in jobs.items()} == {"2": "1", "4": "2"}
    assert jobs["4"].field("TimeLimit") == "00:10:00"
    assert "waits or runs" in slurm.run(*map(str, series)).stdout
    for job in jobs.values():
        assert job.wait() == "COMPLETED", job.text[-3000:]
    assert slurm.run(*map(str, series)).stdout.count("has finished before") == 2
    report = slurm.run(sys.executable, "-m", "tools.scaling_report", tmp_path, "--warmup-steps", "1").stdout
    assert report.count("finished") >= 2
    assert re.search(r"^ +4 +8 +2 .* finished$", report, re.MULTILINE), report
