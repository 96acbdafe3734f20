"""A short real run with everything that can be watched, which the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from himix_megatron.config import Config, ParallelConfig
from pipelines.recipes import RECIPES
from pipelines.scenes import SceneSettings, ensure_scene_data
from tests.support.ranks import run_ranks
from tests.support.small_runs import train


@pytest.fixture(scope="session")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The tiny recipe's model on two pipeline stages, on packs of a mixture of captions and questions, held-out questions
    beside it: 40 steps, reports every 10, pictures at 15, 30 and 40. Returns: its settings; `run_dir` is its folder."""
    folder = tmp_path_factory.mktemp("watched")
    scenes = ensure_scene_data(folder / "scenes", SceneSettings(num_train=300, num_heldout=24))
    recipe = RECIPES["tiny_instruct"]()
    config = replace(
        recipe,
        data=replace(
            recipe.data,
            datasets=(str(scenes / "align"), str(scenes / "instruct")),
            weights=(1.0, 3.0),
            validation_path=str(scenes / "heldout"),
            pack_max_text_tokens=256,
            pack_max_vision_tokens=216,
        ),
        train=replace(
            recipe.train,
            trainable_parts=("language", "vision_kv", "tower"),
            steps=40,
            global_batch_samples=None,
            global_batch_packs=4,
        ),
        parallel=ParallelConfig(pipeline=2, timeout_seconds=60),
        log=replace(
            recipe.log,
            interval_steps=10,
            validation_samples=16,
            ledger=True,
            predictions_interval_steps=15,
            peak_tflops=0.05,
            profile_steps=(35,),
        ),
        run=replace(recipe.run, dir=str(folder / "run")),
    )
    run_ranks(train, 2, config, start_gloo=False)
    return config


@pytest.fixture(scope="session")
def run_dir(watched_run: Config) -> Path:
    """The run's folder."""
    return watched_run.run_dir
