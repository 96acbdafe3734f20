"""Weights come in from Hugging Face and from the authors, compute the same at every layout, and go back bit for bit."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from himix_megatron.checkpoint.manifest import find_checkpoint
from himix_megatron.config import METHODS, ParallelConfig
from himix_megatron.conversion.authors_layout import is_new
from himix_megatron.conversion.checkpoint_io import read_config
from himix_megatron.conversion.huggingface import same_bits
from himix_megatron.conversion.parity import DiffersError, Excerpt, by_authors, check_logits, our_logits
from himix_megatron.conversion.reference_model import plain_logits
from himix_megatron.conversion.safetensors_io import open_file, open_folder, write_folder
from himix_megatron.data.loading.plan import START
from himix_megatron.distributed.fused_kernels import detect
from himix_megatron.inference.generator import Answerer
from tests.support import ROOT
from tests.support.model_folders import LANGUAGE, make_language, make_tower
from tests.support.ranks import run_ranks
from tools import conversions, convert

REFERENCES = sorted((ROOT / "tests" / "data" / "reference").glob("*.safetensors"))
LAYOUTS: dict[str, dict[str, int]] = {
    "one rank": {},
    "tensor 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
    "tensor 2, pipeline 2": {"tensor": 2, "pipeline": 2},
}


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("towers") / "siglip")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tower: Path) -> dict[str, tuple[Path, Path]]:
    """Each language model's folder, and the run folder that it was converted to."""
    made = {}
    for name, settings in LANGUAGE.items():
        room = tmp_path_factory.mktemp("language")
        language = make_language(room / "language", **settings)
        conversions.hf_to_himix(convert.HfToHimix(language=language, vision=tower, out=room / "run"))
        made[name] = (language, room / "run")
    return made


def text_logits(runs: list[Path], layout: dict[str, int], ids: list[Tensor]) -> list[Tensor]:
    """On every rank: the logits of run folders' models, cut as asked, on text without an image."""
    return [_text_logits(run, layout, own) for run, own in zip(runs, ids, strict=True)]


def _text_logits(run: Path, layout: dict[str, int], ids: Tensor) -> Tensor:
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed

    checkpoint = find_checkpoint(str(run))
    config = read_config(checkpoint)
    train = dataclasses.replace(config.train, precision="fp32")
    config = dataclasses.replace(config, parallel=ParallelConfig(**layout), train=train)
    assert config.model.text_only_vision == "none"
    topology = init_distributed(config.parallel, seed=1)
    answerer = Answerer(config, detect(), topology)
    answerer.load(checkpoint)
    found = our_logits(answerer.model_chunks, topology, config.model, ids, torch.empty(len(ids), 0, config.vision.hidden_size))
    shutdown_distributed()
    if "MASTER_PORT" in os.environ:  # the next model's ranks meet elsewhere
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return found


@torch.no_grad()
def transformers_logits(language: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32).eval()
    logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers_at_every_layout(pairs: dict[str, tuple[Path, Path]], layout: str) -> None:
    # 200 tokens: Llama 3's scaling shows in how positions far apart see each other.
    ids = [torch.randint(97, (2, 200), generator=torch.Generator().manual_seed(3))] * len(pairs)
    ranks = LAYOUTS[layout].get("tensor", 1) * LAYOUTS[layout].get("pipeline", 1)
    runs = [run for _, run in pairs.values()]
    for found in run_ranks(text_logits, ranks, runs, LAYOUTS[layout], ids, start_gloo=False):
        for (name, (language, _)), own, logits in zip(pairs.items(), ids, found, strict=True):
            wanted = transformers_logits(language, own)
            assert logits.shape == wanted.shape, name
            assert (logits - wanted).abs().max() <= 2e-5, name
            assert wanted.std() > 0.1, name


def test_language_weights_go_back_bit_for_bit(pairs: dict[str, tuple[Path, Path]]) -> None:
    with conversions.one_rank():
        for name, (language, run) in pairs.items():
            found, wanted = stored(run), open_folder(language)
            assert {tensor for tensor in found if not is_new(tensor)} == set(wanted), name
            assert len(wanted) > 30
            assert all(same_bits(found[tensor], wanted[tensor]) for tensor in wanted), name


def test_files_on_disk_are_those_of_a_saved_model(tmp_path: Path, tower: Path) -> None:
    """Keys, shapes, dtypes, parts: a run's own checkpoint of the same model has the same."""
    language = make_language(tmp_path / "language", **LANGUAGE["qwen2, untied, two shards"])
    conversions.hf_to_himix(convert.HfToHimix(language=language, vision=tower, out=tmp_path / "run"))
    converted = find_checkpoint(str(tmp_path / "run"))
    (saved,) = run_ranks(save_again, 1, converted, tmp_path / "saved", start_gloo=False)
    wanted = {n: v for n, v in described(saved).items() if not n.startswith("optimizer")}
    found = described(converted)
    assert found.keys() == wanted.keys()
    for name in found:
        # The vocabulary is stored as published; a model pads it to its own needs when it loads.
        if "embedding" not in name and "output_layer" not in name:
            assert found[name] == wanted[name], name


