"""Preprocessing on a Ray cluster inside a job: the bytes of a local run, and nothing of Ray left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from himix_megatron.data.shards.storage import LocalFolder
from pipelines.launchers.ray_cluster import code_when_asked
from pipelines.preprocess import Settings, preprocess

from .cluster import Job, Slurm, processes_of, wait_until

SCRIPT = "slurm/preprocess_ray.sh"


def submit(slurm: Slurm, data: Path, out: Path, *options: str) -> Job:
    source = data.parent
    flags = ("--source", "llava", "--annotations", source / "mixed.json", "--images", source / "images", "--out", out)
    return slurm.submit(out.with_suffix(".out"), *options, SCRIPT, *flags, "--samples-per-shard", "5")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ray_processes(job: Job) -> list[psutil.Process]:
    return [process for process in processes_of(job) if "ray" in " ".join(process.cmdline())]


@pytest.mark.campaign
def test_two_nodes_write_the_bytes_of_a_local_run_and_leave_no_ray(
    slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None
) -> None:
    """Two jobs at once, that share both nodes; one is cancelled once its Ray runs, and the other does not notice."""
    temporary = Path(tempfile.mkdtemp(prefix="job-"))  # a short path: sockets lie in it
    job = submit(slurm, mixed_dataset, tmp_path / "slurm", "--nodes=2", f"--export=ALL,TMPDIR={temporary}")
    other = submit(slurm, mixed_dataset, tmp_path / "cancelled", "--nodes=1")
    source = mixed_dataset.parent
    settings = Settings(
        annotations=source / "mixed.json", images=source / "images", out=tmp_path / "local", engine="local", num_workers=1,
        samples_per_shard=5,
    )  # fmt: skip
    preprocess(settings)
    wait_until(lambda: any(process.name() == "raylet" for process in ray_processes(other)), lambda: other.text, 120)
    other.cancel()
    assert other.wait() == "CANCELLED", other.text
    wait_until(lambda: not processes_of(other), lambda: str(processes_of(other)), 30)

    assert job.wait() == "COMPLETED", job.text
    assert "Ray runs on 2 nodes" in job.text
    assert files(tmp_path / "slurm") == files(tmp_path / "local")
    assert not processes_of(job)
    temporary.rmdir()  # it is empty


@pytest.mark.campaign
def test_a_signalled_job_continues_with_the_shards_that_it_has(
    slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None
) -> None:
    job = submit(slurm, mixed_dataset, tmp_path / "out", "--nodes=2")
    job.wait_for("Ray runs on 2 nodes")
    job.cancel("--signal=USR1")
    assert job.wait(timeout_seconds=240) == "COMPLETED", job.text
    assert job.field("Restarts") == "1"
    assert not processes_of(job)


def test_a_job_that_finishes_no_shard_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIMIX_UNSAVED_CODE", "84")
    assert code_when_asked(LocalFolder(tmp_path), before=[]) == 84
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "a-000000.json").touch()
    assert code_when_asked(LocalFolder(tmp_path), before=[]) == 85
    assert code_when_asked(LocalFolder(tmp_path), before=["a-000000"]) == 84


@pytest.mark.campaign
def test_a_killed_ray_daemon_is_an_error_or_harmless_and_leaves_nothing(
    slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None
) -> None:
    job = submit(slurm, mixed_dataset, tmp_path / "out", "--nodes=2")
    job.wait_for("Ray runs on 2 nodes")
    raylets = [process for process in ray_processes(job) if process.name() == "raylet"]
    os.kill(next(one.pid for one in raylets if one.environ().get("SLURM_PROCID") == "1"), 9)
    assert job.wait(timeout_seconds=240) in ("COMPLETED", "FAILED"), job.text
    wait_until(lambda: not processes_of(job), lambda: str(processes_of(job)), 30)


@pytest.mark.campaign
def test_a_stranger_without_the_token_is_not_served(
    slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None
) -> None:
    job = submit(slurm, mixed_dataset, tmp_path / "out", "--nodes=1", "--hold")
    slurm.run("scontrol", "release", job.id)
    job.wait_for("Ray runs on 1 nodes")
    address = job.text.split("nodes, at ")[1].split()[0]
    script = f"import ray; ray.init(address={address!r}); print('served', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as stranger:
        with contextlib.suppress(subprocess.TimeoutExpired):
            stranger.wait(30)
        stranger.kill()  # where Ray goes on trying
        said = stranger.communicate()[0]
    assert "served" not in said
    job.cancel()


@pytest.mark.campaign
def test_a_mistake_is_one_line_and_exit_code_2(
    slurm: Slurm, mixed_dataset: Path, tmp_path: Path, ended_with_test: None
) -> None:
    job = slurm.submit(
        tmp_path / "job.out", "--nodes=2", SCRIPT, "--source", "llava", "--out", str(tmp_path / "out; touch pwned")
    )
    assert job.wait() == "FAILED"
    assert job.code == 2
    assert job.text.count("error: --annotations must be given: --source llava reads --annotations and --images") == 1
