"""Whether this project is right and fast on the GPU of a bare machine, in one command.

    python -m tools.gpu_check --out DIR                                      (everything; no network, no Ray)
    python -m tools.gpu_check --out DIR --stage correctness --budget-seconds 200
    python -m tools.gpu_check --out DIR --only core-te-bf16 layer-te-bf16

DIR gets results.jsonl (a header, then a line a number) and, where a check raised, errors.txt. Exit code 1 if a number is not
as wanted or a check failed. Without a GPU the same code runs with tiny sizes: `make gpu-check`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelines.cli import parse_settings, run_main

if TYPE_CHECKING:
    from tools.gpu_check.runner import Check


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the check."""

    out: Path
    """Where results.jsonl and errors.txt go (the performance stage adds a few small files)."""
    stage: Literal["correctness", "performance", "all"] = "all"
    """Which checks run."""
    budget_seconds: float = 3600.0
    """A check that would not fit into what is left of this is skipped."""
    only: tuple[str, ...] = ()
    """Names of checks; empty: all of the stage."""


def quiet() -> None:
    """Keep the libraries' notes to their developers out of the results, here and in processes that are started."""
    os.environ |= {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.ERROR)


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
    quiet()

    import torch

    from himix_megatron import cpu

    cpu.activate_if_needed()  # before any part imports megatron-core

    from tools.gpu_check import correctness, end_to_end, performance, training_run
    from tools.gpu_check.runner import Context, run_checks

    checks = [check for part in (correctness, end_to_end, performance, training_run) for check in part.CHECKS]
    return run_checks(chosen(checks, settings), Context(settings.out.absolute(), not torch.cuda.is_available(), deadline))


if __name__ == "__main__":
    run_main(main)
