"""A run continues on other ranks than it began on: the same weights and moments to the bit, the same samples, the same losses.

All runs start from the same weights, and do 10 steps at a constant learning rate of 1e-3 in fp32. The first ones are done at
one layout, the others at the next; what comes out is compared with 10 steps on one rank.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.checkpoint.checkpointer import Checkpoints
from himix_megatron.checkpoint.manifest import complete_checkpoints
from himix_megatron.config import Config, RunConfig
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config, train
from tests.support.traces import samples_of, steps_of, tensors_of

STEPS = 10
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "data 2": (2, {}),
    "data 4": (4, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2, data 2": (4, {"tensor": 2}),
    "pipeline 2, data 2": (4, {"pipeline": 2}),
}
PAIRS = [
    ("tensor 2", "pipeline 2"),
    ("pipeline 2", "tensor 2, sequence"),
    ("tensor 2, pipeline 2", "data 2"),
    ("data 2", "tensor 2, pipeline 2"),
    ("pipeline 2 interleaved", "tensor 2"),
    ("tensor 2", "pipeline 2 interleaved"),
    ("1 rank", "pipeline 2, data 2"),
    ("data 2", "1 rank", "data 4"),
]
DIVIDED = [  # with a distributed optimizer
    ("data 2", "1 rank", "data 4"),
    ("tensor 2", "pipeline 2"),
    ("data 2", "pipeline 2 interleaved"),
    ("pipeline 2 interleaved", "tensor 2, data 2"),
    ("tensor 2, data 2", "data 2"),
    ("pipeline 2, data 2", "tensor 2, sequence"),
]
CHAINS = [(chain, False) for chain in PAIRS] + [(chain, True) for chain in DIVIDED]


def at(layout: str, start: Path, data: Path, run: Path, steps: int, *, divided: bool) -> Config:
    config = small_config(
        data, run, parts=("language", "vision_kv"), initial=start, steps=steps, distributed_optimizer=divided,
        **LAYOUTS[layout][1],
    )  # fmt: skip
    return replace(config, log=replace(config.log, ledger=True))


def save_again(config: Config, folder: Path) -> None:
    """What these ranks hold after restoring the run's newest checkpoint, saved as the checkpoint of another folder."""
    from himix_megatron.config import check_ranks
    from himix_megatron.distributed.launch import check_launch
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.training.builder import build_components
    from himix_megatron.training.data_setup import prepare_inputs
    from himix_megatron.training.resume import expected_checkpoint, restore_or_initialize

    launch = check_launch(config)
    start = prepare_inputs(config, check_ranks(config, launch.world_size))
    topology = init_distributed(config.parallel, seed=config.train.seed, launch=launch)
    run = build_components(config, start, topology)
    position = restore_or_initialize(config, start, expected_checkpoint(config, start.plan), run.checkpoints)
    elsewhere = replace(config, run=RunConfig(dir=str(folder)))
    checkpoints = Checkpoints(elsewhere, run.model_chunks, run.optimizer, run.checkpoints.frozen_tower)
    checkpoints.save(position)
    checkpoints.close()
    shutdown_distributed()


def move(config: Config, folder: Path) -> None:
    """On the ranks that a run has come to: show what arrived, then train on."""
    save_again(config, folder)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    train(config)


@pytest.fixture(scope="module")
def start(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that every run starts from."""
    folder = tmp_path_factory.mktemp("start")
    run_ranks(train, 1, small_config(mixed_dataset, folder, parts=("language", "vision_kv"), steps=1), start_gloo=False)
    return folder


@pytest.fixture(scope="module")
def one_rank(start: Path, mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that stays where it is."""
    folder = tmp_path_factory.mktemp("one-rank")
    run_ranks(train, 1, at("1 rank", start, mixed_dataset, folder, STEPS, divided=False), start_gloo=False)
    return folder


@pytest.fixture(scope="module")
def begun(start: Path, mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """The first 4 steps at each layout that some run begins at."""
    runs: dict[tuple[str, bool], Path] = {}
    for ranks in (1, 2, 4):
        configs = []
        for layout, divided in sorted({(chain[0], divided) for chain, divided in CHAINS}):
            if LAYOUTS[layout][0] == ranks:
                runs[layout, divided] = tmp_path_factory.mktemp("begun")
                configs.append(at(layout, start, mixed_dataset, runs[layout, divided], 4, divided=divided))
        if configs:
            run_ranks(train_all, ranks, configs, start_gloo=False)
    return runs


def train_all(configs: list[Config]) -> None:
    for config in configs:
        train(config)


@pytest.mark.parametrize(
    ("chain", "divided"), CHAINS, ids=[f"{' to '.join(c)}{', distributed optimizer' if d else ''}" for c, d in CHAINS]
)
def test_a_run_moves_to_other_ranks_unchanged(
    chain: tuple[str, ...],
    divided: bool,
    start: Path,
    one_rank: Path,
    begun: dict[tuple[str, bool], Path],
    mixed_dataset: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun[chain[0], divided], run)
    ends = [7, STEPS][-len(chain[1:]) :]
    for layout, end in zip(chain[1:], ends, strict=True):
        before = tensors_of(complete_checkpoints(run)[-1])
        arrived = tmp_path / layout
        config = at(layout, start, mixed_dataset, run, end, divided=divided)
        run_ranks(move, LAYOUTS[layout][0], config, arrived, start_gloo=False)
        after = tensors_of(complete_checkpoints(arrived)[-1])
        assert after.keys() == before.keys()
        assert any(name.startswith("optimizer.") and "exp_avg_sq" in name for name in after)
        assert [name for name in after if not torch.equal(after[name], before[name])] == []
    assert samples_of(run) == samples_of(one_rank)
    losses, wanted = ([float.fromhex(loss) for loss, _ in steps_of(folder).values()] for folder in (run, one_rank))
    assert len(losses) == STEPS
    assert losses == pytest.approx(wanted, abs=1e-5)


def test_at_least_twelve_moves_are_shown() -> None:
    assert sum(len(chain) - 1 for chain, _ in CHAINS) >= 12
