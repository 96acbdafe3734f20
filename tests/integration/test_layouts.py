"""One training, however the model is cut: the same losses and gradient norms at every layout of ranks.

From one checkpoint, some steps at a constant learning rate of 1e-3 in fp32, in both stages, on batches that hold samples
with one image, two images and none, of one size or of many.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.config import Config, InjectionConfig
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, native, small_config, train

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 4": (4, {"pipeline": 4}),
    "pipeline 2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "data 2": (2, {}),
    "data 2, distributed optimizer": (2, {"distributed_optimizer": True}),
    "pipeline 2, balanced": (2, {"pipeline": 2, "split": "balanced"}),
    "pipeline 2 interleaved, balanced": (2, {"pipeline": 2, "virtual_pipeline": 2, "split": "balanced"}),
    "data 2, overlap": (2, {"overlap": "on"}),
    "pipeline 2 interleaved, data 2, distributed optimizer, overlap": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True, "overlap": "on"},
    ),
    "tensor 2, pipeline 2, data 2, distributed optimizer": (8, {"tensor": 2, "pipeline": 2, "distributed_optimizer": True}),
}
RECOMPUTE = {
    "full recompute": (1, {"recompute": "full"}),
    "full recompute, tensor 2, sequence": (2, {"recompute": "full", "tensor": 2, "sequence": True}),
    "selective recompute, pipeline 2": (2, {"recompute": "selective", "pipeline": 2}),
}
STAGES = {"align": ("vision_kv",), "instruct": ("language", "vision_kv")}
# The two ways of a sample without an image, one in each stage.
TEXT_ONLY = {"align": "none", "instruct": "zero_image"}


TOWERS = {"fixed": 10, "native": 2}
"""Steps with images of one size, and with images of different numbers of tokens."""
Given = dict[str, tuple[Path, Path]]
"""For each tower the checkpoint that every layout starts from, and the dataset."""
CASES = [f"{tower} {stage}" for tower in TOWERS for stage in STAGES]


def config_of(tower: str, data: Path, run: Path, **options: Any) -> Config:
    config = small_config(data, run, **{"steps": TOWERS[tower], **options})
    return native(config) if tower == "native" else config


def both_stages(given: Given, folder: Path, layout: dict[str, Any]) -> None:
    for tower, (start, data) in given.items():
        for stage, parts in STAGES.items():
            options = {"parts": parts, "text_only_vision": TEXT_ONLY[stage], "initial": start, **layout}
            train(config_of(tower, data, folder / f"{tower} {stage}", **options))


@pytest.fixture(scope="module")
def given(mixed_dataset: Path, shapes_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    found = {}
    for tower, data in (("fixed", mixed_dataset), ("native", shapes_dataset)):
        folder = tmp_path_factory.mktemp(f"start-{tower}")
        run_ranks(train, 1, config_of(tower, data, folder, parts=("language", "vision_kv"), steps=1), start_gloo=False)
        found[tower] = folder, data
    return found


@pytest.fixture(scope="module")
def one_rank(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one-rank")
    run_ranks(both_stages, 1, given, folder, {}, start_gloo=False)
    return {case: history(folder / case) for case in CASES}


@pytest.mark.parametrize("name", LAYOUTS | RECOMPUTE)
def test_layout_trains_as_one_rank(name: str, given: Given, one_rank: dict[str, Any], tmp_path: Path) -> None:
    world_size, layout = (LAYOUTS | RECOMPUTE)[name]
    run_ranks(both_stages, world_size, given, tmp_path, layout, start_gloo=False)
    for case in CASES:
        assert_same(history(tmp_path / case), one_rank[case])


def test_one_rank_learns(one_rank: dict[str, Any]) -> None:
    # What the layouts are compared with is no standstill: instruct learns, and align (random features) has gradients to follow.
    for tower, steps in TOWERS.items():
        losses = one_rank[f"{tower} instruct"]["train/loss"]
        assert len(losses) == steps
        assert losses[-1] < losses[0] - 0.04 * steps, losses
        assert min(one_rank[f"{tower} align"]["train/grad_norm"]) > 0.05


def assert_same(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], abs=1e-5)
    assert found["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=1e-4)


TOWER_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "data 2, distributed optimizer": (2, {"distributed_optimizer": True}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    # Stages and chunks of unequal size: a distributed optimizer cuts the tower's replicas at other places on each.
    "pipeline 2 interleaved, data 2, distributed optimizer": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True},
    ),
}
ALL_PARTS = ("vision_kv", "language", "tower")
SHARED = InjectionConfig(
    layers=(1, 2), adapter="shared", position="learned", keys_values="text", norm="input", visibility="earlier"
)
"""Parts in front of the layers, of which only some stages and chunks have a replica."""
WITH_REPLICAS = (*TOWERS, "shared adapter")


def each_tower(given: Given, folder: Path, layout: dict[str, Any]) -> None:
    for tower, (start, data) in given.items():
        train(config_of(tower, data, folder / tower, parts=ALL_PARTS, initial=start, **layout))
    # Drawn by their names, fresh weights are the same at every layout: no checkpoint is needed to begin with.
    config = small_config(given["fixed"][1], folder / "shared adapter", parts=("vision_kv", "language"), steps=4, **layout)
    train(replace(config, injection=SHARED, train=replace(config.train, initialization="by_name")))


@pytest.fixture(scope="module")
def one_rank_with_tower(given: Given, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one-rank-tower")
    run_ranks(each_tower, 1, given, folder, {}, start_gloo=False)
    return {case: history(folder / case) for case in WITH_REPLICAS}


@pytest.mark.parametrize("name", TOWER_LAYOUTS)
def test_what_stages_have_replicas_of_trains_as_on_one_rank(
    name: str, given: Given, one_rank_with_tower: dict[str, Any], tmp_path: Path
) -> None:
    world_size, layout = TOWER_LAYOUTS[name]
    run_ranks(each_tower, world_size, given, tmp_path, layout, start_gloo=False)
    for case in WITH_REPLICAS:
        assert_same(history(tmp_path / case), one_rank_with_tower[case])
