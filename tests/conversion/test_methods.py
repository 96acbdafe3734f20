"""A language model is converted to a start of any method, and what vision adds to it is stored as a run would store it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import ChainMap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from himix_megatron.checkpoint.manifest import find_checkpoint
from himix_megatron.config import METHODS, Config, InjectionConfig
from himix_megatron.conversion.authors_layout import is_new, layout, shapes
from himix_megatron.conversion.checkpoint_io import StoredWeights, read_config, write_run
from himix_megatron.conversion.huggingface import NewVisionWeights, language_weights, same_bits
from himix_megatron.conversion.parity import by_authors
from himix_megatron.conversion.sharding import TE_NAMES
from tests.conversion.test_conversion import described, save_again
from tests.support.injection_points import point_case
from tests.support.injection_reference import weight_shapes
from tests.support.model_folders import LANGUAGE, make_language, make_tower
from tests.support.ranks import run_ranks
from tools import conversions, convert

POINTS: dict[str, InjectionConfig] = {
    "positions and a merge": InjectionConfig(position="learned", reduce="merge"),
    "two gates in some layers": InjectionConfig(
        fusion="separate", gate="tanh", adapter="per_layer", layers=(1, 2), keys_values="text", norm="own"
    ),
    "an output of its own in all layers": InjectionConfig(fusion="separate", gate="zero", norm="none"),
    "a block in every layer": InjectionConfig(fusion="block", gate="tanh", adapter="per_layer"),
    "a block in some layers": InjectionConfig(fusion="block", gate="tanh", layers=(1, 3)),
}
"""Beside the published methods."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    room = tmp_path_factory.mktemp("folders")
    return make_language(room / "language", **LANGUAGE["qwen2, tied"]), make_tower(room / "tower")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, folders: tuple[Path, Path]) -> dict[str, Path]:
    """A start of every method, by the tool; and of the other points, written by the same parts."""
    room, (language, vision) = tmp_path_factory.mktemp("runs"), folders
    for method in METHODS:
        out = room / method
        conversions.hf_to_himix(convert.HfToHimix(language=language, vision=vision, out=out, method=method))
    config = read_config(find_checkpoint(str(room / "himix")))
    text = language_weights(language, config.model)
    with conversions.one_rank():
        tower = StoredWeights(find_checkpoint(str(room / "himix")), config).tower(config)
        for name, injection in POINTS.items():
            chosen = dataclasses.replace(config, injection=injection)
            new = NewVisionWeights(text, chosen, "random", seed=1)
            write_run(room / name, chosen, ChainMap(new, text), tower, lambda _: None)  # type: ignore[arg-type]
    return {name: find_checkpoint(str(room / name)) for name in (*METHODS, *POINTS)}


