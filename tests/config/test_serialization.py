"""config.json: what any version wrote is read, and what cannot be read is named in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from himix_megatron.config import Config, current_fields, from_json, to_json
from himix_megatron.config.serialization import RENAMED_FIELDS, VERSION
from pipelines.recipes import RECIPES


def version_0(config: Config) -> dict[str, Any]:
    """config.json as it was before it had a version: old names in their old places, no number, and FP8 with a state."""
    tree: dict[str, Any] = json.loads(to_json(config))
    del tree["version"]
    for old, new in RENAMED_FIELDS.items():
        section, name = new.split(".")
        tree[section][old.split(".")[1]] = tree[section].pop(name)
    tree["data"]["too_long"] = {"truncate": "cut"}.get(tree["data"]["too_long"], tree["data"]["too_long"])
    tree["train"]["fp8"] = {"tensorwise": "hybrid"}.get(tree["train"]["fp8"], tree["train"]["fp8"])
    return tree


def test_settings_without_a_version_are_read_by_their_old_names() -> None:
    recipe = RECIPES["llama3_2_1b_instruct"]()
    for config in (
        recipe,
        replace(
            recipe,
            data=replace(recipe.data, datasets=("a", "b"), pack_max_text_tokens=4096, pack_max_images=16),
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


def test_an_old_name_is_no_name_of_today() -> None:
    for old, new in RENAMED_FIELDS.items():
        assert current_fields({old: 1}) == current_fields({new: 1}) == {new: 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": VERSION + 1}, f"config.json has version {VERSION + 1}: this program reads versions 0 and {VERSION}"),
        ({"version": "new"}, "config.json has version new"),
        ({"video": {}}, "config.json has a field video, which this program does not know"),
        ({"run": {"dir": None, "stepz": 3}}, "config.json has a field run.stepz, which this program does not know"),
        ({"run": 3}, "config.json: run is 3, wanted an object with fields"),
        ({"optimizer": {}}, "config.json: optimizer cannot be read: .*missing 1 required .*learning_rate"),
        ({"parallel": {"tensor": "two"}}, "config.json: parallel cannot be read"),
        ({"parallel": {"tensor": 0}}, "parallel.tensor is 0: wanted 1 or more"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(changes: dict[str, Any], said: str) -> None:
    tree = json.loads(to_json(RECIPES["tiny_align"]())) | changes
    with pytest.raises(ValueError, match=said) as caught:
        from_json(json.dumps(tree))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_another_file_is_no_config(text: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json"):
        from_json(text)
