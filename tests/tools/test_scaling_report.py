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
    folder: Path, starts: list[dict[int, tuple[float, float]]], *, ranks: int = 2, steps: int = 10, **tags: float
) -> Path:
    """A run folder with one event file a start: step -> (step seconds, tokens a second), and constants by tag."""
    (folder / "log").mkdir(parents=True)
    (folder / "config.json").write_text(to_json(small_config(Path("data"), folder, parts=("language",), steps=steps)))
    lines = []
    for number, points in enumerate(starts):
        with SummaryWriter(str(folder / "tensorboard"), filename_suffix=f".{number}") as writer:
            for step, (seconds, rate) in points.items():
                writer.add_scalar("time/step_seconds", seconds, step)
                writer.add_scalar(RATE, rate, step)
                for tag, value in tags.items():
                    writer.add_scalar(tag.replace("__", "/"), value, step)
                lines.append(
                    f"2026-01-01 00:00:00,000 [0/{ranks}] INFO himix_megatron.monitoring.metrics: step {step}/{steps}  loss 1.0"
                )
        if number + 1 < len(starts):
            time.sleep(1.1)  # event files are named by the second
    (folder / "log" / "rank-000.log").write_text("".join(f"{line}\n" for line in lines))
    return folder


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
    folder = make_run(tmp_path / "run", [dict.fromkeys(range(1, 6), (1.0, 10.0)), dict.fromkeys(range(6, 11), (1.0, 20.0))])
    log = folder / "log" / "rank-000.log"
    log.write_text("2026-01-01 00:00:00,000 [0/4] INFO himix_megatron.training.loop: before\n" + log.read_text())
    run = read_run(folder, warmup_steps=1)
    assert (run.num_gpus, run.means["text_tokens_per_second"]) == (2, 20.0)
    assert "was run on 4, then 2 ranks: the last start alone is counted" in run.notes


UNFINISHED = {"points": [dict.fromkeys(range(1, 8), (1.0, 10.0))]}
TRACEBACK = """\
2026-01-01 00:00:0{rank},000 [{rank}/2] ERROR himix_megatron.runtime.log: this rank failed
Traceback (most recent call last):
  File "x.py", line 1, in f
RuntimeError: {words}
"""


def test_an_unfinished_run_says_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", UNFINISHED["points"])
    log = folder / "log" / "rank-000.log"
    assert read_run(folder, 3).state.startswith("killed, or still running: no word for ")
    assert read_run(folder, 3, {"state": "running"}).state.endswith(" at step 7 of 10")
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert read_run(folder, 3).state == "saved at step 7 of 10, and not continued"
    log.write_text(log.read_text() + TRACEBACK.format(rank=0, words="Connection closed by peer"))
    assert read_run(folder, 3).state == "failed: rank 0: RuntimeError: Connection closed by peer at step 7 of 10"
    (folder / "log" / "rank-001.log").write_text("")
    assert read_run(folder, 3).state.startswith("killed: rank 1 ended without a word (then rank 0: RuntimeError: Connection")
    (folder / "log" / "rank-001.log").write_text(TRACEBACK.format(rank=1, words="other"))
    assert read_run(folder, 3).state.startswith("failed: rank 0: ")
    assert read_run(folder, 3, {"state": "killed: rank 1 got SIGKILL"}).state == "killed: rank 1 got SIGKILL at step 7 of 10"
    verdict = "2026-01-01 00:00:09,000 [0/2] ERROR himix_megatron.resilience.watchdog: rank 1 died; shutting down this rank\n"
    log.write_text(log.read_text() + verdict)
    assert read_run(folder, 3).state == "killed: rank 1 died at step 7 of 10"
    log.write_text(
        log.read_text() + "2026-01-01 00:01:00,000 [0/2] INFO himix_megatron.training.loop: small: 2 ranks (tensor 1, ...\n"
    )
    (folder / "log" / "rank-001.log").unlink()
    assert read_run(folder, 3).state == "saved at step 7 of 10, and not continued", "errors of an earlier start are over"
    (folder / "STOP").write_text("too many bad samples\n")
    assert read_run(folder, 3).state == "stopped on purpose: too many bad samples"


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
    rows = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit() or line.endswith("no log")]
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
