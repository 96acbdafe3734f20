"""Runs that are struck while they save."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from himix_megatron.config import Config
from himix_megatron.runtime import failpoints

from .small_runs import small_config, train

POINTS = ("begin", "snapshot", "tensors", "description", "sync", "manifest", "rename", "tracker", "prune")
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "data 2 distributed": {"distributed_optimizer": True},
    "tensor 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
}


def saving_config(data: Path, run: Path, *, steps: int, layout: dict[str, Any] | None = None, **checkpoint: Any) -> Config:
    """A small run of 2 samples a step that saves after each of its steps."""
    config = small_config(data, run, parts=("language", "vision_kv"), steps=steps, **(layout or {}))
    return replace(
        config,
        model=replace(config.model, num_layers=2),
        train=replace(config.train, global_batch_samples=2, micro_batch_samples=1),
        checkpoint=replace(config.checkpoint, **({"interval_steps": 1} | checkpoint)),
        health=replace(config.health, max_starts_without_progress=1000),
    )


def at(point: str, action: Callable[[int], None], rank: int | None = None) -> None:
    """Let this process, if it is that rank, call `action(times)` each time that it comes to a point of a save."""
    if rank is not None and int(os.environ["RANK"]) != rank:
        return
    times = itertools.count(1)

    def act(reached: str, _: bool) -> None:
        if reached == f"save/{point}":
            action(next(times))

    failpoints.listeners.append(act)


def train_killed(config: Config, point: str, rank: int, save: int) -> None:
    """Train until a rank is killed with -9 at a point of its save with this number (from 1)."""
    at(point, lambda times: os.kill(os.getpid(), signal.SIGKILL) if times == save else None, rank)
    train(config)
