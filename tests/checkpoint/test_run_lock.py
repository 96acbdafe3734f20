"""One writer for a run folder: a second run is refused, a dead one does not block, and a stale one cannot publish."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.checkpoint import run_lock
from himix_megatron.checkpoint.manifest import complete_checkpoints
from himix_megatron.checkpoint.run_lock import LockOwner, acquire
from himix_megatron.config import Config
from tests.support.interrupted_saves import POINTS, at, saving_config
from tests.support.ranks import run_ranks


def owned_by(run: Path, **differing: Any) -> Path:
    """An attempt's folder whose owner is like this process but for some fields. Returns: its `owner.json`."""
    folder = run / "checkpoints" / "attempt-000004"
    folder.mkdir(parents=True)
    (folder / "owner.json").write_text(json.dumps(asdict(replace(LockOwner.here(), **differing))))
    return folder / "owner.json"


def test_each_start_takes_the_next_attempt_and_the_older_one_s_folder_away(tmp_path: Path) -> None:
    first = acquire(tmp_path)
    (first.folder / "step-00000001").mkdir()
    second = acquire(tmp_path)
    assert (first.number, second.number) == (1, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["attempt-000002"]
    with pytest.raises(run_lock.StaleLockError, match=r"another launch has taken over .*: lock generation 1 ends"):
        first.check()
    second.check()
    second.end()


@pytest.mark.parametrize(
    ("owner", "job", "number"),
    [
        ({"pid": 2**22 + 1}, {}, 5),
        ({"started": "1"}, {}, 5),
        ({"boot": "another"}, {}, 5),
        ({"host": "elsewhere", "job": "77", "restarts": 0}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, 5),
    ],
    ids=["process gone", "its number is another's", "machine restarted", "requeued by Slurm"],
)
def test_a_dead_owner_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: dict[str, Any], job: dict[str, str], number: int
) -> None:
    owned_by(tmp_path, **owner)
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    taken = acquire(tmp_path)
    taken.end()
    assert taken.number == number
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("content", [None, "[" * 100_000, "[]", '{"host": 5}', '{"pid": 1, "more": 1}'])
def test_an_owner_that_cannot_be_read_counts_by_its_time_stamp(tmp_path: Path, content: str | None) -> None:
    path = owned_by(tmp_path)
    if content is None:
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(content)
    os.utime(path, (1, 1))
    taken = acquire(tmp_path)
    taken.end()
    assert taken.number == 5


def test_an_owner_elsewhere_is_watched(tmp_path: Path) -> None:
    """It is alive while it touches its file, and dead when it has not for a while."""
    file = owned_by(tmp_path, host="elsewhere", pid=17, job="88")
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.3):
            os.utime(file)

    heart = threading.Thread(target=touch)
    heart.start()
    with pytest.raises(ValueError, match=r"is in use by another run \(process 17 on elsewhere, job 88\): wait until"):
        acquire(tmp_path)
    stop.set()
    heart.join()
    begun = time.monotonic()
    acquire(tmp_path).end()
    assert 5 < time.monotonic() - begun < 16
    os.utime(file.parents[1] / "attempt-000005" / "ended")
    begun = time.monotonic()
    acquire(tmp_path).end()  # ended in order: nobody is waited for
    assert time.monotonic() - begun < 1


def test_of_many_starts_at_once_one_wins(tmp_path: Path) -> None:
    outcomes = run_ranks(try_to_take, 6, tmp_path, start_gloo=False)
    assert sorted(outcome is None for outcome in outcomes) == [False] * 5 + [True]
    assert all("is in use by another run" in outcome for outcome in outcomes if outcome)


def try_to_take(run: Path) -> str | None:
    try:
        acquire(run)
    except ValueError as error:
        return str(error)
    time.sleep(3)  # alive while the others look
    return None


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_stale_attempt_changes_nothing_wherever_it_is(mixed_dataset: Path, tmp_path: Path, mode: str) -> None:
    """At each point of its save another start takes over and saves; then the older one goes on."""
    for point in POINTS:
        config = saving_config(mixed_dataset, tmp_path / point, steps=3, mode=mode, keep_last=1)
        before, after, error = run_ranks(overtaken, 1, config, point, start_gloo=False)[0]
        assert "another launch has taken over" in error, (point, error)
        assert after == before, point


def overtaken(config: Config, point: str) -> tuple[Any, Any, str]:
    """Train; at a point of the second save another attempt takes the folder and puts a checkpoint there. Returns: what was in
    the folder then, what is in it when this run has ended, and how it ended."""
    from himix_megatron.training.loop import pretrain

    home, seen = config.run_dir / "checkpoints", []

    def take_over(times: int) -> None:
        if times == 2:
            other = acquire(config.run_dir)
            newest = complete_checkpoints(config.run_dir)[-1]
            published = other.folder / "step-00000009"
            published.mkdir()
            (published / "manifest.json").write_bytes((newest / "manifest.json").read_bytes())
            published.rename(home / "step-00000009")
            (home / "latest").write_text("step-00000009\n")
            seen.append(listing(home))

    at(point, take_over)
    try:
        pretrain(config)
        error = ""
    except RuntimeError as failure:
        error = str(failure)
    return seen[0], listing(home), error


def listing(home: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder but the attempts', with its identity and time."""
    paths = [path for path in home.rglob("*") if not path.relative_to(home).parts[0].startswith("attempt-")]
    return {str(path.relative_to(home)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_a_second_run_is_refused_and_takes_over_when_the_first_is_killed(mixed_dataset: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "pipelines.pretrain", "tiny_instruct", "--data.datasets", str(mixed_dataset)),
        *("--run.dir", str(tmp_path / "run"), "--train.steps", "100000", "--train.global-batch-samples", "8"),
        *("--train.micro-batch-samples", "2", "--data.num-workers", "0", "--checkpoint.interval-steps", "1"),
        *("--log.interval-steps", "1"),
    ]
    log = tmp_path / "run" / "log" / "rank-000.log"
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(log, "saved ")
        second = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert second.returncode == 2
        said = [line for line in second.stderr.splitlines() if "cpp_extension" not in line]  # torch for CUDA, without a GPU
        assert len(said) == 1
        assert f"is in use by another run (process {first.pid} on " in said[0]
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    died, before = time.monotonic(), log.read_text().count(" step ")
    third = subprocess.Popen([*command, "--log.interval-steps", "1"], stderr=subprocess.DEVNULL)
    try:
        wait_for(log, "restored ")
        deadline = time.monotonic() + 60
        while log.read_text().count(" step ") == before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        print(f"from death to first new step: {time.monotonic() - died:.1f} s")
        third.send_signal(signal.SIGUSR1)
        assert third.wait(60) == 85
    finally:
        third.kill()
        third.wait()
    assert (tmp_path / "run" / "checkpoints" / "attempt-000002" / "ended").exists()


def wait_for(file: Path, text: str) -> None:
    deadline = time.monotonic() + 100
    while not (file.is_file() and text in file.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


@pytest.mark.parametrize("place", ["checkpoints", "log/rank-000.log", "status.json"])
def test_a_run_writes_through_no_link_in_its_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{place} is a symbolic link: links below .*/run are not followed"):
        acquire(tmp_path / "run")
    assert not any((tmp_path / "elsewhere").iterdir())
