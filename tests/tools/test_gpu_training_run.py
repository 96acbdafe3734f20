"""The check of real training runs reads what a run logs, and says why one ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small_runs import small_config, train
from tools.bench import checkpoint
from tools.gpu_check.training_run import _LINE, COMMON, TINY, logged, predicted_gib


def test_the_line_of_a_run_is_understood(mixed_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    from tests.support.ranks import run_ranks

    config = small_config(mixed_dataset, tmp_path, parts=("vision_kv",), steps=2)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, peak_tflops=1.0))
    run_ranks(train, 1, config, start_gloo=False)
    text = next((tmp_path / "log").iterdir()).read_text()
    [first] = [match for match in map(_LINE.search, text.splitlines()) if match and match["step"] == "1"]
    line = first[0]
    assert float(first["seconds"]) > 0
    # The first steps do not count but for the peak.
    others = [("1", "9.9"), ("15", "0.5"), ("20", "0.1")]
    said = [
        line.replace("step 1/", f"step {step}/").replace(f"peak {first['peak_gib']}", f"peak {peak}") for step, peak in others
    ]
    said[0] = said[0].replace(f"{first['seconds']} s/step", "1000.0 s/step")
    found = logged("\n".join(said))
    assert found["seconds"] == pytest.approx(float(first["seconds"]))
    assert found["peak_gib"] == 9.9


def test_the_flags_are_those_of_the_recipe_and_memory_is_predicted(mixed_dataset: Path) -> None:
    from pipelines.cli import parse

    config = parse(["qwen2_0_5b_instruct", *COMMON.split(), *TINY.split(), "--data.datasets", str(mixed_dataset)])
    assert config.vision.path is None
    assert config.checkpoint.init_from is None
    assert 0 < predicted_gib(config) < 1


def test_the_save_benchmark_runs_with_tiny_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_checkpoint", "--tiny", "--layers", "1", "--repetitions", "1"])
    assert checkpoint.main() == 0
    shown = capsys.readouterr().out
    assert shown.count("stall of a save beside training, over one that is waited for") == 2
    assert "async, first of all" in shown
