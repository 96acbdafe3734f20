"""Chains of jobs on a real Slurm without an accounting database: submitted, watched, cancelled, failing, preempted."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from slurm.follow import StageWatch
from slurm.scheduler import Job, parse_jobs

from . import cluster
from .cluster import ROOT, Slurm, rank_process, step_now, steps_taken, wait_until

# Recorded from Slurm 22.05, cut to the fields around those that are read.
SHOWN = (
    "JobId=7 JobName=x JobState=FAILED Reason=y UserId=a(1) Priority=1 JobState=PENDING Reason=Dependency Requeue=1 Restarts=2 "
    "ExitCode=0:0 Partition=main Command=/a/JobState=x.sh WorkDir=/a StdErr=/a b/7_0_log.out StdIn=/dev/null "
    "StdOut=/a b/$(x);7_0_log.out Power= \n"
    "JobId=8 JobName=x JobState=FAILED Reason=RaisedSignal:9(Killed) Restarts=0 ExitCode=0:9 Command=(null) WorkDir=/a Power=\n"
    "JobId=9 JobName=x JobState=COMPLETED Reason=None Restarts=0 ExitCode=3:0 Command=y StdOut=/a/9.out\n"
    "No jobs in the system\n"
)


def test_jobs_are_read_from_what_scontrol_shows() -> None:
    seven, eight, nine = parse_jobs(SHOWN)
    assert (seven.job_id, seven.state, seven.reason, seven.restarts) == ("7", "PENDING", "Dependency", 2)
    assert seven.output == "/a b/$(x);7_0_log.out"
    assert (eight.state, eight.exit_code, eight.output, eight.has_ended) == ("FAILED", 137, "", True)
    assert (nine.exit_code, nine.is_good, nine.output) == (3, True, "/a/9.out")


def test_progress_is_what_status_json_says(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(name="align", run_dir=tmp_path)
    watched = StageWatch(stage, "7")
    watched.job = Job("7", "RUNNING", "None", 0, 0, "")
    assert watched.line() == "align     job 7  running"
    status: dict[str, Any] = {
        "recipe": "x",
        "state": "starting",
        "step": 0,
        "planned_steps": 90,
        "world_size": 2,
        "global_batch": 4,
    }
    status |= {"version": 1, "started_at": 1.0, "updated_at": 2.0}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert watched.line() == "align     job 7  running"
    status |= {"state": "training", "step": 9, "loss": 9.5, "seconds_left": 4143.2}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert watched.line() == "align     job 7  running  step 9/90  loss 9.500000  remaining 1:09:03"
    watched.job = Job("7", "GONE", "None", 0, 0, "")
    assert watched.exit_code() == 1
    (tmp_path / "status.json").write_text(json.dumps(status | {"state": "finished", "step": 90, "loss": None}))
    assert (watched.line(), watched.exit_code()) == ("align     job 7  gone  step 90/90", 0)


def test_a_run_that_is_followed_moves_no_cursor(tmp_path: Path) -> None:
    (tmp_path / "STOP").write_bytes(b"loss \x1b[2Jspike\r\nafter \xff")
    stage: Any = SimpleNamespace(name="align", run_dir=tmp_path)
    watched = StageWatch(stage, "7")
    watched.job = Job("7", "FAILED\x1b[1m", "None", 3, 0, "")
    assert not re.search("[\x00-\x1f]", watched.line())
    shown = watched.outcome()
    assert "loss" in shown
    assert re.search("[\x00-\x1f\x80-\xff]", shown) is None, shown


class Chain:
    """`python -m slurm.submit tiny` with small runs in one folder."""

    def __init__(self, slurm: Slurm, data: Path, folder: Path):
        self.slurm, self.data, self.folder = slurm, data, folder

    def line(self, *words: str, steps: int = 12, stages: Sequence[str] = ("align", "instruct")) -> list[str]:
        folders = [word for stage in stages for word in (f"--{stage}.run.dir", str(self.folder / stage))]
        return [
            sys.executable, "-m", "slurm.submit", "tiny", "--data.datasets", str(self.data), "--train.steps", str(steps),
            "--train.global-batch-samples", "4", "--train.micro-batch-samples", "2", "--log.interval-steps", "1",
            "--log.ledger", "--checkpoint.interval-steps", "100000", "--parallel.timeout-seconds", "60",
            "--stages", *stages, *folders, *words,
        ]  # fmt: skip

    def run(self, *words: str, **how: Any) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in self.slurm.environment.items() if name != "HIMIX_VENV"}
        line = self.line(*words, **how)
        return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)

    def submit(self, *words: str, steps: int = 12) -> list[str]:
        """Returns: the ids of the jobs."""
        done = self.run(*words, steps=steps)
        assert done.returncode == 0, done.stderr
        return re.findall(r": job (\d+)", done.stdout)

    def states(self) -> dict[str, str]:
        """By job id, of those in the queue."""
        return dict(line.split() for line in self.slurm.run("squeue", "-h", "-o", "%i %T").stdout.splitlines())

    def wait_for_step(self, stage: str, step: int) -> None:
        wait_until(lambda: step_now(self.folder / stage) >= step, lambda: f"{stage} is at {step_now(self.folder / stage)}", 180)


@pytest.fixture
def chain(slurm: Slurm, mixed_dataset: Path, tmp_path: Path) -> Iterator[Chain]:
    """Run folders whose names a shell would trip over."""
    yield Chain(slurm, mixed_dataset, tmp_path / "a b;$(touch PWNED)&")
    slurm.run("scancel", "--me", check=False)
    assert not list(ROOT.glob("PWNED*"))


def test_a_watched_chain_runs_instruct_after_align_and_tells_of_both(chain: Chain) -> None:
    align, instruct = chain.submit("--cluster.nodes", "2")
    again = chain.run("--cluster.nodes", "2")
    assert again.returncode == 2, again
    assert f"error: job {align} (" in again.stderr
    assert again.stderr.count("\n") == 1
    done = chain.run("--cluster.nodes", "2", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout.splitlines()
    for name, job in (("align", align), ("instruct", instruct)):
        assert any(re.search(rf"{name} +job {job}  completed  step 12/12  loss \d+\.\d+$", line) for line in told), told
        assert f"{name} has finished: {chain.folder / name}" in told
        assert steps_taken(chain.folder / name) == list(range(1, 13))
    assert any(re.search(rf"instruct +job {instruct}  pending \(Dependency\)", line) for line in told), told
    assert f"weights from {chain.folder}/align" in (chain.folder / "instruct" / "log" / "rank-000.log").read_text()


def test_align_that_fails_takes_instruct_out_of_the_queue(chain: Chain, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    chain.data.parent.joinpath("copy").mkdir(exist_ok=True)
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", chain.data, data], check=True)
    chain.data = data
    # The data goes away between submission and start, when no check can help any more.
    chain.slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        _, instruct = chain.submit()
        data.rename(moved)
    finally:
        chain.slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    watched = subprocess.run(
        [sys.executable, "-c", WATCH_ONLY, *chain.line("--watch")[3:]],
        cwd=ROOT, env=chain.slurm.environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert watched.returncode == 2, watched.stdout + watched.stderr
    assert "align failed: failed, exit code 2; see " in watched.stdout
    assert re.search(r"instruct was cancelled|instruct failed: ", watched.stdout), watched.stdout
    assert instruct not in chain.states()
    assert not (chain.folder / "instruct" / "log").exists()


WATCH_ONLY = "import slurm.submit, pipelines.cli; pipelines.cli.run_main(slurm.submit.main)"


def test_cancel_takes_out_both_jobs_of_the_chain_and_no_other(chain: Chain, tmp_path: Path) -> None:
    other = chain.slurm.submit(tmp_path / "other.out", "--wrap", "sleep 300")
    align, instruct = chain.submit(steps=100_000)
    wait_until(lambda: chain.states().get(align) == "RUNNING", lambda: str(chain.states()), 60)
    done = chain.run("--cancel", steps=100_000)
    assert done.returncode == 0, done.stderr
    assert f"instruct: job {instruct} (pending) cancelled" in done.stdout
    assert f"align: job {align} (running) cancelled" in done.stdout
    assert chain.states() == {other.id: "RUNNING"}
    assert chain.run("--cancel").stdout.startswith("no job in the queue has ")


def test_on_a_terminal_a_stages_line_is_rewritten_in_place(capfd: pytest.CaptureFixture[str]) -> None:
    script = (
        "from slurm.follow import _Screen\n"
        "screen = _Screen()\n"
        "for step in (1, 2):\n"
        "    screen.show([('running', f'align step {step}'), ('pending', 'instruct')])\n"
    )
    reader, writer = pty.openpty()
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=writer, check=True)
    os.close(writer)
    time.sleep(0.1)
    shown = os.read(reader, 4096).decode()
    os.close(reader)
    assert shown.replace("\r", "") == ("\x1b[2Kalign step 1\n\x1b[2Kinstruct\n\x1b[2F\x1b[2Kalign step 2\n\x1b[2Kinstruct\n")


@pytest.mark.campaign
@pytest.mark.parametrize("how", ["preempted", "requeued", "USR1", "USR2"])
def test_a_submitted_job_that_is_interrupted_goes_on_and_loses_no_step(chain: Chain, tmp_path: Path, how: str) -> None:
    align, _ = chain.submit("--cluster.nodes", "2", steps=300)
    chain.wait_for_step("align", 20)
    if how == "preempted":
        chain.slurm.submit(tmp_path / "urgent.out", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 3")
    elif how == "requeued":
        chain.slurm.run("scontrol", "requeue", align)
    else:
        chain.slurm.run("scancel", f"--signal={how}", align)
    done = chain.run("--cluster.nodes", "2", "--watch", steps=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requeued once" in done.stdout
    for name in ("align", "instruct"):
        assert steps_taken(chain.folder / name) == list(range(1, 301)), how


@pytest.mark.campaign
def test_a_submitted_job_goes_on_beyond_its_time_limit(chain: Chain) -> None:
    """A minute each, of which the last 20 s are for saving: more steps than one attempt can take."""
    words = ("--cluster.time-limit-minutes", "1", "--cluster.save-seconds", "20", "--watch")
    done = chain.run(*words, steps=4000, stages=["align"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requeued" in done.stdout
    assert steps_taken(chain.folder / "align") == list(range(1, 4001))


@pytest.mark.campaign
def test_a_rank_that_is_killed_ends_its_job_and_the_chain(chain: Chain) -> None:
    align, instruct = chain.submit("--cluster.nodes", "2", steps=100_000)
    chain.wait_for_step("align", 5)
    rank_process(cluster.Job(chain.slurm, align, chain.folder / "align"), 1).send_signal(signal.SIGKILL)
    done = chain.run("--cluster.nodes", "2", "--watch", steps=100_000)
    assert done.returncode not in (0, 2, 85), done.stdout + done.stderr
    assert "align failed" in done.stdout
    assert not {align, instruct} & set(chain.states())


@pytest.mark.campaign
def test_watching_outlasts_a_controller_that_is_restarted(chain: Chain) -> None:
    chain.submit("--cluster.nodes", "2", steps=400)
    chain.wait_for_step("align", 5)
    line = chain.line("--cluster.nodes", "2", "--watch", steps=400)
    watching = subprocess.Popen(line, cwd=ROOT, env=chain.slurm.environment, stdout=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    patience = threading.Timer(150, watching.kill)
    patience.start()
    told = read_until(watching.stdout, " running")
    os.kill(int((chain.slurm.folder / "slurmctld.pid").read_text()), 9)
    told += read_until(watching.stdout, "unknown (Slurm does not answer)")
    patience.cancel()
    chain.slurm.dev("up")
    rest, _ = watching.communicate(timeout=400)
    assert watching.returncode == 0, told + rest
    assert steps_taken(chain.folder / "instruct") == list(range(1, 401))


def read_until(told: IO[str], words: str) -> str:
    """The lines up to the first with these words."""
    lines = []
    while not lines or words not in lines[-1]:
        lines.append(told.readline())
        assert lines[-1], "".join(lines)
    return "".join(lines)
