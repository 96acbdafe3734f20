"""Vision towers. Flows in: uint8 pixels; out: features that every decoder layer sees.

`base.py` says what a tower is, `config/towers.py` is the table of all towers, and each other file here builds one kind of them.
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import torch

from ...config import VisionConfig
from ...config.towers import TOWERS
from .base import Tower

__all__ = ["Tower", "build_tower", "tower_settings"]


def build_tower(config: VisionConfig, *, seed: int, dtype: torch.dtype) -> Tower:
    """The tower of a configuration on the CPU: from `config.path`, or with random weights that are a function of the seed.

    Every rank that calls this gets the same weights; no random generator of the caller moves.
    Raises: ValueError when the folder's sizes are not the configuration's, or its weights are incomplete.
    """
    if config.path is not None:
        return _tower_class(config).load(config, Path(config.path), dtype)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would move the accelerator's generators too.
        torch.default_generator.manual_seed(seed)
        return _tower_class(config).with_random_weights(config).to(dtype)


def tower_settings(config: VisionConfig) -> dict[str, Any]:
    """All settings of a tower under transformers' names. Raises: ValueError, as `build_tower`."""
    return _tower_class(config).settings(config)


def _tower_class(config: VisionConfig) -> type[Tower]:
    """Imported late: a tower's file may need transformers, which takes seconds."""
    found: type[Tower] = pkgutil.resolve_name(TOWERS[config.tower].build)
    return found
