"""The private cluster: comes up beside others, comes up again, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tools.dev_slurm import checked, environment_of, program

from .cluster import ROOT, Slurm, wait_until


@pytest.fixture
def second(slurm: Slurm) -> Iterator[Slurm]:
    """Another cluster, beside the session's."""
    other = Slurm(Path(tempfile.mkdtemp(prefix="himix-slurm-")))
    other.dev("up")
    yield other
    other.dev("down")


def of_cluster(slurm: Slurm) -> list[psutil.Process]:
    """Everything that runs with this cluster's slurm.conf in its environment."""
    conf = str(slurm.folder / "slurm.conf")
    return [process for process in psutil.process_iter() if environment_of(process).get("SLURM_CONF") == conf]


def test_two_clusters_do_not_meet_and_down_leaves_nothing_of_one(slurm: Slurm, second: Slurm, tmp_path: Path) -> None:
    """Not even a process that has left its job's session."""
    job = second.submit(tmp_path / "out", "--nodes=2", "--wrap", "setsid sleep 333 & srun sleep 333")
    wait_until(
        lambda: sum(process.name() == "sleep" for process in of_cluster(second)) == 3, lambda: str(of_cluster(second)), 30
    )
    assert job.id not in slurm.run("squeue", "--noheader", "--format=%A %u %k %j").stdout.split()
    assert f"export SLURM_CONF={second.folder / 'slurm.conf'}" in second.dev("status")
    second.dev("down")
    assert not of_cluster(second)
    assert not second.folder.exists()
    assert "idle" in slurm.dev("status")


def test_up_again_starts_only_what_does_not_run(slurm: Slurm) -> None:
    def pids() -> list[str]:
        return [line for line in slurm.dev("status").splitlines() if ": pid " in line]

    before = pids()
    assert len(before) == 4
    slurm.dev("up")
    assert pids() == before


def test_no_cluster_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.dev_slurm"]
    done = subprocess.run([*command, "status", "--dir", tmp_path / "x"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no cluster runs in" in done.stdout
    assert subprocess.run([*command, "down", "--dir", tmp_path / "x"], cwd=ROOT, check=False).returncode == 0


def test_mistakes_are_told_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, said in {
        "/x/a b": "slurm.conf takes letters, digits",
        "/x/$(touch pwned)": "slurm.conf takes letters, digits",
        "/" + "x" * 100: "a socket's path allows",
        str(tmp_path): "holds something else",
    }.items():
        with pytest.raises(ValueError, match="--dir") as mistake:
            checked(Path(folder))
        assert said in str(mistake.value)
    with pytest.raises(ValueError, match=r"slurmctl-none is not installed \(Debian: apt-get install slurmctld"):
        program("slurmctl-none")


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to become another user")
def test_a_plain_user_may_have_one(slurm: Slurm) -> None:
    packages = str(Path(psutil.__file__).parents[1])
    python = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-B"]
    environment = slurm.environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{packages}", "HOME": "/"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)

    if run(*python, "-c", "import tools.dev_slurm").returncode:
        pytest.skip("no Python here that another user may run, with these packages")
    folder = Path(tempfile.mkdtemp(prefix="himix-slurm-"))
    os.chown(folder, 65534, 65534)
    try:
        up = run(*python, "-m", "tools.dev_slurm", "up", "--dir", str(folder))
        assert up.returncode == 0, up.stderr
        environment["SLURM_CONF"] = str(folder / "slurm.conf")
        assert run(*python[:4], "srun", "--nodes=2", "id", "-u").stdout.split() == ["65534", "65534"]
    finally:
        assert run(*python, "-m", "tools.dev_slurm", "down", "--dir", str(folder)).returncode == 0
    assert not folder.exists()
