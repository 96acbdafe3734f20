"""status.json says what a run is doing, whole at every moment, and a reader takes no file that it does not understand."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from himix_megatron.config import Config
from himix_megatron.monitoring.run_status import RunStatus, RunStatusWriter, followed_status, read_status, status_path

STATUS = RunStatus(
    recipe="tiny_align",
    state="starting",
    step=3,
    planned_steps=20,
    world_size=2,
    global_batch=16,
    started_at=1.0,
    updated_at=1.0,
)
POINTS = {"time/step_seconds": 2.0, "throughput/samples_per_second": 8.0, "throughput/text_tokens_per_second": 90.0}


def test_a_finished_run_says_so(watched_run: Config, run_dir: Path) -> None:
    found = read_status(run_dir)
    assert found is not None
    assert (found.recipe, found.state, found.exit_code, found.reason) == (watched_run.recipe, "finished", 0, None)
    assert (found.step, found.planned_steps, found.world_size, found.global_batch) == (40, 40, 2, 4)
    assert found.seconds_left == 0
    rates = (found.step_seconds, found.samples_per_second, found.text_tokens_per_second, found.tflops_per_second_per_rank)
    assert all(rate is not None and rate > 0 for rate in (found.loss, *rates))
    assert 0 < found.updated_at - found.started_at < 600
    assert not (run_dir / "status.json.partial").exists()


def test_a_run_without_a_status_has_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None


def test_states_are_written_at_once_and_steps_once_a_second(tmp_path: Path) -> None:
    writer = RunStatusWriter(tmp_path, STATUS, writes=True)
    writer.record_state("training", step=4)
    writer.record_step(5, math.nan)
    found = read_status(tmp_path)
    assert found is not None
    assert (found.state, found.step) == ("training", 4)
    assert writer.record_interval(10, POINTS) == 20.0
    writer.record_end(85)
    found = read_status(tmp_path)
    assert found == replace(writer.status)
    assert (found.state, found.exit_code, found.step, found.loss) == ("requeue", 85, 10, None)
    assert (found.seconds_left, found.samples_per_second, found.tflops_per_second_per_rank) == (20.0, 8.0, None)
    RunStatusWriter(tmp_path, STATUS, writes=True).record_end(3, "too many bad samples")
    found = read_status(tmp_path)
    assert found is not None
    assert (found.state, found.reason, found.exit_code) == ("stopped", "too many bad samples", 3)


def test_ranks_that_do_not_write_leave_no_file(tmp_path: Path) -> None:
    RunStatusWriter(tmp_path, STATUS, writes=False).record_end(0)
    assert read_status(tmp_path) is None


def test_an_error_is_recorded_and_goes_on(tmp_path: Path) -> None:
    writer = RunStatusWriter(tmp_path, STATUS, writes=True)
    with pytest.raises(RuntimeError), writer.failures():
        raise RuntimeError("a broken\nmachine")
    found = read_status(tmp_path)
    assert found is not None
    assert (found.state, found.exit_code, found.reason) == ("failed", 1, "RuntimeError: a broken machine")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is damaged"),
        ('{"version": 1', "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 1, "recipe": "small"}', "is damaged"),
        (json.dumps({"version": 1} | asdict(STATUS) | {"state": "resting"}), "is damaged"),
        (json.dumps({"version": 1} | asdict(STATUS) | {"loss": "low"}), 'loss is "low", wanted a number'),
        ("[" * 100_000, "too many lists"),
        (json.dumps({"version": 2}), "has version 2, and this code reads version 1"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    status_path(tmp_path).write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_status(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "status.json.partial").mkdir()
    RunStatusWriter(tmp_path, STATUS, writes=True).record_state("training")
    assert "could not be written" in caplog.text


def test_an_end_recorded_by_another_thread_stays(tmp_path: Path) -> None:
    """The watchdog ends a run while the main thread still takes steps: the file stays whole, and the end stands."""
    writer = RunStatusWriter(tmp_path, STATUS, writes=True)
    end = threading.Thread(target=writer.record_end, args=(1, "rank 1 died"))
    for step in range(400):
        writer.record_state("training", step=step)
        if step == 200:
            end.start()
        found = read_status(tmp_path)
        assert found is not None
    end.join()
    writer.record_state("training", step=999)
    with pytest.raises(RuntimeError), writer.failures():
        raise RuntimeError("gloo: connection closed by peer")  # what the main thread sees of it
    found = read_status(tmp_path)
    assert found is not None
    assert (found.state, found.reason, found.exit_code) == ("failed", "rank 1 died", 1)


def test_a_follower_waits_while_the_file_cannot_be_read(tmp_path: Path) -> None:
    status_path(tmp_path).write_text("")
    assert followed_status(tmp_path) is None
    with pytest.raises(ValueError, match="is damaged"):
        read_status(tmp_path)
