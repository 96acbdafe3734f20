"""Packing changes speed and nothing else: the same samples give the same losses and gradients, packed or not, at any layout.

The batch is the whole set, so that a packed step and an unpacked one hold the same samples: some with one image, with two and
with none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.config import Config
from himix_megatron.data.loading.plan import SamplingPlan
from himix_megatron.training.data_setup import make_plan
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, native, small_config, train

NUM_SAMPLES, NUM_PACKS = 40, 8
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 4": (4, {"pipeline": 4}),
    "pipeline 2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tensor 2, pipeline 2, data 2, distributed optimizer": (8, {"tensor": 2, "pipeline": 2, "distributed_optimizer": True}),
    "full recompute": (1, {"recompute": "full"}),
    "selective recompute": (1, {"recompute": "selective"}),
}
TRAINED = ("language", "vision_kv")


STEPS = {"fixed": 5, "native": 2}
Given = dict[str, tuple[Path, Path]]
"""For images of one size and of different sizes: the checkpoint that all start from, and the dataset."""


def config_for(data: Path, run: Path, *, packed: bool, parts: Any = TRAINED, shape: str = "fixed", **options: Any) -> Config:
    config = small_config(data, run, **{"parts": parts, "steps": STEPS[shape], **options})
    config = config if shape == "fixed" else native(config)
    if not packed:
        return replace(config, train=replace(config.train, global_batch_samples=NUM_SAMPLES))
    return replace(
        config,
        data=replace(config.data, pack_max_text_tokens=200, pack_max_vision_tokens=20 if shape == "fixed" else 41),
        train=replace(config.train, global_batch_samples=None, global_batch_packs=NUM_PACKS),
    )


def train_each(given: Given, folder: Path, options: dict[str, Any]) -> None:
    for shape, (start, data) in given.items():
        train(config_for(data, folder / shape, shape=shape, initial=start, **options))


@pytest.fixture(scope="module")
def given(mixed_dataset: Path, shapes_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    found = {}
    for shape, data in (("fixed", mixed_dataset), ("native", shapes_dataset)):
        folder = tmp_path_factory.mktemp(f"start-{shape}")
        run_ranks(train, 1, config_for(data, folder, packed=False, shape=shape, steps=1), start_gloo=False)
        found[shape] = folder, data
    return found


@pytest.fixture(scope="module")
def unpacked(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unpacked")
    run_ranks(train_each, 1, given, folder, {"packed": False}, start_gloo=False)
    return {shape: history(folder / shape) for shape in given}


def test_a_step_of_packs_is_the_whole_set(given: Given, tmp_path: Path) -> None:
    """What the comparisons below rest on."""
    for shape, (_, data) in given.items():
        config = config_for(data, tmp_path, packed=True, shape=shape)
        plan = make_plan(config, config.data)
        assert isinstance(plan, SamplingPlan)
        assert [len(plan.window(epoch, 0)) for epoch in range(5)] == [NUM_PACKS] * 5
        assert max(map(len, plan.window(0, 0))) > 4
        assert (shape == "fixed") == (len(set(plan.vision_tokens(slice(None)).tolist())) == 3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_training_equals_unpacked(name: str, given: Given, unpacked: dict[str, Any], tmp_path: Path) -> None:
    world_size, layout = LAYOUTS[name]
    run_ranks(train_each, world_size, given, tmp_path, {"packed": True, **layout}, start_gloo=False)
    for shape in given:
        assert_same(history(tmp_path / shape), unpacked[shape])


def test_packed_training_of_a_tower_equals_unpacked(given: Given, tmp_path: Path) -> None:
    for packed in (False, True):
        options = {"packed": packed, "parts": (*TRAINED, "tower"), "text_only_vision": "none"}
        run_ranks(train_each, 1, given, tmp_path / str(packed), options, start_gloo=False)
    for shape in given:
        assert_same(history(tmp_path / "True" / shape), history(tmp_path / "False" / shape))


def test_a_packed_run_continues_inside_a_window(mixed_dataset: Path, tmp_path: Path) -> None:
    """Stopped after 3 of 7 steps of 4 packs, in the middle of an epoch, and continued on two data ranks."""
    losses = []
    for name, stops in (("unbroken", [(1, 7)]), ("broken", [(1, 3), (2, 7)])):
        for ranks, steps in stops:
            config = config_for(mixed_dataset, tmp_path / name, packed=True)
            config = replace(config, train=replace(config.train, steps=steps, global_batch_packs=NUM_PACKS // 2))
            run_ranks(train, ranks, config, start_gloo=False)
        losses.append(history(tmp_path / name)["train/loss"])
    assert len(losses[0]) == 7
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def assert_same(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert len(found["train/loss"]) in STEPS.values()
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], abs=1e-5)
    assert found["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-4)
