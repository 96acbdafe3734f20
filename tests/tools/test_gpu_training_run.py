"""The check of real training runs reads what a run logs, and says why one ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import small_config, train
from tools.gpu_check.training_run import _LINE, COMMON, REPOSITORY, TINY, logged_run, mean_of, predicted_gib


def test_the_first_steps_do_not_count_but_for_the_peak() -> None:
    def line(step: int, seconds: float, peak_gib: float) -> dict[str, float]:
        return {"step": step, "seconds": seconds, "data_wait": 0.1, "text_tokens": 5.0, "mfu": 40.0, "peak_gib": peak_gib}

    found = mean_of([line(1, 9.0, 3.0), line(10, 2.0, 2.0), line(15, 1.0, 2.0), line(20, 2.0, 2.5)])
    assert (found.seconds, found.peak_gib, found.mfu) == (1.5, 3.0, 0.4)


def test_a_run_that_ends_too_early_is_told_with_its_own_words() -> None:
    with pytest.raises(RuntimeError, match=r"before step 5: .*unknown setting --data\.tokeniser"):
        logged_run(["--data.tokeniser", "bytes"], 5)


def test_the_line_of_a_run_is_understood(mixed_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    from tests.distributed import run_ranks

    config = small_config(mixed_dataset, tmp_path, parts=("vision_kv",), steps=2)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, peak_tflops=1.0))
    run_ranks(train, 1, config, start_gloo=False)
    text = next((tmp_path / "log").iterdir()).read_text()
    found = [match.groupdict() for match in map(_LINE.search, text.splitlines()) if match]
    assert [line["step"] for line in found] == ["1", "2"]
    assert all(float(line["seconds"]) > 0 for line in found)


def test_the_flags_are_those_of_the_recipe_and_memory_is_predicted(mixed_dataset: Path) -> None:
    from pipelines.cli import parse

    config = parse(["qwen2_0_5b_instruct", *COMMON.split(), *TINY.split(), "--data.path", str(mixed_dataset)])
    assert config.vision.path is None
    assert config.checkpoint.initial is None
    assert 0 < predicted_gib(config) < 1


def test_the_save_benchmark_runs_with_tiny_sizes() -> None:
    command = [sys.executable, "-m", "tools.bench_checkpoint", "--tiny", "--layers", "1", "--repetitions", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("stall of a save beside training, over one that is waited for") == 2
    assert "async, first of all" in done.stdout
