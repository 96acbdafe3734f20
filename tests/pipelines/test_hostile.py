"""`pipelines.pretrain` under settings and environments that cannot work: one clear line, exit code 2, and nothing was run."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import pretrain
from pipelines.cli import run_main
from tests.support import ROOT


@pytest.fixture(autouse=True)
def no_process_group_stays() -> Iterator[None]:
    """Runs here are refused in this process, some after ranks have met: a later test would meet their group."""
    yield
    import torch.distributed as dist

    if dist.is_initialized():
        from himix_megatron.distributed.topology import shutdown_distributed

        shutdown_distributed()


SETTINGS = {
    "--train.steps -1": "train.steps is -1: wanted 1 or more",
    "--train.epochs nan": "train.epochs is nan: wanted a finite number above 0",
    "--train.epochs inf": "train.epochs is inf: wanted a finite number above 0",
    "--train.seed -1": "train.seed is -1: wanted 0 to 4294967295",
    "--train.micro-batch-samples 0": "train.micro_batch_samples is 0",
    "--train.global-batch-samples -8": "train.global_batch_samples is -8",
    "--train.trainable-parts language language": "train.trainable_parts is ['language', 'language']: name each part once",
    "--train.fp8 tensorwise": "train.fp8 is tensorwise, which keeps everything else in bf16",
    "--optimizer.learning-rate nan": "optimizer.learning_rate is nan",
    "--optimizer.learning-rate 0": "optimizer.learning_rate is 0",
    "--optimizer.min-learning-rate 1": "optimizer.min_learning_rate (1.0) is above optimizer.learning_rate",
    "--optimizer.min-learning-rate nan": "optimizer.min_learning_rate is nan: wanted 0 or more",
    "--optimizer.warmup-fraction 1": "optimizer.warmup_fraction is 1.0: wanted 0 to below 1",
    "--optimizer.beta1 1.5": "optimizer.beta1 is 1.5: wanted 0 to below 1",
    "--optimizer.beta2 nan": "optimizer.beta2 is nan",
    "--optimizer.eps 0": "optimizer.eps is 0.0: wanted a finite number above 0",
    "--optimizer.weight-decay -1": "optimizer.weight_decay is -1.0: wanted 0 or more",
    "--optimizer.clip-norm inf": "optimizer.clip_norm is inf",
    "--parallel.tensor 0": "parallel.tensor is 0",
    "--parallel.pipeline -2": "parallel.pipeline is -2",
    "--parallel.virtual-pipeline 2": "parallel.virtual_pipeline above 1 needs parallel.pipeline above 1",
    "--parallel.timeout-seconds inf": "parallel.timeout_seconds is inf",
    "--parallel.timeout-seconds 0": "parallel.timeout_seconds is 0.0",
    "--data.max-text-tokens 0": "data.max_text_tokens is 0",
    "--data.num-workers -1": "data.num_workers is -1: wanted 0 or more",
    "--data.max-bad-fraction 2": "data.max_bad_fraction is 2.0: wanted 0 to 1",
    "--data.weights 1 2": "data.weights has 2 numbers for 1 datasets",
    "--data.weights nan": "data.weights is nan: wanted a finite number above 0",
    "--data.pack-max-vision-tokens 4": "packing has two budgets",
    "--data.pack-max-text-tokens 512 --data.pack-max-vision-tokens 35 --train.global-batch-packs 1 "
    "--train.global-batch-samples None": "data.pack_max_vision_tokens (35) is below the vision tokens of the largest image "
    "(36): use a multiple, e.g. --data.pack-max-vision-tokens 1152",
    "--data.webdataset-urls x.tar": "data.datasets and data.webdataset_urls are both given",
    "--data.features a b": "data.features names 2 folders for 1 datasets",
    "--data.cache-gib nan": "data.cache_gib is nan",
    "--data.validation-path EMPTY": "EMPTY is not a shard dataset",
    "--data.tokenizer ../../etc/passwd": "data.tokenizer is ../../etc/passwd",
    "--data.tokenizer $(touch␠MARK)": "data.tokenizer is $(touch ",
    "--model.head-dim 31": "model.head_dim is 31",
    "--model.num-attention-heads 5": "model.hidden_size (128) does not divide into model.num_attention_heads (5)",
    "--model.rope-theta 0": "model.rope_theta is 0.0",
    "--model.norm-eps nan": "model.norm_eps is nan",
    "--model.vocab-size 9": "260 tokens, but model.vocab_size is 9",
    "--vision.patch-size 100": "vision.image_size (48) is below vision.patch_size (100)",
    "--vision.feature-layer 1": "vision.feature_layer is 1: wanted -2 to -1",
    "--vision.pixel-std 0 1 1": "vision.pixel_std is 0.0",
    "--vision.num-attention-heads 3": "vision.hidden_size (128) does not divide into vision.num_attention_heads (3)",
    "--checkpoint.interval-steps 0": "checkpoint.interval_steps is 0",
    "--checkpoint.keep-last -1": "checkpoint.keep_last is -1",
    "--checkpoint.init-from FILE": "FILE holds no checkpoint",
    "--log.interval-steps 0": "log.interval_steps is 0",
    "--run.dir FILE/run": "FILE",
}

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip
ENVIRONMENTS = {
    "torchrun, no rank": (TORCHRUN, {"RANK": None}, "RANK is missing or empty"),
    "torchrun, no size": (TORCHRUN, {"WORLD_SIZE": None}, "WORLD_SIZE is missing or empty"),
    "torchrun, no local rank": (TORCHRUN, {"LOCAL_RANK": None}, "LOCAL_RANK is missing or empty"),
    "torchrun, no address": (TORCHRUN, {"MASTER_ADDR": None}, "MASTER_ADDR is missing or empty"),
    "torchrun, no port": (TORCHRUN, {"MASTER_PORT": None}, "MASTER_PORT is missing or empty"),
    "rank beyond the size": (TORCHRUN, {"RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
    "size of none": (TORCHRUN, {"WORLD_SIZE": "0"}, "RANK is 0 but WORLD_SIZE is 0"),
    "rank in words": (TORCHRUN, {"RANK": "zero"}, "RANK is 'zero': wanted a whole number"),
    "rank as a command": (TORCHRUN, {"RANK": "$(touch MARK)"}, "RANK is '$(touch MARK)'"),
    "port as a command": (TORCHRUN, {"MASTER_PORT": "`touch MARK`"}, "MASTER_PORT is '`touch MARK`'"),
    "port too high": (TORCHRUN, {"MASTER_PORT": "65536"}, "MASTER_PORT is 65536: wanted 1 to 65535"),
    "more on the node than in all": (TORCHRUN, {"LOCAL_RANK": "1"}, "LOCAL_RANK is 1 but the rank is 0"),
    "a size that the batch does not fit": (TORCHRUN, {"WORLD_SIZE": "3"}, "is not a multiple of 3 data-parallel ranks"),
    "srun, no size": (SRUN, {"SLURM_NTASKS": None, "SLURM_STEP_NUM_TASKS": None}, "SLURM_NTASKS is missing or empty"),
    "srun, no nodes": (SRUN, {"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is missing"),
    "srun, nodes as a command": (SRUN, {"SLURM_STEP_NODELIST": "[$(touch MARK)"}, "SLURM_STEP_NODELIST is '[$(touch MARK)'"),
    "srun, no job": (SRUN, {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is missing or empty"),
    "srun, a size that the batch does not fit": (SRUN, {"SLURM_STEP_NUM_TASKS": "5"}, "is not a multiple of 5 data-parallel"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No rank variables of our own; afterwards, nothing that a command would have left."""
    for name in os.environ:
        if name.startswith(("SLURM_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ENVIRONMENT"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "MARK").exists()
    assert not (tmp_path / "run").exists()


def said(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line."""
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    with pytest.raises(SystemExit) as stopped:
        run_main(pretrain.main)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2, shown
    assert re.fullmatch(r"error: [^\n]+\n", shown), shown
    return shown


def words_for(data: Path, tmp_path: Path, text: str = "") -> list[str]:
    (tmp_path / "EMPTY").mkdir(exist_ok=True)
    (tmp_path / "FILE").write_text("no folder")
    usual = ["tiny_align", "--data.datasets", str(data), "--run.dir", "run", "--train.steps", "2"]
    return [*usual, *(word.replace("␠", " ") for word in text.split())]


@pytest.mark.parametrize("text", SETTINGS)
def test_a_setting_that_cannot_work_is_refused_in_one_line(
    text: str, mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = said(words_for(mixed_dataset, tmp_path, text), monkeypatch, capsys)
    assert SETTINGS[text] in shown, shown


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_that_contradicts_itself_is_refused_in_one_line(
    name: str, mixed_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, changes, wanted = ENVIRONMENTS[name]
    for variable, value in (base | changes).items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    shown = said(words_for(mixed_dataset, tmp_path), monkeypatch, capsys)
    assert wanted in shown, shown


@pytest.mark.parametrize("what", ["a busy port", "nobody there", "an address that is none"])
def test_ranks_that_cannot_meet_say_so_in_one_line(what: str, mixed_dataset: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        busy = str(listener.getsockname()[1])
        changes = {
            "a busy port": {"MASTER_PORT": busy},
            "nobody there": {"RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "1"},
            "an address that is none": {"MASTER_ADDR": "himix-no-such-node.invalid"},
        }[what]
        words = [*words_for(mixed_dataset, tmp_path), "--parallel.timeout-seconds", "3"]
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.pretrain", *words],
            cwd=tmp_path,
            env=dict(os.environ) | TORCHRUN | changes | {"PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    wanted = "does not resolve" if "address" in what else f"could not meet the others at 127.0.0.1:{changes['MASTER_PORT']}"
    assert wanted in lines[0]
