"""Whether this project is right and fast on the GPU of a bare machine, in one command.

    python -m tools.gpu_check --out DIR                                      (everything; no network, no Ray)
    python -m tools.gpu_check --out DIR --stage correctness --budget-seconds 200
    python -m tools.gpu_check --out DIR --only cores layers

DIR gets results.jsonl (a header, then a line a number) and, where a check raised, errors.txt. Exit code 1 if a number is not
as wanted or a check failed. Without a GPU the same code runs with tiny sizes: `make gpu-check`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.cli import parse_settings, run_main

if TYPE_CHECKING:
    from tools.gpu_check.runner import Check

PARTS = ("correctness", "end_to_end", "performance", "training_run")
"""The modules whose CHECKS run, in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the check."""

    out: Path
    """Where results.jsonl and errors.txt go (the performance stage may add a few small files)."""
    stage: Literal["correctness", "performance", "all"] = "all"
    """Which checks run."""
    budget_seconds: float = 3600.0
    """A check that would not fit into what is left of this is skipped."""
    only: tuple[str, ...] = ()
    """Names of checks; empty: all of the stage."""


def load() -> tuple[list[Check], list[tuple[str, Exception]]]:
    """All checks, most important first, and the parts that cannot be imported, each with its error."""
    checks: list[Check] = []
    unusable: list[tuple[str, Exception]] = []
    for part in PARTS:
        if importlib.util.find_spec(f"tools.gpu_check.{part}") is None:
            continue
        try:
            checks += importlib.import_module(f"tools.gpu_check.{part}").CHECKS
        except Exception as error:  # a part that does not load must not take the others' turn on the machine
            unusable.append((part, error))
    return checks, unusable


def chosen(checks: list[Check], settings: Settings) -> list[Check]:
    """What `--stage` and `--only` leave. Raises: ValueError for a name that no check has."""
    names = [check.name for check in checks]
    if unknown := [name for name in settings.only if name not in names]:
        raise ValueError(f"--only {unknown[0]}: no check has this name, there are {', '.join(names)}")
    stages = ("correctness", "performance") if settings.stage == "all" else (settings.stage,)
    return [check for check in checks if check.stage in stages and (not settings.only or check.name in settings.only)]


def main() -> int:
    settings = parse_settings(Settings, sys.argv[1:], "python -m tools.gpu_check")
    deadline = time.monotonic() + settings.budget_seconds
    # Read when CUDA's libraries load. Without it Transformer Engine's products in fp32, and convolutions, are TF32, and the
    # checks in fp32 would find that. What is measured for speed is in bf16 and FP8.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

    import torch

    from himix_megatron import cpu
    from tools.gpu_check.runner import Context, run_checks

    cpu.activate_if_needed()  # before any part imports megatron-core

    checks, unusable = load()
    context = Context(settings.out.absolute(), not torch.cuda.is_available(), deadline)
    return run_checks(chosen(checks, settings), context, unusable)


if __name__ == "__main__":
    run_main(main)
