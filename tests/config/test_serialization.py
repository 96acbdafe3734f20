"""config.json: what any version wrote is read, and what cannot be read is named in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from himix_megatron.checkpoint.manifest import Description, Position
from himix_megatron.config import Config, current_fields, from_json, read_config, to_json
from himix_megatron.config.serialization import COUNTED_IMAGES, RENAMED_FIELDS, VERSION
from himix_megatron.data.loading.plan import START
from himix_megatron.training.resume import _check_continues
from pipelines.recipes import RECIPES


def version_0(config: Config) -> dict[str, Any]:
    """config.json as it was before it had a version: old names in their old places, no number, and FP8 with a state."""
    tree: dict[str, Any] = json.loads(to_json(config))
    del tree["version"]
    for old, new in RENAMED_FIELDS.items():
        section, name = new.split(".")
        tree[section][old.split(".")[1]] = tree[section].pop(name)
    vision_tokens = tree["data"].pop("pack_max_vision_tokens")
    tree["data"]["pack_images"] = vision_tokens and vision_tokens // 729
    tree["data"]["too_long"] = {"truncate": "cut"}.get(tree["data"]["too_long"], tree["data"]["too_long"])
    tree["train"]["fp8"] = {"tensorwise": "hybrid"}.get(tree["train"]["fp8"], tree["train"]["fp8"])
    return tree


def test_settings_without_a_version_are_read_by_their_old_names() -> None:
    recipe = RECIPES["llama3_2_1b_instruct"]()
    for config in (
        recipe,
        replace(
            recipe,
            data=replace(recipe.data, datasets=("a", "b"), pack_max_text_tokens=4096, pack_max_vision_tokens=16 * 729),
            train=replace(recipe.train, global_batch_samples=None, global_batch_packs=8, fp8="tensorwise"),
            checkpoint=replace(recipe.checkpoint, init_from="runs/start"),
            run=replace(recipe.run, ignore_stop_file=True),
        ),
    ):
        tree = version_0(config)
        for old in ("attention", "text_only"):
            assert old in tree["model"]
        assert {"path", "stream", "too_long", "pack_text_tokens", "pack_images"} <= tree["data"].keys()
        assert tree["data"]["too_long"] == "cut"
        assert from_json(json.dumps(tree)) == config


@pytest.mark.parametrize(("images", "vision_tokens"), [(26, 18954), (None, None)])
def test_a_packs_budget_in_images_is_read_as_one_in_vision_tokens(images: int | None, vision_tokens: int | None) -> None:
    recipe = RECIPES["llama3_2_1b_instruct"]()
    data = replace(recipe.data, pack_max_text_tokens=images and 8192, pack_max_vision_tokens=vision_tokens)
    train = replace(recipe.train, global_batch_samples=None, global_batch_packs=8) if images else recipe.train
    config = replace(recipe, data=data, train=train)
    tree = json.loads(to_json(config))
    assert "pack_max_images" not in tree["data"]
    del tree["data"]["pack_max_vision_tokens"]
    tree["data"]["pack_max_images"] = images
    assert from_json(json.dumps(tree | {"version": 1})) == config
    assert from_json(json.dumps(version_0(config))) == config
    with pytest.raises(ValueError, match=r"it has a field data\.pack_max_images, which this program does not know"):
        from_json(json.dumps(tree))


def test_a_checkpoint_with_a_budget_in_images_continues_at_as_many_vision_tokens(tmp_path: Path) -> None:
    recipe = RECIPES["llama3_2_1b_instruct"]()
    names = {"data.pack_max_text_tokens": 8192, "train.seed": 1}

    def check(stored: dict[str, Any], vision_tokens: int | None) -> None:
        description = Description(
            position=Position(step=3, place=START, data=names | stored),
            parts=recipe.train.trainable_parts,
            architecture={},
            distributed_optimizer=True,
            tower=None,
            validation_loss=None,
        )
        plan: Any = SimpleNamespace(fingerprint_fields=lambda: names | {"data.pack_max_vision_tokens": vision_tokens})
        _check_continues(recipe, plan, tmp_path, description)

    for old in COUNTED_IMAGES:
        check({old: 26}, 26 * 729)
        check({old: None}, None)
        with pytest.raises(
            ValueError, match=r"pack_max_vision_tokens changed from 18954 to 18955, which changes the data order"
        ):
            check({old: 26}, 18955)
    check({"data.pack_max_vision_tokens": 18955}, 18955)


def test_a_run_begun_when_texts_could_hold_control_tokens_continues_where_its_order_stays(tmp_path: Path) -> None:
    recipe = RECIPES["llama3_2_1b_instruct"]()
    packed = replace(recipe.data, pack_max_text_tokens=8192, pack_max_vision_tokens=18954)
    description = Description(
        position=Position(step=3, place=START, data={"data.tokenizer": "abc"}),
        parts=recipe.train.trainable_parts,
        architecture={},
        distributed_optimizer=True,
        tower=None,
        validation_loss=None,
    )

    def check(config: Config, tokenizer: str) -> None:
        plan: Any = SimpleNamespace(fingerprint_fields=lambda: {"data.tokenizer": tokenizer})
        _check_continues(config, plan, tmp_path, description)

    check(recipe, "2-abc")
    with pytest.raises(ValueError, match=r"data\.tokenizer changed from abc to 2-abd"):
        check(recipe, "2-abd")
    train = replace(recipe.train, global_batch_samples=None, global_batch_packs=8)
    for data in (packed, replace(recipe.data, overlong="drop")):
        with pytest.raises(ValueError, match=r"names of control tokens in texts are text now.*--checkpoint\.init-from"):
            check(replace(recipe, data=data, train=train if data.packs else recipe.train), "2-abc")


def test_an_old_name_is_no_name_of_today() -> None:
    for old, new in RENAMED_FIELDS.items():
        assert current_fields({old: 1}) == current_fields({new: 1}) == {new: 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": VERSION + 1}, f"config.json has version {VERSION + 1}: this program reads versions 0 to {VERSION}"),
        ({"version": "new"}, "config.json has version new"),
        ({"video": {}}, "config.json: it has a field video, which this program does not know"),
        ({"run": {"dir": None, "stepz": 3}}, "config.json: it has a field run.stepz, which this program does not know"),
        ({"run": 3}, "config.json: run is 3, wanted an object"),
        ({"optimizer": {}}, "config.json: the field optimizer.learning_rate is missing"),
        ({"parallel": {"tensor": "two"}}, 'config.json: parallel.tensor is "two", wanted a whole number'),
        ({"parallel": {"tensor": 0}}, "config.json: parallel.tensor is 0, wanted 1 or more"),
        ({"data": []}, "config.json: data is a list, wanted an object"),
        ({"model": None}, "config.json: model is null, wanted an object"),
        ({"recipe": 5}, "config.json: recipe is 5, wanted text"),
        ({"version": []}, r"config.json has version \[\]"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(changes: dict[str, Any], said: str) -> None:
    tree = json.loads(to_json(RECIPES["tiny_align"]())) | changes
    with pytest.raises(ValueError, match=said) as caught:
        from_json(json.dumps(tree))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("train.precision", "fp4", "one of"),
        ("model.layer_spec", "nosuch", "one of"),
        ("vision.interpolation", "lanczos", "one of"),
        ("model.text_only_vision", "foo", "one of"),
        ("data.template", "nosuch", "one of"),
        ("data.tokenizer", 5, "text"),
        ("data.tokenizer", None, "text"),
        ("train.seed", "abc", "a whole number"),
        ("model.num_layers", "4", "a whole number"),
        ("model.num_layers", None, "a whole number"),
        ("data.datasets", "shards", "a list"),
        ("vision.pixel_mean", [0.5], "a list of 3"),
        ("optimizer.learning_rate", [], "a number"),
    ],
)
@pytest.mark.parametrize("version", [0, VERSION])
def test_a_value_of_another_type_is_named_with_its_file(
    tmp_path: Path, version: int, field: str, value: Any, wanted: str
) -> None:
    tree: dict[str, Any] = json.loads(to_json(RECIPES["tiny_align"]()))
    section, name = field.split(".")
    assert name in tree[section]
    tree[section][name] = value
    if not version:
        del tree["version"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json: {field} is .*, wanted {wanted}"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "{}", "[" * 100_000])
def test_another_file_is_no_config(text: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json"):
        from_json(text)
