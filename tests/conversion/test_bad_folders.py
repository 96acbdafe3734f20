"""A folder that cannot be converted is told in one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from himix_megatron.conversion.safetensors_io import INDEX, SINGLE, open_file, open_folder
from tests.support.model_folders import LANGUAGE, make_language, make_tower
from tools import conversions, convert


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in shards, one in a single file, and a tower."""
    room = tmp_path_factory.mktemp("good")
    make_language(room / "shards", **LANGUAGE["qwen2, untied, two shards"])
    make_language(room / "single", **LANGUAGE["llama, tied, Llama 3's rope, odd vocabulary, wide heads"])
    make_tower(room / "tower")
    return room


def settings(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index(folder: Path, **changes: str) -> None:
    path = folder / INDEX
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"weight_map": stored["weight_map"] | changes}))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def fifo(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / "x.safetensors")


def header(folder: Path, text: bytes) -> None:
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)


def doubled(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*"))[0]


_NORM, _UP = "model.norm.weight", "model.layers.3.mlp.up_proj.weight"
ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}
SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: first_shard(d).unlink(), "lacks the shard model-00001-of-00003.safetensors"),
    "index pointing outside": (lambda d: index(d, **{_NORM: "../model.safetensors"}), f"looks for {_NORM} in '../model.saf"),
    "index pointing to the root": (lambda d: index(d, **{_NORM: "/model.safetensors"}), "wanted the name of a safetensors"),
    "index of a pickle": (lambda d: index(d, **{_NORM: "pytorch_model.bin"}), "wanted the name of a safetensors file"),
    "doubled tensor": (doubled, "is in two shards of"),
    "tensor in another shard": (lambda d: index(d, **{_NORM: "model-00001-of-00003.safetensors"}), f"lacks {_NORM}, which"),
    "truncated shard": (lambda d: cut(first_shard(d), -100), "is cut short"),
    "truncated header": (lambda d: cut(first_shard(d), 100), "is no safetensors file, or cut short"),
    "two models": (lambda d: save_file({"a": torch.ones(1)}, d / SINGLE), f"holds both {SINGLE} and {INDEX}"),
    "index that is no JSON": (lambda d: (d / INDEX).write_text("{"), "no JSON"),
    "index that is too deep": (lambda d: (d / INDEX).write_text('{"a":' * 90_000), "no JSON that can be read: too many lists"),
    "sliding window": (lambda d: settings(d, use_sliding_window=True, sliding_window=4), "use_sliding_window is True"),
}
SINGLE_FILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda d: weights(d, lambda t: t.pop(_UP)), f"lacks {_UP}"),
    "extra tensor": (lambda d: weights(d, lambda t: t.update(extra=t[_NORM].clone())), "holds extra, which the model has no"),
    "wrong shape": (lambda d: weights(d, lambda t: t.update({_UP: t[_UP][:-1].clone()})), f"{_UP} has shape [95, 48], wanted"),
    "wrong dtype": (lambda d: weights(d, lambda t: t.update({_UP: t[_UP].to(torch.int8)})), f"{_UP} is I8, wanted F32"),
    "mixed dtypes": (lambda d: weights(d, lambda t: t.update({_UP: t[_UP].half()})), f"{_UP} is F16, but"),
    "another head": (
        lambda d: weights(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "tie_word_embeddings is set, but lm_head.weight differs",
    ),
    "pickled weights": (pickled, "holds pickled weights only (pytorch_model.bin)"),
    "code of its own": (lambda d: settings(d, auto_map={"AutoModel": "code.Model"}), "names code of its own (auto_map)"),
    "another family": (lambda d: settings(d, model_type="gemma"), "model_type is gemma, wanted llama or qwen2"),
    "biases": (lambda d: settings(d, attention_bias=True), "attention_bias is True, which our model does not compute"),
    "MLP biases": (lambda d: settings(d, mlp_bias=True), "mlp_bias is True"),
    "another activation": (lambda d: settings(d, hidden_act="gelu"), "hidden_act is gelu"),
    "another rope": (lambda d: settings(d, rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type is yarn"),
    "another Llama 3 rope": (
        lambda d: settings(d, rope_parameters={**ROPE, "original_max_position_embeddings": 8192}),
        "rope low_freq_factor is 2.0: megatron-core's Llama 3 scaling has 1 fixed",
    ),
    "quantised": (lambda d: settings(d, quantization_config={"quant_method": "gptq"}), "quantization_config is"),
    "a size that is no number": (lambda d: settings(d, hidden_size="wide"), "Field 'hidden_size' expected int, got str"),
    "no heads": (lambda d: settings(d, num_attention_heads=0, head_dim=None), "transformers cannot read it"),
    "no settings": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "settings that are too deep": (
        lambda d: (d / "config.json").write_text("[" * 90_000),
        "no JSON that can be read: too many",
    ),
    "settings that are deep": (lambda d: settings(d, x=json.loads("[" * 200 + "]" * 200)), "more than 100 lists or objects in"),
    "a header that is too deep": (lambda d: header(d, b"[" * 90_000), "damaged: its header is not one of safetensors"),
    "a header of numbers": (lambda d: header(d, b'{"a": 5, "b": 6}'), "a is 5, wanted an object"),
    "weights that are a FIFO": (fifo, "is a FIFO: wanted a regular file"),
    "ten million layers": (
        lambda d: settings(d, num_hidden_layers=10_000_000),
        "num_hidden_layers is 10000000, but the weights",
    ),
    "settings that are no JSON": (lambda d: (d / "config.json").write_text("["), "no JSON"),
    "no weights": (lambda d: (d / SINGLE).unlink(), f"holds no {SINGLE} and no {INDEX}"),
}
TOWER: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tower": (lambda d: cut(d / SINGLE, -1), "is cut short"),
    "pickled tower": (pickled, "holds pickled weights only"),
    "tower with code": (lambda d: settings(d, auto_map={}), "names code of its own"),
    "another tower": (lambda d: settings(d, model_type="dinov2"), "model_type is dinov2, wanted siglip"),
    "tower of another activation": (
        lambda d: settings(d, hidden_act="relu"),
        "hidden_act is relu, but a siglip tower here has",
    ),
    "a tower without heads": (
        lambda d: settings(d, num_attention_heads=0),
        "num_attention_heads is 0, wanted a number above 0",
    ),
    "a tower that is a FIFO": (fifo, "is a FIFO: wanted a regular file"),
    "a tower of ten million layers": (
        lambda d: settings(d, num_hidden_layers=10_000_000),
        "num_hidden_layers is 10000000, but the weights",
    ),
    "pixels without a mean": (
        lambda d: (d / "preprocessor_config.json").write_text('{"image_mean": 0.5}'),
        "image_mean is 0.5, wanted a list",
    ),
    "a processor that is too deep": (lambda d: (d / "preprocessor_config.json").write_text("[" * 90_000), "too many lists"),
    "oblong pixels": (lambda d: settings(d, image_size=[28, 14]), "image_size is [28, 14], wanted a number"),
    "missing tower tensor": (
        lambda d: weights(d, lambda t: t.pop(next(n for n in t if "patch_embedding.bias" in n))),
        "lacks 1 of the tower's",
    ),
}
CASES = [("shards", *case) for case in SHARDED.items()]
CASES += [("single", *case) for case in SINGLE_FILE.items()]
CASES += [("tower", *case) for case in TOWER.items()]


def damaged(good: Path, room: Path, which: str, damage: Callable[[Path], object]) -> list[str]:
    """hf-to-himix's flags for good folders of which one is damaged in a copy."""
    (room / "in").mkdir()
    for file in (good / which).iterdir():
        (room / "in" / file.name).write_bytes(file.read_bytes())
    damage(room / "in")
    language = good / "single" if which == "tower" else room / "in"
    vision = room / "in" if which == "tower" else good / "tower"
    return ["--language", str(language), "--vision", str(vision), "--out", str(room / "new" / "run")]


@pytest.mark.parametrize(("which", "case"), [(w, c) for w, _, c in CASES], ids=[name for _, name, _ in CASES])
def test_bad_folders_are_named_and_leave_nothing(
    good: Path, tmp_path: Path, which: str, case: tuple[Callable[[Path], object], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = case
    monkeypatch.setattr("sys.argv", ["convert", "hf-to-himix", *damaged(good, tmp_path, which, damage)])
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        convert.main()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_the_command_ends_with_one_line_and_code_2(good: Path, tmp_path: Path) -> None:
    flags = damaged(good, tmp_path, "shards", SHARDED["missing shard"][0])
    command = [sys.executable, "-m", "tools.convert", "hf-to-himix", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_output_that_exists_is_left_alone(good: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(ValueError, match="exists: name a folder that does not"):
        conversions.hf_to_himix(convert.HfToHimix(language=good / "single", vision=good / "tower", out=tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_an_interrupted_conversion_leaves_nothing(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversions, "check_tower", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversions.hf_to_himix(
            convert.HfToHimix(language=good / "single", vision=good / "tower", out=tmp_path / "a" / "b" / "run")
        )
    assert list(tmp_path.iterdir()) == []


def test_what_lies_beside_the_output_is_left_alone(good: Path, tmp_path: Path) -> None:
    names = ["run.converting", "run.converting.writing", "run.converting-mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    conversions.hf_to_himix(convert.HfToHimix(language=good / "single", vision=good / "tower", out=tmp_path / "run"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", *names])
    assert all((tmp_path / name / "mine").is_file() for name in names)


def test_of_two_conversions_at_once_one_is_kept(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ends in one line, and takes away what it wrote alone."""
    arguments = convert.HfToHimix(language=good / "single", vision=good / "tower", out=tmp_path / "run")
    check, won = conversions.check_tower, []

    def while_the_other_ends(*given: Any) -> str:
        monkeypatch.setattr(conversions, "check_tower", check)
        with conversions._output(arguments.out) as beside:
            beside.mkdir()
            (beside / "other").touch()
        won.append(True)
        return check(*given)

    monkeypatch.setattr(conversions, "check_tower", while_the_other_ends)
    with pytest.raises(ValueError, match="was made by another process meanwhile"):
        conversions.hf_to_himix(arguments)
    assert won
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "other"]


def test_a_folder_in_the_hubs_cache_is_read_through_its_links(good: Path, tmp_path: Path) -> None:
    """The cache's snapshots hold links to files that lie outside of them."""
    for file in (good / "shards").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert set(open_folder(tmp_path)) == set(open_folder(good / "shards"))


def test_rotary_buffers_and_a_tied_head_stored_twice_are_passed_over(good: Path, tmp_path: Path) -> None:
    for file in (good / "single").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    twice = {"lm_head.weight": load_file(tmp_path / SINGLE)["model.embed_tokens.weight"].clone()}
    weights(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), **twice}))
    found = conversions.language_weights(tmp_path, conversions.read_language(tmp_path))
    assert set(found) == set(open_folder(good / "single"))


@pytest.mark.parametrize("change", ["gap", "overlap", "outside", "dtype", "shape", "dimensions", "text"])
def test_headers_that_lie_are_refused(tmp_path: Path, change: str) -> None:
    first = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    second = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    second |= {
        "gap": {"data_offsets": [12, 20]},
        "overlap": {"data_offsets": [4, 12]},
        "outside": {"data_offsets": [8, 1 << 40]},
        "dtype": {"dtype": "F31"},
        "shape": {"shape": [-2]},
        "dimensions": {"shape": [1] * 64 + [2]},
        "text": {"shape": "2"},
    }[change]
    header = json.dumps({"a": first, "b": second}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match="damaged"):
        open_file(path)