@pytest.fixture(scope="module")
def saved(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each loaded into a model, which saved its weights."""
    room = tmp_path_factory.mktemp("saved")
    jobs = [(checkpoint, room / name) for name, checkpoint in runs.items()]
    return dict(zip(runs, run_ranks(save_all, 1, jobs, start_gloo=False)[0], strict=True))


def save_all(jobs: list[tuple[Path, Path]]) -> list[Path]:
    return [save_again(*job) for job in jobs]


@pytest.mark.parametrize("name", [*METHODS, *POINTS])
def test_files_on_disk_are_those_of_a_saved_model(runs: dict[str, Path], saved: dict[str, Path], name: str) -> None:
    found = described(runs[name])
    wanted = {n: v for n, v in described(saved[name]).items() if not n.startswith("optimizer")}
    assert found.keys() == wanted.keys()
    # The vocabulary is stored as published; a model pads it to its own needs when it loads.
    differ = [n for n in found if found[n] != wanted[n] and "embedding" not in n]
    assert not differ


def test_what_only_some_layers_have_lies_under_their_numbers(runs: dict[str, Path]) -> None:
    keys = described(runs["a block in some layers"])
    assert "decoder.layers.3.vision_block.linear_q.weight" in keys
    assert "decoder.layers.vision_block.linear_q.weight" in described(runs["a block in every layer"])
    assert not [key for key in described(runs["tokens"]) if "vision_" in key and not key.startswith("vision_input.adapter")]


@pytest.mark.parametrize("name", [*METHODS, *POINTS])
def test_a_saved_models_weights_are_read_without_a_model(runs: dict[str, Path], saved: dict[str, Path], name: str) -> None:
    with conversions.one_rank():
        config = read_config(runs[name])
        first, again = ({n: t.clone() for n, t in by_authors(path, config).items()} for path in (runs[name], saved[name]))
    assert first.keys() == again.keys()
    assert [n for n in first if is_new(n)]
    assert all(same_bits(first[n], again[n]) for n in first)


def test_names_and_shapes_of_random_points_are_those_of_the_equations() -> None:
    """Written out a second time, for any family; the disk's names of the norms before attention and MLP are fused ones."""
    for number in range(60):
        config = point_case(7, number).config
        published = shapes(config.model, config.vision, config.injection)
        found = {}
        for ours, parts in layout(config.model, config.injection).items():
            first, *others = (published[name] for name, _ in parts)
            found[ours] = (first[0] + sum(shape[0] for shape in others), *first[1:])
        wanted = weight_shapes(config)
        for fused, plain in TE_NAMES.items():
            wanted = {name.replace(fused, plain): shape for name, shape in wanted.items()}
        assert found == wanted, number
        assert {ours for ours, parts in layout(config.model, config.injection).items() if is_new(parts[0][0])} == {
            name for name in wanted if "vision_" in name
        }


def new_weights(folders: tuple[Path, Path], injection: InjectionConfig, init: conversions.VisionInit) -> dict[str, Tensor]:
    return dict(NewVisionWeights(*given(folders, injection), init, seed=1))


def given(folders: tuple[Path, Path], injection: InjectionConfig) -> tuple[dict[str, Tensor], Config]:
    model = conversions.read_language(folders[0])
    vision, _ = conversions._read_tower(folders[1], None, None)
    text = dict(language_weights(folders[0], model))
    return text, conversions._config(model, vision, None, injection, folders[0], text)


def test_what_could_disturb_the_text_starts_at_zero_and_norms_at_one(folders: tuple[Path, Path]) -> None:
    of_block = new_weights(folders, POINTS["a block in every layer"], "random")
    others = [new_weights(folders, POINTS[name], "random") for name in list(POINTS)[:3]]
    new = ChainMap(of_block, *others)
    zero = {name for name, tensor in new.items() if not tensor.any()}
    one = {name for name, tensor in new.items() if torch.equal(tensor, torch.ones_like(tensor))}
    assert {name.split(".", 3)[-1] for name in zero if "layers.2." in name and "bias" not in name} == {
        "vision_block.attention_gate", "vision_block.mlp_gate", "self_attn.vision_gate", "self_attn.o_proj_img.weight"
    }  # fmt: skip
    assert {f"model.vision_{table}_positions" for table in ("row", "column", "image")} < zero
    assert all("norm" in name for name in one)
    assert all(name in one for name in new if "norm" in name)
    for name in (name for name in new if name not in zero | one):
        smaller = math.sqrt(8) if name.endswith(("vision_block.o_proj.weight", "down_proj.weight")) else 1
        assert float(new[name].std()) * smaller == pytest.approx(0.02, rel=0.15), name


@pytest.mark.parametrize("name", ["mplug_owl3", "a block in every layer"])
def test_own_projections_behind_an_adapter_start_from_the_texts(folders: tuple[Path, Path], name: str) -> None:
    text, config = given(folders, POINTS[name] if name in POINTS else InjectionConfig())
    injection = POINTS[name] if name in POINTS else METHODS[name](config.model)
    new = new_weights(folders, injection, "from-text")
    layer = injection.injecting_layers(4)[0]
    inside, beside = ("vision_block.",) * 2 if name in POINTS else ("self_attn.", "")
    for kind in ("weight", "bias"):
        for projection in ("k_proj", "v_proj"):
            found = new[f"model.layers.{layer}.{inside}{projection}_img.{kind}"]
            assert same_bits(found, text[f"model.layers.{layer}.self_attn.{projection}.{kind}"])
    if injection.norm == "own":
        norm = new[f"model.layers.{layer}.{beside}input_layernorm_img.weight"]
        assert same_bits(norm, text[f"model.layers.{layer}.input_layernorm.weight"])
    assert new[next(n for n in new if n.endswith("vision_adapter.linear_2.weight"))].std() > 0


def test_from_text_is_refused_where_the_texts_projections_are_used_anyway(folders: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = convert.HfToHimix(
        language=folders[0], vision=folders[1], out=tmp_path / "run", method="saisa", vision_kv_init="from-text"
    )
    with pytest.raises(ValueError, match=r"injection\.keys_values is text; use --vision-kv-init random"):
        conversions.hf_to_himix(arguments)
    unknown = dataclasses.replace(arguments, method="llava")
    with pytest.raises(ValueError, match="--method is llava"):
        conversions.hf_to_himix(unknown)


def test_the_authors_layout_is_of_himix_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    arguments = convert.HimixToAuthors(checkpoint=runs["mplug_owl3"], out=tmp_path / "authors")
    with pytest.raises(ValueError, match=r"injection\.layers is \(\d,\): the published implementation"):
        conversions.himix_to_authors(arguments)


def test_a_large_models_excerpt_has_a_layer_that_injects(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("himix_megatron.conversion.parity.WHOLE_MODEL_PARAMETERS", 60_000)
    monkeypatch.setattr("himix_megatron.conversion.parity._CUT_VOCABULARY", 100)
    language, vision = folders
    conversions.hf_to_himix(convert.HfToHimix(language=language, vision=vision, out=tmp_path / "run", method="llama3_2_vision"))
    said = capsys.readouterr().out
    assert "logits of layers 3 to 3 and 100 rows of the vocabulary on 48 tokens, compared with transformers" in said
    assert "vision is not compared" in said
    assert "1 of 4 layers inject" in said


@pytest.mark.parametrize("method", ["saisa", "vica", "mplug_owl3"])
@pytest.mark.parametrize("parameters", [600_000_000, 90_000])
def test_a_start_is_exported_and_compared(
    runs: dict[str, Path],
    method: str,
    parameters: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("himix_megatron.conversion.parity.WHOLE_MODEL_PARAMETERS", parameters)
    conversions.himix_to_hf(convert.HimixToHf(checkpoint=runs[method], out=tmp_path / "hf"))
    said = capsys.readouterr().out
    compared = "the whole model" if parameters > 1e6 else "rows of the vocabulary"
    assert f"{compared} on 3 samples with images, compared with transformers: largest difference" in said
    assert "(preference of another token): largest difference 0.00e+00" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_run_of_several_stages_is_exported_by_one_process(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs["vica"].parent.parent, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["parallel"].update(tensor=2, pipeline=2, sequence=True)
    (run / "config.json").write_text(json.dumps(settings))
    conversions.himix_to_hf(convert.HimixToHf(checkpoint=run, out=tmp_path / "hf"))
    assert "logits of the whole model on 3 samples with images" in capsys.readouterr().out
