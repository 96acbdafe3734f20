"""Real jobs of two ranks on two nodes, and what happens to them: signals, preemption, kills. Steps are counted by the ledger.

Signalled: no step is lost. Not signalled (killed): at most those since the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from himix_megatron.checkpoint.manifest import complete_checkpoints
from tests.support import ROOT

from .cluster import Job, Slurm, processes_of, rank_process, step_now, steps_taken, wait_until

Train = Callable[..., Job]
KNOWN_SECONDS = 30
"""Until a failure must be known."""


def wait_for_step(run: Path, step: int, job: Job) -> None:
    """Until a job has taken a step."""
    wait_until(lambda: step_now(run) >= step, lambda: f"step {step} was not reached:\n{job.text[-3000:]}", 120)


def saved(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int(complete_checkpoints(run)[-1].name.removeprefix("step-"))


def test_a_job_trains_one_rank_per_gpu_on_two_nodes(train: Train, tmp_path: Path) -> None:
    job = train("--nodes=2", "--gpus-per-node=1", steps=20)
    assert job.wait() == "COMPLETED", job.text
    assert "2 ranks (tensor 1, pipeline 1 x 1, data 2)" in job.text
    assert steps_taken(tmp_path / "run") == list(range(1, 21))
    assert job.field("NodeList") == "n[1-2]"


@pytest.mark.parametrize(
    "how",
    [
        "scancel --signal=USR1",
        *(pytest.param(how, marks=pytest.mark.campaign) for how in ("scontrol requeue", "scancel --signal=USR2")),
    ],
)
def test_a_signalled_job_saves_is_requeued_and_loses_no_step(train: Train, slurm: Slurm, tmp_path: Path, how: str) -> None:
    job = train(steps=100)
    wait_for_step(tmp_path / "run", 5, job)
    slurm.run(*how.split(), job.id)
    assert job.wait(timeout_seconds=180) == "COMPLETED", job.text
    assert job.field("Restarts") == "1"
    assert steps_taken(tmp_path / "run") == list(range(1, 101))
    assert 5 <= min(int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(tmp_path / "run")) < 100


def test_a_preempted_job_saves_makes_room_and_loses_no_step(train: Train, slurm: Slurm, tmp_path: Path) -> None:
    job = train(steps=100)
    wait_for_step(tmp_path / "run", 5, job)
    urgent = slurm.submit(
        tmp_path / "urgent.out", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "scontrol show job -o"
    )
    assert urgent.wait() == "COMPLETED", urgent.text
    assert job.wait(timeout_seconds=180) == "COMPLETED", job.text
    assert job.field("Restarts") == "1"
    assert steps_taken(tmp_path / "run") == list(range(1, 101))


@pytest.mark.campaign
def test_a_job_that_meets_its_time_limit_saves_and_goes_on(train: Train, tmp_path: Path) -> None:
    """Slurm sends USR1 by itself; it may come up to a minute early, so the first attempts may not get far."""
    job = train("--time=1", "--signal=USR1@15", "--comment=many short attempts", steps=1000)
    assert job.wait(timeout_seconds=900) == "COMPLETED", job.text
    assert int(job.field("Restarts")) >= 1
    assert steps_taken(tmp_path / "run") == list(range(1, 1001))


def test_a_killed_rank_ends_the_job_and_costs_one_interval_at_most(train: Train, tmp_path: Path) -> None:
    run, interval = tmp_path / "run", ("--checkpoint.interval-steps", "20")
    job = train(steps=80, flags=interval)
    wait_for_step(run, 25, job)
    killed = time.monotonic()
    rank_process(job, 1).send_signal(signal.SIGKILL)
    assert job.wait() == "FAILED", job.text
    assert time.monotonic() - killed < KNOWN_SECONDS
    assert job.field("Restarts") == "0"  # a failure is not requeued
    assert not processes_of(job)
    done, kept = steps_taken(run)[-1], saved(run)
    again = train(steps=80, flags=interval)
    assert again.wait() == "COMPLETED", again.text
    assert steps_taken(run) == [*range(1, done + 1), *range(kept + 1, 81)]
    assert done - kept <= 20


@pytest.mark.campaign
def test_a_cancelled_job_saves_leaves_nothing_behind_and_stays_cancelled(train: Train, tmp_path: Path) -> None:
    job = train(steps=2000)
    wait_for_step(tmp_path / "run", 5, job)
    cancelled = time.monotonic()
    job.cancel()
    assert job.wait() == "CANCELLED", job.text
    wait_until(lambda: not processes_of(job), lambda: str(processes_of(job)), KNOWN_SECONDS)
    assert time.monotonic() - cancelled < KNOWN_SECONDS
    assert saved(tmp_path / "run") == steps_taken(tmp_path / "run")[-1]
    assert job.state == "CANCELLED"


@pytest.mark.campaign
def test_a_mistake_ends_the_job_with_one_line_and_is_not_requeued(train: Train, tmp_path: Path) -> None:
    job = train(flags=("--train.step", "3"))
    assert job.wait() == "FAILED"
    assert job.code == 2
    assert job.text.count("error: unknown setting --train.step: did you mean") == 1
    assert job.field("Restarts") == "0"
    assert not (tmp_path / "run").exists()


@pytest.mark.campaign
def test_loader_processes_do_not_die_of_the_signal_that_the_ranks_answer(train: Train, slurm: Slurm, tmp_path: Path) -> None:
    """Slurm signals every process of the step."""
    job = train(steps=100, flags=("--data.num-workers", "2"))
    wait_for_step(tmp_path / "run", 5, job)
    job.cancel("--signal=USR1")
    assert job.wait(timeout_seconds=180) == "COMPLETED", job.text
    assert steps_taken(tmp_path / "run") == list(range(1, 101))


@pytest.mark.campaign
def test_a_signal_before_python_listens_is_a_requeue(train: Train, tmp_path: Path) -> None:
    job = train(steps=20)
    wait_until(lambda: len(processes_of(job)) > 2, lambda: job.text, 60)
    job.cancel("--signal=USR1")
    assert job.wait() == "COMPLETED", job.text
    assert job.field("Restarts") == "1"
    assert steps_taken(tmp_path / "run") == list(range(1, 21))


@pytest.mark.campaign
def test_training_does_not_notice_that_the_controller_is_killed(train: Train, slurm: Slurm, tmp_path: Path) -> None:
    job = train(steps=100)
    wait_for_step(tmp_path / "run", 5, job)
    os.kill(int((slurm.folder / "slurmctld.pid").read_text()), signal.SIGKILL)
    before = step_now(tmp_path / "run")
    wait_for_step(tmp_path / "run", before + 10, job)
    slurm.dev("up")
    assert job.wait() == "COMPLETED", job.text
    assert job.field("Restarts") == "0"
    assert steps_taken(tmp_path / "run") == list(range(1, 101))


def on_second_node(job: Job) -> list[psutil.Process]:
    """A job's processes there, Slurm's own one for the step first."""
    ranks = [process for process in processes_of(job) if process.environ().get("SLURMD_NODENAME") == "n2"]
    parents = [process.parent() for process in ranks]
    return [*{parent for parent in parents if parent is not None and parent.name() == "slurmstepd"}, *ranks]


@pytest.mark.campaign
def test_a_killed_node_daemon_requeues_the_job_and_costs_one_interval_at_most(
    train: Train, slurm: Slurm, tmp_path: Path
) -> None:
    """Ranks go on until the controller misses the node; it comes back once the job waits for it."""
    run = tmp_path / "run"
    job = train(steps=1500, flags=("--checkpoint.interval-steps", "20"))
    wait_for_step(run, 25, job)
    os.kill(int((slurm.folder / "n2.pid").read_text()), signal.SIGKILL)
    wait_until(lambda: job.state == "PENDING", lambda: job.text, 90)
    reached = step_now(run)
    slurm.dev("up")
    wait_for_step(run, reached + 5, job)
    job.cancel()
    steps = steps_taken(run)
    assert sorted(set(steps)) == list(range(1, max(steps) + 1))
    assert len(steps) - max(steps) <= 20
    assert job.field("Restarts") == "1"


@pytest.mark.campaign
def test_a_node_without_power_is_waited_for_and_costs_one_interval_at_most(train: Train, slurm: Slurm, tmp_path: Path) -> None:
    """The node's daemon, Slurm's process of the step and the rank end at once. The job is not failed by the rank that is left:
    it waits until Slurm has noticed and requeues it."""
    run = tmp_path / "run"
    job = train(steps=100, flags=("--checkpoint.interval-steps", "20"))
    wait_for_step(run, 25, job)
    there = on_second_node(job)
    assert there[0].name() == "slurmstepd"
    os.kill(int((slurm.folder / "n2.pid").read_text()), signal.SIGKILL)
    for process in there:
        process.kill()
    try:
        # Whichever is first: the script, which waits then, or Slurm, which takes the job away from it.
        noticed = "a node of this job does not answer", "DUE TO NODE FAILURE"
        wait_until(lambda: any(word in job.text for word in noticed), lambda: f"{job.state}: {job.text}", KNOWN_SECONDS + 10)
        wait_until(lambda: job.state == "PENDING", lambda: f"{job.state}: {job.text}", 90)
    finally:
        slurm.dev("up")  # also for the tests after this one
    assert job.wait(timeout_seconds=240) == "COMPLETED", job.text
    assert job.field("Restarts") == "1"
    steps = steps_taken(run)
    assert sorted(set(steps)) == list(range(1, 101))
    assert len(steps) - 100 <= 20


def test_a_second_job_of_one_run_folder_is_refused_and_harms_nothing(train: Train, tmp_path: Path) -> None:
    job = train(steps=100)
    wait_for_step(tmp_path / "run", 1, job)
    os.kill(rank_process(job, 0).pid, signal.SIGSTOP)  # however slow the second one is
    second = train(steps=100)
    assert second.wait() == "FAILED"
    os.kill(rank_process(job, 0).pid, signal.SIGCONT)
    assert second.code == 2
    assert second.text.count("is in use by another run") == 1
    assert f"job {job.id}" in second.text
    assert job.wait() == "COMPLETED", job.text
    assert steps_taken(tmp_path / "run") == list(range(1, 101))


@pytest.mark.campaign
def test_three_starts_without_a_new_step_stop_the_run_with_the_reason(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rarely = ("--checkpoint.interval-steps", "400")  # the same each time: other settings would be another try
    for _ in range(3):
        job = train(steps=400, flags=rarely)
        job.wait_for("step 2/400")
        rank_process(job, 1).kill()
        assert job.wait() == "FAILED", job.text
    refuse_crash_loop = train(steps=400, flags=rarely)
    assert refuse_crash_loop.wait() == "FAILED"
    assert refuse_crash_loop.code == 3
    assert refuse_crash_loop.field("Restarts") == "0"
    assert "3 consecutive launches made no progress past step 0" in (run / "STOP").read_text()
    assert train(steps=400, flags=rarely).wait() == "FAILED"
    asked = train(steps=5, flags=("--run.ignore-stop-file",))
    assert asked.wait() == "COMPLETED", asked.text


@pytest.mark.campaign
def test_a_job_that_is_always_asked_to_stop_at_once_ends(train: Train, tmp_path: Path) -> None:
    """As with a --signal that comes earlier than the time limit allows: requeued for ever, no step would ever be taken."""
    python = tmp_path / "slow" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # Slurm looks at time limits every half minute: until then a small run would have begun.
    python.write_text(f'#!/bin/bash\nsleep 45\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = train("--time=1", "--signal=USR1@300", HIMIX_VENV=str(tmp_path / "slow"))
    assert job.wait(timeout_seconds=900) == "FAILED", job.text
    assert job.code == 3
    assert job.field("Restarts") == "5"
    assert "asked to stop before the first step, 6 times in a row" in job.text


@pytest.mark.campaign
def test_bare_sbatch_trains_tiny_align_on_two_nodes(slurm: Slurm, tmp_path: Path, ended_with_test: None) -> None:
    """In a checkout without runs and data: links to this one's code, so that runs/ and data/ are new."""
    for name in ("himix_megatron", "pipelines", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    job = slurm.submit(tmp_path / "bare.out", "--nodes=2", f"--chdir={tmp_path}", "slurm/pretrain_himix.sh")
    assert job.wait(timeout_seconds=500) == "COMPLETED", job.text
    assert "step 200/200" in job.text
    assert saved(tmp_path / "runs" / "tiny_align") == 200
