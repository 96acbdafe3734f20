"""Rates are means over what came after warm-up; what is missing is a dash and a note, and an unfinished run has a reason."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from himix_megatron.config import to_json
from pipelines.cli import run_main
from tests.support.small_runs import small_config
from tools.scaling_report import __main__ as scaling_report
from tools.scaling_report.run_rates import read_run

RATE = "throughput/text_tokens_per_second"


def make_run(
    folder: Path,
    starts: list[dict[int, tuple[float, float]]],
    *,
    ranks: int = 2,
    steps: int = 10,
    per_rank: str = "rank",
    **tags: float,
) -> Path:
    """A run folder with one event file a start: step -> (step seconds, tokens a second), and constants by tag."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(small_config(Path("data"), folder, parts=("language",), steps=steps)))
    for number, points in enumerate(starts):
        with SummaryWriter(str(folder / "tensorboard"), filename_suffix=f".{number}") as writer:
            for step, (seconds, rate) in points.items():
                writer.add_scalar("time/step_seconds", seconds, step)
                writer.add_scalar(RATE, rate, step)
                writer.add_scalar(f"{RATE}_per_{per_rank}", rate / ranks, step)
                for tag, value in tags.items():
                    writer.add_scalar(tag.replace("__", "/"), value, step)
        if number + 1 < len(starts):
            time.sleep(1.1)  # event files are named by the second
    return folder


def write_status(folder: Path, state: str, **changes: object) -> None:
    """As a run of 2 ranks leaves it at step 7 of 10."""
    status = {
        "version": 1,
        "recipe": "small",
        "state": state,
        "step": 7,
        "planned_steps": 10,
        "world_size": 2,
        "global_batch": 8,
    }
    (folder / "status.json").write_text(json.dumps(status | {"started_at": 0.0, "updated_at": time.time() - 5} | changes))


def test_warm_up_is_left_out_and_rates_are_weighted_by_time(tmp_path: Path) -> None:
    # Steps 1 to 3 are warm-up; the rest: one step of 1 s at 100 tokens/s, six of 2 s at 50, at intervals.
    points = {1: (9.0, 1.0), 2: (9.0, 1.0), 3: (9.0, 1.0), 4: (1.0, 100.0), 10: (2.0, 50.0)}
    run = read_run(make_run(tmp_path / "run", [points], compute__model_mfu=0.25), warmup_steps=3)
    assert run.measured_steps == 7
    assert run.means["text_tokens_per_second"] == pytest.approx((100 * 1 + 50 * 12) / 13)
    assert run.step_seconds == 2.0
    assert run.spread == pytest.approx((1.6, 2.0))
    assert (run.num_gpus, run.global_batch, run.state) == (2, 8, "finished")
    assert run.means["mfu"] == pytest.approx(0.25)
    assert any("means over up to 6 steps" in note for note in run.notes)


def test_an_interval_that_reaches_into_the_warm_up_is_left_out(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", [{1: (9.0, 1.0), 10: (9.0, 1.0), 20: (1.0, 7.0)}], steps=20), warmup_steps=3)
    assert (run.measured_steps, run.means["text_tokens_per_second"]) == (10, 7.0)


def test_a_later_start_replaces_what_it_did_again_and_has_a_warm_up_of_its_own(tmp_path: Path) -> None:
    first = dict.fromkeys(range(1, 8), (1.0, 10.0))  # killed after step 7, saved at 5
    second = dict.fromkeys(range(6, 11), (2.0, 20.0))
    run = read_run(make_run(tmp_path / "run", [first, second]), warmup_steps=2)
    # Steps 3 to 5 of the first start, 8 to 10 of the second.
    assert run.measured_steps == 6
    assert run.means["text_tokens_per_second"] == pytest.approx((3 * 10 + 6 * 20) / 9)


def test_a_run_on_another_number_of_ranks_counts_its_last_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [dict.fromkeys(range(6, 11), (1.0, 20.0))])
    with SummaryWriter(str(folder / "tensorboard"), filename_suffix=".before") as writer:
        for step in range(1, 6):
            for tag, value in (("time/step_seconds", 1.0), (RATE, 10.0), (f"{RATE}_per_rank", 2.5)):
                writer.add_scalar(tag, value, step)
    first = next((folder / "tensorboard").glob("*.before"))
    first.rename(first.with_name("events.out.tfevents.1.before"))  # event files are named by the second
    run = read_run(folder, warmup_steps=1)
    assert (run.num_gpus, run.means["text_tokens_per_second"]) == (2, 20.0)
    assert "was run on 4, then 2 ranks: the last start alone is counted" in run.notes


