"""TERM, USR1 and USR2: whatever a rank is doing, all save and leave with 85, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from himix_megatron.checkpoint.manifest import complete_checkpoints
from himix_megatron.monitoring.run_status import read_status
from tests.support.processes import PointHook, Ranks, reached, resilience_config
from tests.support.small_runs import history


def saved_steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in complete_checkpoints(run)]


def read_slowly(rank: int, point: str, count: int) -> None:
    if rank == 1 and point == "data/wait" and count == 4:
        reached("slow read")
        time.sleep(60)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=["data 2", "tensor 2"])
def test_a_rank_that_waits_for_data_stops_with_the_others(mixed_dataset: Path, tmp_path: Path, layout: dict[str, Any]) -> None:
    """The disk of rank 1 hangs, and rank 0 is asked: three steps are done, and none is lost."""
    with Ranks(resilience_config(mixed_dataset, tmp_path, **layout), 2, read_slowly) as ranks:
        ranks.wait_for("slow read")
        time.sleep(0.3)  # rank 0 is waiting for rank 1 by now
        asked_at = time.monotonic()
        ranks.send(0, signal.SIGUSR1)
        assert ranks.codes(timeout_seconds=20) == [85, 85]
        assert max(ranks.ended_at.values()) - asked_at <= 6
    assert saved_steps(tmp_path) == [3]


def stop_in_save(rank: int, point: str, count: int) -> None:
    if point == "step/begin":
        reached("step")
        time.sleep(0.2)
    if point == "save/begin":
        reached(f"save on {rank}")
        time.sleep(1)


def test_a_second_signal_does_not_break_the_save(mixed_dataset: Path, tmp_path: Path) -> None:
    config = resilience_config(mixed_dataset, tmp_path, steps=50, log={"ledger": True})
    with Ranks(config, 2, stop_in_save) as ranks:
        ranks.wait_for("step")
        ranks.send(1, signal.SIGUSR2)
        ranks.wait_for("save on 0")
        for rank in (0, 1):
            ranks.send(rank, signal.SIGTERM)
            ranks.send(rank, signal.SIGUSR1)
        assert ranks.codes() == [85, 85]
    (done,) = saved_steps(tmp_path)
    with Ranks(replace(config, train=replace(config.train, steps=done + 2)), 2) as ranks:
        assert ranks.codes() == [0, 0]
    assert len(history(tmp_path)["train/loss"]) == done + 2
    lines = [json.loads(line) for line in (tmp_path / "ledger" / "rank-000.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)  # none was done twice


def validate_slowly(rank: int, point: str, count: int) -> None:
    if point == "validation/step":
        reached("validation")
        time.sleep(0.5)


def test_a_signal_during_validation_ends_it(mixed_dataset: Path, tmp_path: Path) -> None:
    config = resilience_config(
        mixed_dataset,
        tmp_path,
        data={"validation_path": str(mixed_dataset)},
        log={"validation_interval_steps": 2, "validation_samples": 40},
        train={"global_batch_samples": 4},
    )
    with Ranks(config, 2, validate_slowly) as ranks:
        ranks.wait_for("validation")
        asked_at = time.monotonic()
        ranks.send(1, signal.SIGTERM)
        assert ranks.codes() == [85, 85]
        assert max(ranks.ended_at.values()) - asked_at <= 3  # of the 5 s that validation takes
    assert saved_steps(tmp_path) == [2]
    assert "validation/loss" not in history(tmp_path)


def load_slowly(rank: int, point: str, count: int) -> None:
    if rank == 1 and point == "start/load":
        reached("load")
        time.sleep(60)


def load_slowly_in_a_job(rank: int, point: str, count: int) -> None:
    os.environ["HIMIX_UNSAVED_CODE"] = "84"  # as slurm/environment.sh does
    load_slowly(rank, point, count)


@pytest.mark.parametrize(("plan", "code"), [(load_slowly, 85), (load_slowly_in_a_job, 84)], ids=["alone", "in a job"])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_before_the_first_step_leaves_nothing(
    mixed_dataset: Path, tmp_path: Path, asked: int, plan: PointHook, code: int
) -> None:
    with Ranks(resilience_config(mixed_dataset, tmp_path), 2, plan) as ranks:
        ranks.wait_for("load")
        asked_at = time.monotonic()
        ranks.send(asked, signal.SIGUSR1)
        assert ranks.codes() == [code, code]
        assert max(ranks.ended_at.values()) - asked_at <= 2
    assert saved_steps(tmp_path) == []
    assert not (tmp_path / "STOP").exists()
    status = read_status(tmp_path)
    assert status is not None
    assert (status.step, status.exit_code) == (0, code)


def test_a_signal_while_peers_are_waited_for_is_heard(mixed_dataset: Path, tmp_path: Path) -> None:
    """Rank 1 never comes, and rank 0 is inside torch's rendezvous."""
    with Ranks(resilience_config(mixed_dataset, tmp_path), 2, only=[0]) as ranks:
        rank_0 = psutil.Process(ranks.processes[0].pid)
        deadline = time.monotonic() + 60
        while not any(own.laddr.port == ranks.port for own in rank_0.net_connections("tcp")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        asked_at = time.monotonic()
        ranks.send(0, signal.SIGTERM)
        assert ranks.codes(timeout_seconds=10) == [85]
        assert ranks.ended_at[0] - asked_at <= 2
