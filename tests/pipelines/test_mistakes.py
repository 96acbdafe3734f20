"""A user's mistake is one line on stderr and exit code 2, before any rank waits for another."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from himix_megatron.config import to_json
from pipelines import evaluate, pretrain
from pipelines.cli import run_main
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config, train
from tools import compare_reference

TINY = ["tiny_align", "--data.datasets"]


def message(main: object, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What an entry point says to a mistake."""
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as stopped:
        run_main(main)  # type: ignore[arg-type]
    shown = capsys.readouterr().err
    assert stopped.value.code == 2, shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1, shown
    return shown


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


MISTAKES = {
    "ranks": (["DATA", "--parallel.tensor", "2"], r"1 rank cannot hold parallel.tensor \(2\) .* multiple of 2.*torchrun"),
    "heads": (["DATA", "--parallel.tensor", "4"], r"model.num_query_groups \(2\) does not divide over parallel.tensor \(4\)"),
    "layers": (["DATA", "--parallel.pipeline", "3"], r"model.num_layers \(4\) does not divide over parallel.pipeline \(3\)"),
    "batch": (["DATA", "--train.global-batch-samples", "7"], r"train.global_batch_samples \(7\) is not a multiple of"),
    "field": (["DATA", "--train.step", "5"], r"unknown setting --train.step: did you mean --train.steps"),
    "value": (["DATA", "--train.steps", "many"], r"--train.steps is .many.: wanted a whole number or None"),
    "section": (["DATA", "--parallel.sequence"], r"parallel.sequence needs parallel.tensor above 1"),
    "parts": (["DATA", "--train.trainable-parts", "vision"], r"--train.trainable-parts.* vision"),
    "manifest": (["EMPTY"], r"EMPTY is not a shard dataset \(no manifest.json\): make one with python -m pipelines.preprocess"),
    "initial": (["DATA", "--checkpoint.init-from", "EMPTY"], r"EMPTY holds no checkpoint"),
    "attention": (["DATA", "--model.layer-spec", "te"], r"model.layer_spec is te, but .*: use --model.layer-spec torch"),
    "vocabulary": (["DATA", "--model.vocab-size", "200"], r"260 tokens, but model.vocab_size is 200"),
    "tokenizer": (["DATA", "--data.tokenizer", "EMPTY"], r"data.tokenizer is .*EMPTY"),
    "template": (["DATA", "--data.template", "chatml"], r"data.template chatml needs <\|im_start\|>"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(
    name: str, mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    words, wanted = MISTAKES[name]
    places = {"DATA": str(mixed_dataset), "EMPTY": str(tmp_path / "EMPTY")}
    words = [*TINY, *(places.get(word, word) for word in words), "--run.dir", str(tmp_path / "run")]
    shown = message(pretrain.main, words, monkeypatch, capsys)
    assert re.search(wanted, shown), shown
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unknown_recipe_names_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean tiny_align?" in message(pretrain.main, ["tiny_alin"], monkeypatch, capsys)


def test_checkpoint_of_another_architecture_names_the_field(
    mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(mixed_dataset, tmp_path / "small", parts=("vision_kv",), steps=1)
    run_ranks(train, 1, config, start_gloo=False)
    words = [*TINY, str(mixed_dataset), "--checkpoint.init-from", str(tmp_path / "small"), "--run.dir", str(tmp_path / "run")]
    shown = message(pretrain.main, words, monkeypatch, capsys)
    assert "is of another architecture: model.family is qwen2 there and llama here" in shown
    # The same for a run folder whose settings changed under it.
    other = replace(config, model=replace(config.model, ffn_hidden_size=128))
    shutil.copytree(tmp_path / "small", tmp_path / "run2")
    (tmp_path / "run2" / "config.json").write_text(to_json(other))
    words = [str(tmp_path / "run2"), "--data", str(mixed_dataset)]
    assert "model.ffn_hidden_size is 96 there and 128 here" in message(evaluate.main, words, monkeypatch, capsys)


def test_evaluation_of_what_is_no_run(
    mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path), "--data", str(mixed_dataset)]
    assert "is no run folder: it has no config.json" in message(evaluate.main, words, monkeypatch, capsys)


def test_reference_file_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    assert "is no reference file" in message(compare_reference.main, [str(tmp_path / "x.safetensors")], monkeypatch, capsys)


def test_a_mistake_is_told_once_before_ranks_are_started(mixed_dataset: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipelines.evaluate",
        str(tmp_path),
        "--data",
        str(mixed_dataset),
        "--parallel.tensor",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "is no run folder" in done.stderr


def test_what_comes_after_a_run_does_not_change_its_exit_code() -> None:
    program = """
import atexit, os, runpy, sys, types
atexit.register(os.abort)
sys.modules["himix_megatron.training.loop"] = types.SimpleNamespace(pretrain=lambda config, request: print("done") or 85)
sys.argv = ["pretrain", "qwen2_0_5b_align"]
runpy.run_module("pipelines.pretrain", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (85, "done\n"), done.stderr
