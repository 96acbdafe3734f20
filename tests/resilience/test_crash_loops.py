"""Starts that come to nothing end, and the time of all starts is accounted for."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from himix_megatron.checkpoint.run_lock import acquire
from himix_megatron.monitoring.run_status import read_status
from himix_megatron.resilience.goodput import CAUSES, account
from himix_megatron.resilience.journal import Journal
from tests.support.processes import Ranks, resilience_config
from tests.support.small_runs import history


def die_in_the_first_step(rank: int, point: str, count: int) -> None:
    if point == "step/begin":
        os.kill(os.getpid(), signal.SIGKILL)


def test_three_starts_without_a_new_step_stop_the_run(mixed_dataset: Path, tmp_path: Path) -> None:
    config = resilience_config(mixed_dataset, tmp_path, steps=2)
    for _ in range(3):
        with Ranks(config, 1, die_in_the_first_step) as ranks:
            assert ranks.codes() == [-signal.SIGKILL]
    beside = acquire(tmp_path)  # as if the third were training after all
    with Ranks(config, 1) as ranks:
        assert ranks.codes() == [1]  # the folder is in use, which the command says in one line
    assert not (tmp_path / "STOP").exists()
    beside.end()
    with Ranks(config, 1) as ranks:
        assert ranks.codes() == [3]
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code) == ("stopped", 3)
    assert (tmp_path / "STOP").read_text().startswith("3 consecutive launches made no progress past step 0")
    with Ranks(replace(config, run=replace(config.run, ignore_stop_file=True)), 1) as ranks:
        assert ranks.codes() == [0]
    with Ranks(config, 1) as ranks:
        assert ranks.codes() == [0]  # it has ended: nothing is left to do


def test_other_settings_are_another_try(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.open(writes=True)
    for settings in ("a", "b", "b"):
        journal.record("start", 5, began=0.0, settings=settings, after_stop=False)
    assert Journal(tmp_path).starts_without_progress(5, "b") == 2
    assert Journal(tmp_path).starts_without_progress(5, "a") == 0
    assert Journal(tmp_path).starts_without_progress(6, "b") == 0


def test_a_line_cut_short_spoils_no_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.open(writes=True)
    journal.record("save", 1, health={})
    journal.record("save", 2, health={})
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-9])
    journal = Journal(tmp_path)
    assert [event["step"] for event in journal.events] == [1]
    journal.open(writes=True)
    journal.record("save", 3, health={})
    assert [event["step"] for event in Journal(tmp_path).events] == [1, 3]


def test_a_journal_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    journal.open(writes=True)
    journal.record("save", 1, health={})
    journal.path.rename(tmp_path / "kept")
    journal.path.mkdir()
    journal.record("save", 2, health={"skipped": [2]})
    assert "journal.jsonl: a line could not be written" in caplog.text
    assert journal.loss_guard_state_at(2) == {"skipped": [2]}
    journal.path.rmdir()
    (tmp_path / "kept").rename(journal.path)
    journal.record("save", 3, health={})
    assert [event["step"] for event in Journal(tmp_path).events] == [1, 3]


def die_in_step_5(rank: int, point: str, count: int) -> None:
    time.sleep(0.1)
    if point == "step/begin" and count == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def work_slowly(rank: int, point: str, count: int) -> None:
    time.sleep(0.1)


def test_the_time_of_all_starts_adds_up(mixed_dataset: Path, tmp_path: Path) -> None:
    config = resilience_config(
        mixed_dataset,
        tmp_path,
        data={"validation_path": str(mixed_dataset)},
        checkpoint={"interval_steps": 3},
        log={"validation_interval_steps": 100, "validation_samples": 8},
    )
    began = time.time()
    with Ranks(config, 1, die_in_step_5_noting) as ranks:
        assert ranks.codes() == [-signal.SIGKILL]
    time.sleep(2)
    with Ranks(config, 1, work_slowly) as ranks:
        assert ranks.codes() == [0]
    elapsed = time.time() - began
    events = Journal(tmp_path).events
    total = account([*events, {"event": "start", "step": 6, "began": time.time()}])
    assert sum(total.values()) == pytest.approx(events[-1]["time"] - events[0]["began"], rel=0.01)
    assert sum(total.values()) == pytest.approx(elapsed, abs=3.0)  # starting and ending processes
    assert all(total[cause] > 0 for cause in CAUSES)
    assert total["recovery"] > 1.9  # when a process began is known to a few ticks of the clock only
    points = history(tmp_path)
    for cause in CAUSES:
        if cause not in ("validation", "save"):  # these come after the last report
            assert points[f"goodput/{cause}_seconds"][-1] == pytest.approx(total[cause], abs=1.0)
    assert 0 < points["goodput/step_fraction"][-1] < 1


def die_in_step_5_noting(rank: int, point: str, count: int) -> None:
    """As `die_in_step_5`, with an account after each step, where a real run writes one every minute."""
    from himix_megatron.resilience import goodput

    goodput._NOTE_SECONDS = 0.0
    die_in_step_5(rank, point, count)


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "start"}',
        '{"event": "start", "step": 1, "began": "now", "settings": "a", "after_stop": false}',
        '{"event": "rollback", "step": 1, "place": {"day": 1}}',
        '{"event": "save", "step": 1, "health": {"losses": 3}}',
        '{"event": "end", "step": 1}',
        '{"event": ["start"], "step": 1}',
        '{"event": "alive", "step": 1, "seconds": 3}',
        "[" * 100_000,
        "[]",
        "\udcff",
    ],
)
def test_a_line_without_its_facts_is_passed_over_with_a_warning(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path)
    journal.open(writes=True)
    journal.record("start", 1, began=1.0, settings="a", after_stop=False)
    with journal.path.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    journal.record("start", 1, began=2.0, settings="a", after_stop=False)
    found = Journal(tmp_path)
    assert found.starts_without_progress(1, "a") == 2
    assert (found.rollback_data_offsets(), found.loss_guard_state_at(1)) == ({}, {})
    account(found.events)
    assert "passed over 1 lines: line 2" in caplog.text


def test_a_journal_that_is_no_file_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "journal.jsonl")
    journal = Journal(tmp_path)
    journal.open(writes=True)
    journal.record("save", 1, health={})
    assert "journal.jsonl is a FIFO: wanted a regular file" in caplog.text
    assert "a line could not be written" in caplog.text
