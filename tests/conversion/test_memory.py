"""Conversions stream: a model of 7 billion parameters takes less than 8 GB of memory of its own."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from himix_megatron.conversion.authors_layout import is_new, shapes
from pipelines.recipes import VICUNA_7B
from tests.support.sparse_folders import sparse_file, sparse_folder


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is backed by no file; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_of(command: list[str], log: Path) -> tuple[int, int]:
    """Run a command. Returns: its exit code, and the most anonymous memory it had, looked at every 20 ms."""
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "2"}) as process,
    ):
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
    return process.returncode, peak


def make_7b(folder: Path) -> Path:
    """vicuna-7b's shapes, in bfloat16 and three shards: 13.5 GB that are holes."""
    model = VICUNA_7B
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        rms_norm_eps=model.norm_eps,
    )
    config.save_pretrained(folder)
    sparse_folder(folder, {n: s for n, s in shapes(model, 0).items() if not is_new(n)}, num_shards=3)
    return folder


def make_siglip(folder: Path) -> Path:
    """SigLIP-so400m's shapes, in float32."""
    config = transformers.SiglipVisionConfig(
        hidden_size=1152, image_size=384, patch_size=14, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(config)
    sparse_file(folder / "model.safetensors", {n: tuple(t.shape) for n, t in model.state_dict().items()}, "F32")
    return folder


def stream(folder: Path, out: Path) -> None:
    """Write a checkpoint of 0.9 GB and read it back, as a conversion does; nothing is computed."""
    from himix_megatron.checkpoint.manifest import find_checkpoint
    from himix_megatron.conversion.checkpoint_io import write_run
    from himix_megatron.conversion.parity import by_authors, check_bits
    from himix_megatron.conversion.safetensors_io import open_folder
    from pipelines.recipes import vicuna_7b_align
    from tools.conversions import one_rank

    weights, recipe = open_folder(folder), vicuna_7b_align()
    started = anonymous_bytes(os.getpid())
    with one_rank():
        config = dataclasses.replace(recipe, model=SMALL)
        write_run(out, config, weights, {"weight": torch.zeros(1)}, print)
        check_bits(by_authors(find_checkpoint(str(out)), config), weights)
    print("started with", started)


SMALL = dataclasses.replace(VICUNA_7B, num_layers=2, vocab_size=4096)


def test_weights_are_written_and_read_a_layer_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    sparse_folder(tmp_path / "model", shapes(SMALL, 1152), num_shards=2)
    script = "import pathlib, sys; from tests.conversion.test_memory import stream; stream(*map(pathlib.Path, sys.argv[1:]))"
    code, peak = peak_of([sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "run")], tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    started = int(said.split()[-1])
    layer = sum(math.prod(s) * 2 for n, s in shapes(SMALL, 1152).items() if ".layers.0." in n)
    assert layer > 400e6
    # What is read back is one layer, and one tensor of it a second time as the file gave it.
    assert peak - started < 1.6 * layer
    assert sum(f.stat().st_size for f in (tmp_path / "run").rglob("*.distcp")) > 2 * layer


@pytest.mark.campaign
def test_seven_billion_parameters_convert_in_8_gb(tmp_path: Path) -> None:
    assert shutil.disk_usage(tmp_path).free > 40e9, f"{tmp_path} needs 40 GB for a 7B model's checkpoint and its export"
    make_7b(tmp_path / "language")
    make_siglip(tmp_path / "vision")
    run, exported = tmp_path / "run", tmp_path / "exported"
    conversions = {
        "hf-to-himix": ["--language", tmp_path / "language", "--vision", tmp_path / "vision", "--out", run],
        "himix-to-hf": [run, "--out", exported],
    }
    for name, flags in conversions.items():
        started = time.perf_counter()
        code, peak = peak_of([sys.executable, "-m", "tools.convert", name, *map(str, flags)], tmp_path / "log")
        print((tmp_path / "log").read_text())
        print(f"{name}: peak of anonymous memory {peak / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s")
        assert code == 0
        assert peak < 8e9
