"""The Megatron model agrees with the authors' implementation, however it is cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from himix_megatron.config import ModelConfig
from himix_megatron.conversion.authors_layout import from_authors, to_authors
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tools.compare_reference import Arguments, configuration, differences, read

FILES = sorted((ROOT / "tests" / "data" / "reference").glob("*.safetensors"))
LAYOUTS = {
    "one rank": {},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence_parallel": True},
    "pipeline 2": {"pipeline": 2},
    "tensor 2, pipeline 2": {"tensor": 2, "pipeline": 2},
    "pipeline 2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}


def compare(arguments: Arguments) -> dict[str, float]:
    reference = read(arguments.file)
    return differences(configuration(arguments, reference), reference)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_agrees_with_the_authors(file: Path, layout: str) -> None:
    arguments = Arguments(file=file, **LAYOUTS[layout])
    ranks = arguments.tensor * arguments.pipeline
    found = run_ranks(compare, ranks, arguments, start_gloo=False)[0]
    assert found.pop("logits") <= 2e-5
    assert found.pop("loss") <= 2e-5
    assert len(found) == len(read(file).gradients) > 40
    assert max(found.values()) <= 1e-5, max(found, key=found.__getitem__)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_authors_layout_comes_back_bit_for_bit(file: Path) -> None:
    reference = read(file)
    model = configuration(Arguments(file=file), reference).model
    again = to_authors(from_authors(reference.weights, model), model)
    assert again.keys() == reference.weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in reference.weights.items())


def test_missing_and_unknown_weights_are_named() -> None:
    reference = read(FILES[0])
    model: ModelConfig = configuration(Arguments(file=FILES[0]), reference).model
    weights = reference.weights
    lost = weights.pop("model.layers.2.self_attn.k_proj_img.weight")
    with pytest.raises(ValueError, match=r"no model\.layers\.2\.self_attn\.k_proj_img\.weight"):
        from_authors(weights, model)
    with pytest.raises(ValueError, match="extra"):
        from_authors({**reference.weights, "model.extra": lost}, model)


def test_command_starts_its_own_ranks_and_fails_on_a_difference(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(FILES[0])
    with safe_open(FILES[0], framework="pt") as opened:
        metadata = opened.metadata()
    tensors["weight.model.layers.1.self_attn.v_proj_img.weight"][0, 0] += 0.05
    save_file(tensors, tmp_path / "wrong.safetensors", metadata)
    command = [sys.executable, "-m", "tools.compare_reference"]
    good = subprocess.run([*command, str(FILES[0]), "--tensor", "2"], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert good.stdout.endswith("agrees\n")
    wrong = subprocess.run([*command, str(tmp_path / "wrong.safetensors")], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert wrong.stdout.endswith("DIFFERS\n")
