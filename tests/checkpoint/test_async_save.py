"""Saves beside training hold the state of their step, and one that fails leaves everything before it as it was."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.checkpoint.manifest import complete_checkpoints, verify_checkpoint
from himix_megatron.config import CheckpointConfig, Config
from tests.support.interrupted_saves import LAYOUTS, POINTS, at, saving_config
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, train


def saved_steps(run: Path) -> list[int]:
    found = complete_checkpoints(run)
    assert [problem for folder in found for problem in verify_checkpoint(folder)] == []
    return [int(folder.name.removeprefix("step-")) for folder in found]


@pytest.mark.parametrize("layout", ["data 2 distributed", "tensor 2", "pipeline 2"])
def test_saved_beside_training_it_is_the_state_of_its_step(mixed_dataset: Path, tmp_path: Path, layout: str) -> None:
    """The same bytes as when training waits, though the optimizer has stepped before they are written."""
    digests = {}
    for mode in ("sync", "async"):
        config = saving_config(
            mixed_dataset, tmp_path / mode, steps=4, layout=LAYOUTS[layout], mode=mode, keep_last=4, interval_steps=2
        )
        run_ranks(train_with_slow_writes, 2, config, start_gloo=False)
        assert saved_steps(tmp_path / mode) == [2, 4]
        manifests = [json.loads((f / "manifest.json").read_text()) for f in complete_checkpoints(tmp_path / mode)]
        digests[mode] = [
            {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".distcp")}
            for manifest in manifests
        ]
    assert len(digests["sync"][0]) == 2
    assert digests["sync"] == digests["async"]
    stalls = {mode: history(tmp_path / mode)["checkpoint/blocking_seconds"] for mode in digests}
    assert stalls["async"][0] < 1.2 <= stalls["sync"][0]


def train_with_slow_writes(config: Config) -> None:
    at("tensors", lambda _: time.sleep(1.2))  # a few steps of training
    train(config)


def test_a_save_waits_for_the_one_in_flight(mixed_dataset: Path, tmp_path: Path) -> None:
    config = saving_config(mixed_dataset, tmp_path, steps=4, keep_last=4)
    run_ranks(train_with_slow_writes, 1, config, start_gloo=False)
    assert saved_steps(tmp_path) == [1, 2, 3, 4]
    assert min(history(tmp_path)["checkpoint/blocking_seconds"][1:]) > 0.3


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_rank_that_cannot_save_fails_the_save_on_all_and_training_goes_on(
    mixed_dataset: Path, tmp_path: Path, mode: str
) -> None:
    """Every point fails once, on one rank or the other; every second save works."""
    config = saving_config(mixed_dataset, tmp_path, steps=2 * len(POINTS), mode=mode, keep_last=99, max_failures=1)
    run_ranks(train_failing_by_turns, 2, config, start_gloo=False)
    # From the rename on there is a checkpoint, although the save did not come to its end.
    worked = [2 * i + 1 for i, point in enumerate(POINTS) if point in ("tracker", "prune")]
    assert saved_steps(tmp_path) == sorted([*worked, *range(2, 2 * len(POINTS) + 1, 2)])
    log = (tmp_path / "log" / "rank-000.log").read_text()
    for number in range(len(POINTS)):
        assert f"step-{2 * number + 1:08d} was not saved (rank {number % 2}: " in log
    assert log.count("No space left on device): 1 of 1 failures in a row") == len(POINTS)


def train_failing_by_turns(config: Config) -> None:
    for number, point in enumerate(POINTS):
        # The saves that failed before it did not come to this point; training's own thread always comes to its two.
        missed = 0 if point in ("begin", "snapshot") else number

        def fail(times: int, first: int = 2 * number + 1 - missed) -> None:
            if times == first:
                raise OSError(errno.ENOSPC, "No space left on device")

        at(point, fail, rank=number % 2)
    train(config)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_too_many_failures_in_a_row_end_the_run(mixed_dataset: Path, tmp_path: Path, mode: str) -> None:
    config = saving_config(mixed_dataset, tmp_path, steps=9, mode=mode, max_failures=2)
    with pytest.raises(RuntimeError, match=r"3 saves in a row failed, more than checkpoint.max_failures 2; the last"):
        run_ranks(train_failing_from, 2, config, 2, start_gloo=False)
    assert saved_steps(tmp_path) == [1]


def test_the_last_save_must_not_fail(mixed_dataset: Path, tmp_path: Path) -> None:
    config = saving_config(mixed_dataset, tmp_path, steps=2)
    with pytest.raises(RuntimeError, match="step-00000002, the last save, failed: the run ends without it"):
        run_ranks(train_failing_from, 2, config, 2, start_gloo=False)
    assert saved_steps(tmp_path) == [1]


def train_failing_from(config: Config, save: int) -> None:
    def fail(times: int) -> None:
        if times >= save:
            raise OSError(errno.EIO, "Input/output error")

    at("sync", fail, rank=1)
    train(config)


def test_a_file_that_cannot_grow_fails_its_save_alone(mixed_dataset: Path, tmp_path: Path) -> None:
    """A real error of a real write, as with a full disk or a quota: rank 1 may not write large files in the second save."""
    config = saving_config(mixed_dataset, tmp_path, steps=3, layout={"tensor": 2}, keep_last=9)
    run_ranks(train_without_room, 2, config, start_gloo=False)
    assert saved_steps(tmp_path) == [1, 3]
    assert "step-00000002 was not saved (rank 1: " in (tmp_path / "log" / "rank-001.log").read_text()


def train_without_room(config: Config) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(times: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if times == 2 else hard, hard))

    at("tensors", limit, rank=1)
    train(config)


def test_a_save_that_hangs_ends_the_run_with_the_stacks(mixed_dataset: Path, tmp_path: Path) -> None:
    config = saving_config(mixed_dataset, tmp_path, steps=4, timeout_seconds=6.0, interval_steps=2)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"step-00000004 took longer than checkpoint.timeout_seconds \(6\): RUN/log has"):
        run_ranks(train_hanging, 2, config, start_gloo=False)
    assert time.monotonic() - begun < 60
    assert saved_steps(tmp_path) == [2]
    stacks = (tmp_path / "log" / "rank-001.log").read_text()
    assert "saving step-00000004 hangs" in stacks
    assert "in hang" in stacks


def train_hanging(config: Config) -> None:
    def hang(times: int) -> None:
        if times == 2:
            time.sleep(600)

    at("manifest", hang, rank=1)
    train(config)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_saves_until_there_is_room(mixed_dataset: Path, tmp_path: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    run_ranks(
        train_on_a_disk_that_fills, 2, saving_config(mixed_dataset, run, steps=4), small_disk / "filler", start_gloo=False
    )
    assert saved_steps(run) == [1, 4]


def test_a_disk_without_room_for_tensorboard_costs_its_points_only(
    mixed_dataset: Path, tmp_path: Path, small_disk: Path
) -> None:
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    subprocess.run(["mount", "--bind", str(small_disk), str(run / "tensorboard")], check=True)
    try:
        run_ranks(train, 1, saving_config(mixed_dataset, run, steps=4), start_gloo=False)
    finally:
        subprocess.run(["umount", "--lazy", str(run / "tensorboard")], check=True)
    assert 4 in saved_steps(run)
    assert "points are lost until its file can be written again" in (run / "log" / "rank-000.log").read_text()


def train_on_a_disk_that_fills(config: Config, filler: Path) -> None:
    def fill_or_empty(times: int) -> None:
        if times == 2:
            free = shutil.disk_usage(filler.parent).free
            filler.write_bytes(bytes(free - (256 << 10)))  # room for a line on the log, and not for a checkpoint
        if times == 4:
            filler.unlink()

    at("snapshot", fill_or_empty, rank=0)
    train(config)


def test_too_little_room_is_told_before_the_first_step(mixed_dataset: Path, tmp_path: Path) -> None:
    config = saving_config(mixed_dataset, tmp_path / "run", steps=2, keep_last=10**8)
    with pytest.raises(RuntimeError, match=r"StartError: .*run/checkpoints cannot take checkpoints: rank 0: .* will need"):
        run_ranks(train, 2, config, start_gloo=False)
    assert saved_steps(tmp_path / "run") == []
    with pytest.raises(RuntimeError, match=r"StartError: .* rank 1: .*the limit on a file's size \(ulimit -f\) is"):
        run_ranks(train_limited, 2, saving_config(mixed_dataset, tmp_path / "run", steps=2), start_gloo=False)


def train_limited(config: Config) -> None:
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    train(config)


def test_the_room_asked_for_is_what_a_checkpoint_takes(mixed_dataset: Path, tmp_path: Path) -> None:
    for name, layout in LAYOUTS.items():
        config = saving_config(mixed_dataset, tmp_path / name, steps=1, layout=layout)
        estimate = run_ranks(estimated, 2, config, start_gloo=False)[0]
        folder = complete_checkpoints(tmp_path / name)[-1]
        files = [*folder.iterdir(), *(tmp_path / name / "towers").iterdir()]
        assert estimate == pytest.approx(sum(path.stat().st_size for path in files), rel=0.25), name


def estimated(config: Config) -> int:
    from himix_megatron.checkpoint import checkpointer

    found: list[int] = []
    size_bytes = checkpointer.Checkpoints._checkpoint_bytes

    def noted(self: Any) -> int:
        found.append(size_bytes(self))
        return found[-1]

    checkpointer.Checkpoints._checkpoint_bytes = noted  # type: ignore[method-assign]
    train(config)
    return found[0]


def test_a_folder_that_cannot_be_written_is_one_line(mixed_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, where the run folder should be")
    config = saving_config(mixed_dataset, tmp_path / "run", steps=2)
    with pytest.raises(RuntimeError, match=r"ValueError: .*run cannot be written: \[Errno 20\] Not a directory"):
        run_ranks(train, 2, config, start_gloo=False)


def test_every_nth_is_kept_for_good(mixed_dataset: Path, tmp_path: Path) -> None:
    config = saving_config(mixed_dataset, tmp_path, steps=9, keep_last=1, keep_every=4)
    run_ranks(train, 1, config, start_gloo=False)
    assert saved_steps(tmp_path) == [4, 8, 9]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000009\n"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep_every": 0}, "checkpoint.keep_every is 0: wanted 1 or more"),
        ({"max_failures": -1}, "checkpoint.max_failures is -1: wanted 0 or more"),
        ({"timeout_seconds": 0.0}, "checkpoint.timeout_seconds is 0.0: wanted a finite number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CheckpointConfig(**wrong)