def save_again(checkpoint: Path, run: Path) -> Path:
    """Load a checkpoint into a model, and save that."""
    from himix_megatron.checkpoint.checkpointer import Checkpoints
    from himix_megatron.checkpoint.description import Position
    from himix_megatron.checkpoint.run_lock import acquire
    from himix_megatron.config import RunConfig
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks
    from himix_megatron.model.towers import build_tower
    from himix_megatron.training.optimizer import build_optimizer

    config = dataclasses.replace(read_config(checkpoint), run=RunConfig(dir=str(run)))
    topology = init_distributed(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    model_chunks = build_model_chunks(config, detect(), topology, tower)
    checkpoints = Checkpoints(config, model_chunks, build_optimizer(config, model_chunks), tower, acquire(run))
    checkpoints.load_weights(checkpoint)
    checkpoints.save(Position(step=1, place=START, data={}))
    checkpoints.close()
    shutdown_distributed()
    return run / "checkpoints" / "step-00000001"


def described(checkpoint: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader

    found = {}
    for name, entry in FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items():
        chunks = sorted((tuple(c.offsets), tuple(c.sizes)) for c in getattr(entry, "chunks", []))
        found[name] = (getattr(entry, "size", None), str(getattr(entry, "properties", "").__class__), chunks)
    return found


# ---- the authors' layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_reference_weights_come_back_bit_for_bit(file: Path, tower: Path, tmp_path: Path) -> None:
    conversions.authors_to_himix(convert.AuthorsToHimix(weights=file, vision=tower, out=tmp_path / "run"))
    conversions.himix_to_authors(convert.HimixToAuthors(checkpoint=tmp_path / "run", out=tmp_path / "authors"))
    reference = open_file(file)
    wanted = {n.removeprefix("weight."): reference[n] for n in reference if n.startswith("weight.")}
    found = {n: t for n, t in open_folder(tmp_path / "authors").items() if not n.startswith("model.vision_tower.")}
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_plain_torch_agrees_with_the_authors(file: Path) -> None:
    """What conversions are compared with is itself compared with the published implementation's outputs."""
    from tools.compare_reference import Arguments, configuration, read

    reference = read(file)
    model = configuration(Arguments(file=file), reference).model
    real = reference.tensors["attention_mask"].bool()
    found = plain_logits(reference.weights, model, reference.tensors["input_ids"], reference.tensors["vision"].float())
    assert (found - reference.tensors["logits"])[real].abs().max() <= 2e-5


def test_a_folder_of_the_authors_layout_brings_its_tower(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    run = pairs["qwen2, tied"][1]
    conversions.himix_to_authors(convert.HimixToAuthors(checkpoint=run, out=tmp_path / "authors"))
    conversions.authors_to_himix(convert.AuthorsToHimix(weights=tmp_path / "authors", out=tmp_path / "again"))
    first, again = read_config(find_checkpoint(str(run))), read_config(find_checkpoint(str(tmp_path / "again")))
    assert (first.model, first.vision) == (again.model, again.vision)
    assert [f.name for f in (run / "towers").iterdir()] == [f.name for f in (tmp_path / "again" / "towers").iterdir()]


# ---- what is new ---------------------------------------------------------------------------------------------------


def stored(run: Path) -> dict[str, Tensor]:
    """A run's weights by the authors' names, in a world of one."""
    checkpoint = find_checkpoint(str(run))
    return dict(by_authors(checkpoint, read_config(checkpoint)))


def test_from_text_copies_where_widths_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    language = make_language(tmp_path / "language", **LANGUAGE["qwen2, tied"])
    vision = make_tower(tmp_path / "vision", "clip", width=48)
    out = tmp_path / "run"
    conversions.hf_to_himix(convert.HfToHimix(language=language, vision=vision, out=out, vision_kv_init="from-text"))
    with conversions.one_rank():
        weights = stored(out)
    assert all(same_bits(t, weights[n.replace("_img.", ".")]) for n, t in weights.items() if is_new(n))
    said = capsys.readouterr().out
    assert "new, from-text: 20 tensors; 4 of 4 layers inject" in said
    assert "model.layers.*.self_attn.k_proj_img.bias [24]" in said


def test_from_text_takes_the_first_columns_for_a_narrower_tower(tmp_path: Path, tower: Path) -> None:
    language = make_language(tmp_path / "language", **LANGUAGE["llama, grouped heads"])
    out = tmp_path / "run"
    conversions.hf_to_himix(convert.HfToHimix(language=language, vision=tower, out=out, vision_kv_init="from-text"))
    with conversions.one_rank():
        weights = stored(out)
    text, vision = (weights[f"model.layers.2.self_attn.k_proj{x}.weight"] for x in ("", "_img"))
    torch.testing.assert_close(vision, text[:, :40] * (48 / 40) ** 0.5)
    norms = [weights[f"model.layers.2.input_layernorm{x}.weight"] for x in ("", "_img")]
    assert torch.equal(norms[0][:40], norms[1])


def test_from_text_refuses_a_wider_tower(tmp_path: Path) -> None:
    language = make_language(tmp_path / "language", **LANGUAGE["qwen2, tied"])
    vision = make_tower(tmp_path / "vision", width=64)
    arguments = convert.HfToHimix(language=language, vision=vision, out=tmp_path / "run", vision_kv_init="from-text")
    with pytest.raises(ValueError, match="64 is above 48; use --vision-kv-init random"):
        conversions.hf_to_himix(arguments)


def test_a_recipe_of_other_sizes_is_named(tmp_path: Path, tower: Path) -> None:
    language = make_language(tmp_path / "language", **LANGUAGE["qwen2, tied"])
    with pytest.raises(ValueError, match=r"model\.num_layers is 4, but recipe qwen2_0_5b_align has 24"):
        conversions.hf_to_himix(
            convert.HfToHimix(language=language, vision=tower, out=tmp_path / "run", recipe="qwen2_0_5b_align")
        )
    assert not (tmp_path / "run").exists()


# ---- the comparison itself -----------------------------------------------------------------------------------------


def test_a_difference_removes_the_output(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    language = make_language(tmp_path / "language", **LANGUAGE["llama, grouped heads"])
    write_run = conversions.write_run

    def wrong(out: Path, config: Any, *rest: Any) -> Path:
        # As if the configuration were read wrongly: the same tensors, another function.
        return write_run(out, dataclasses.replace(config, model=dataclasses.replace(config.model, rope_theta=5e5)), *rest)

    monkeypatch.setattr(conversions, "write_run", wrong)
    command = ["hf-to-himix", "--language", str(language), "--vision", str(tower), "--out", str(tmp_path / "new" / "run")]
    monkeypatch.setattr("sys.argv", ["convert", *command])
    assert convert.main() == 1
    assert "the two sides differ, and the output was removed: logits of the whole model" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["language"]


def test_a_large_model_is_compared_by_its_first_layers(
    tmp_path: Path, tower: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    language = make_language(tmp_path / "language", **LANGUAGE["llama, grouped heads"])
    monkeypatch.setattr("himix_megatron.conversion.parity.WHOLE_MODEL_PARAMETERS", 75_000)
    monkeypatch.setattr("himix_megatron.conversion.parity._CUT_VOCABULARY", 100)
    conversions.hf_to_himix(convert.HfToHimix(language=language, vision=tower, out=tmp_path / "run"))
    said = capsys.readouterr().out
    assert "logits of the first 2 layers and 100 rows of the vocabulary on 48 tokens" in said
    conversions.himix_to_hf(convert.HimixToHf(checkpoint=tmp_path / "run", out=tmp_path / "hf"))
    said = capsys.readouterr().out
    assert "logits of the first 2 layers and 100 rows of the vocabulary on 3 samples" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "language", "run"]


def test_excerpts_of_the_recipes_fit_their_bound() -> None:
    from pipelines.recipes import llama3_2_3b_align, qwen2_0_5b_align, vicuna_7b_align

    assert Excerpt.of(qwen2_0_5b_align()).whole
    assert Excerpt.of(llama3_2_3b_align()).model.num_layers == 5
    vicuna = vicuna_7b_align()
    assert Excerpt.of(vicuna).model.num_layers == 2
    late = Excerpt.of(dataclasses.replace(vicuna, injection=METHODS["mplug_owl3"](vicuna.model)))
    assert (late.first, late.config.injection.layers) == (5, (1,))
    assert str(late) == "layers 5 to 6 and 4096 rows of the vocabulary"


def test_comparison_refuses_what_is_no_number() -> None:
    with pytest.raises(DiffersError):
        check_logits("logits", torch.tensor([float("nan")]), torch.tensor([1.0]))


def test_written_folders_are_read_by_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {f"t{i}": torch.randn(5, i, dtype=torch.bfloat16) for i in range(1, 6)} | {"scalar": torch.tensor(1.0)}
    write_folder(tmp_path, tensors, max_shard_bytes=60)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)]
    again = {n: t for f in files for n, t in load_file(f).items()}
    assert again.keys() == tensors.keys() == set(open_folder(tmp_path))
    assert all(same_bits(again[n], t) and same_bits(open_folder(tmp_path)[n], t) for n, t in tensors.items())