def test_an_unfinished_run_says_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [dict.fromkeys(range(1, 8), (1.0, 10.0))])
    write_status(folder, "training")
    assert read_run(folder, 3).state == "killed, or still running: status.json is 5 s old at step 7 of 10"
    assert read_run(folder, 3, {"state": "running"}).state.endswith(" at step 7 of 10")
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    write_status(folder, "requeue", exit_code=85)
    assert read_run(folder, 3).state == "saved at step 7 of 10, and not continued"
    write_status(folder, "failed", exit_code=1, reason="RuntimeError: Connection closed by peer")
    failed = "failed: RuntimeError: Connection closed by peer at step 7 of 10"
    assert read_run(folder, 3).state == failed
    assert read_run(folder, 3, {"state": "failed: rank 0 left with exit code 1"}).state == failed, "status.json says more"
    assert read_run(folder, 3, {"state": "killed: rank 1 got SIGKILL"}).state == "killed: rank 1 got SIGKILL at step 7 of 10"
    write_status(folder, "starting")
    assert read_run(folder, 3).state == "saved at step 7 of 10, and not continued", "the error of an earlier start is over"
    (folder / "STOP").write_text("too many bad samples\n")
    assert read_run(folder, 3).state == "stopped on purpose: too many bad samples"


def test_a_run_of_an_earlier_version_is_read_as_far_as_its_files_tell(tmp_path: Path) -> None:
    """No status.json, fields and tags by their earlier names."""
    folder = make_run(tmp_path / "run", [dict.fromkeys(range(1, 8), (1.0, 10.0))], per_rank="gpu")
    settings = json.loads((folder / "config.json").read_text())
    del settings["version"]
    settings["data"]["path"] = settings["data"].pop("datasets")
    (folder / "config.json").write_text(json.dumps(settings))
    run = read_run(folder, 3)
    assert (run.num_gpus, run.global_batch, run.planned_steps, run.per_gpu) == (2, 8, 10, 5.0)
    assert run.state == "not finished, and it has no status.json that says why at step 7 of 10"
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert read_run(folder, 3).state == "saved at step 7 of 10, and not continued"


def test_a_torn_event_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [dict.fromkeys(range(1, 11), (1.0, 10.0))])
    file = next((folder / "tensorboard").iterdir())
    os.truncate(file, file.stat().st_size - 100)
    run = read_run(folder, 3)
    assert 5 <= run.measured_steps <= 7
    assert run.means["text_tokens_per_second"] == 10.0
    file.write_bytes(b"\xff" * 2000)
    run = read_run(folder, 3)
    assert run.means == {}
    assert any("holds no scalars that can be read" in note for note in run.notes)
    (folder / "status.json").write_text('{"version": 9}')
    run = read_run(folder, 3)
    assert run.state == "never began: it wrote no status.json that can be read"
    assert any("has version 9, and this code reads version 1" in note for note in run.notes)


def test_missing_tags_are_dashes_with_a_note_and_loose_runs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = dict.fromkeys(range(1, 11), (1.0, 10.0))
    folders = [
        make_run(tmp_path / "a", [points], ranks=1, compute__model_mfu=0.5),
        make_run(tmp_path / "b", [dict.fromkeys(points, (1.0, 18.0))], ranks=2),
        make_run(tmp_path / "c", [{}], ranks=4),
    ]
    settings = json.loads((folders[1] / "config.json").read_text())
    settings["model"]["num_layers"] = 8
    (folders[1] / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.argv", ["scaling_report", *map(str, folders), "--out", str(tmp_path / "out")])
    scaling_report.main()
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit() or line.endswith("no status.json")]
    assert rows[0][-4:] == ["1.000", "0.500", "-", "finished"]
    assert rows[1][-4:] == ["0.900", "-", "-", "finished"]
    assert rows[2][:11] == ["-", "8", "0", *"--------"], rows[2]
    assert "the runs differ in model.num_layers: 4, 8" in shown
    assert "compute/model_mfu was not written by b, which takes a GPU whose peak is known" in shown
    assert "c has not finished: never began" in shown
    assert (tmp_path / "out" / "scaling_report" / "report.md").read_text().startswith("# runs\n")


def test_what_is_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling_report", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        run_main(scaling_report.main)
    assert stopped.value.code == 2
    assert "is neither a run folder nor a series, and holds none" in capsys.readouterr().err
