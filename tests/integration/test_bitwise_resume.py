"""A run continued from its checkpoint is the run that was never stopped, to the bit: losses, gradient norms, all that is saved.

For each layout one unbroken run keeps a checkpoint of every step. Ranks that were started anew continue from 20 of them, each
time as a run of its own that knows nothing but that checkpoint.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from himix_megatron.checkpoint.manifest import complete_checkpoints
from himix_megatron.config import Config
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config, train
from tests.support.traces import hash_of, samples_of, steps_of

STEPS = 24
RESUMES = 20
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
}


def tiny(data: Path, run: Path, steps: int, **layout: Any) -> Config:
    """2 layers, 4 samples a step; a checkpoint of every step, and all are kept."""
    config = small_config(data, run, parts=("language", "vision_kv"), steps=steps, **layout)
    return replace(
        config,
        model=replace(config.model, num_layers=2),
        train=replace(config.train, global_batch_samples=4),
        checkpoint=replace(config.checkpoint, interval_steps=1, keep_last=STEPS),
        log=replace(config.log, ledger=True),
    )


def train_all(configs: list[Config]) -> None:
    """One run after the other in the same ranks: what one leaves behind in them may not reach the next."""
    for config in configs:
        train(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_continues_bitwise_from_20_random_steps(name: str, mixed_dataset: Path, tmp_path: Path) -> None:
    ranks, layout = LAYOUTS[name]
    unbroken = tmp_path / "unbroken"
    run_ranks(train, ranks, tiny(mixed_dataset, unbroken, STEPS, **layout), start_gloo=False)
    trace, samples = steps_of(unbroken), samples_of(unbroken)
    assert list(trace) == list(range(1, STEPS + 1))
    hashes = {step: hash_of(unbroken / "checkpoints" / f"step-{step:08d}") for step in trace}
    assert len(set(hashes.values())) == STEPS  # each step changes what is saved, and the hash sees it

    chosen = random.Random(name).sample(range(1, STEPS), RESUMES)
    resumed = {}
    for start in chosen:
        # From one checkpoint to 2 steps on, whose own checkpoint is where others start: so all of the way is covered.
        run = tmp_path / f"from-{start}"
        kept = Path("checkpoints") / f"step-{start:08d}"
        shutil.copytree(unbroken / kept, run / kept)
        shutil.copytree(unbroken / "towers", run / "towers")
        resumed[start] = tiny(mixed_dataset, run, min(start + 2, STEPS), **layout)
    run_ranks(train_all, ranks, list(resumed.values()), start_gloo=False)

    for start, config in resumed.items():
        end = config.train.steps
        assert end is not None
        again = range(start + 1, end + 1)
        assert steps_of(config.run_dir) == {step: trace[step] for step in again}, start
        assert samples_of(config.run_dir) == {step: samples[step] for step in again}, start
        saved = complete_checkpoints(config.run_dir)
        assert [hash_of(folder) for folder in saved] == [hashes[step] for step in (start, *again)], start
