"""Check in one command that this project is correct and fast on the GPU of a bare machine.

    python -m tools.gpu_check --out DIR                                      (everything on one GPU; no network, no Ray)
    python -m tools.gpu_check --out DIR --gpus 8                             (also layouts of 8 ranks, compared with one)
    python -m tools.gpu_check --out DIR --stage correctness --budget-seconds 200
    python -m tools.gpu_check --out DIR --only core-te-bf16 layer-te-bf16

DIR gets results.jsonl (a header, then a line a number) and, where a check raised, errors.txt. Exit code 1 if a number is not
as wanted or a check failed, 2 for a mistake in the flags. Without a GPU the same code runs with tiny sizes: `make gpu-check`.
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

from himix_megatron.config import Count
from pipelines.cli import parse_settings, run_main

if TYPE_CHECKING:
    from tools.gpu_check.runner import Check


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Check correctness and speed on this machine's GPU."""

    out: Path
    """Folder for results.jsonl and errors.txt (the performance stage adds a few small files)."""
    stage: Literal["correctness", "performance", "all"] = "all"
    """Stage whose checks run."""
    budget_seconds: float = 3600.0
    """Time budget. On a GPU a check starts only if its estimated time is left; otherwise it is reported as skipped. Processes
    that checks started are killed when the budget ends; a check inside this process runs to its end."""
    only: tuple[str, ...] = ()
    """Names of checks to run. Empty: all of the stage."""
    gpus: Count = 1
    """Number of GPUs. N above 1 adds the check `layouts` to the correctness stage: a tiny model trains in fp32 on one GPU and
    on N (tensor and sequence parallel, pipeline parallel, data parallel with the distributed optimizer, and for an even N of at
    least 4 a mixture); losses and gradient norms must equal one GPU's. Uses NCCL; without a GPU, N processes over gloo."""


def quiet() -> None:
    """Keep the libraries' notes to their developers out of the results, here and in processes that are started."""
    os.environ |= {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.ERROR)


def check_gpus(wanted: int, found: int) -> None:
    """Raises: ValueError if there are fewer GPUs. `found`: 0 where there is none; processes then replace them."""
    if 0 < found < wanted:
        raise ValueError(f"--gpus is {wanted}, but this machine shows {found}: give --gpus {found}, or show it more of them")


def chosen(checks: list[Check], settings: Settings) -> list[Check]:
    """What `--stage`, `--only` and `--gpus` leave. Raises: ValueError for a name that no check has."""
    names = [check.name for check in checks]
    if unknown := [name for name in settings.only if name not in names]:
        raise ValueError(f"--only {unknown[0]}: no check has this name, there are {', '.join(names)}")
    if few := [check.name for check in checks if check.gpus > settings.gpus and check.name in settings.only]:
        raise ValueError(f"--only {few[0]}: it sets several ranks beside one, give --gpus 2 or more")
    stages = ("correctness", "performance") if settings.stage == "all" else (settings.stage,)
    fit = [check for check in checks if check.stage in stages and check.gpus <= settings.gpus]
    return [check for check in fit if not settings.only or check.name in settings.only]


def main() -> int:
    settings = parse_settings(Settings, sys.argv[1:], "python -m tools.gpu_check", __doc__)
    deadline = time.monotonic() + settings.budget_seconds
    # Read when CUDA's libraries load. Without it Transformer Engine's products in fp32, and convolutions, are TF32, and the
    # checks in fp32 would find that. What is measured for speed is in bf16 and FP8.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    quiet()

    import torch

    from himix_megatron.distributed import cpu_backend
    from pipelines.quickstart import num_gpus

    check_gpus(settings.gpus, num_gpus())
    cpu_backend.activate_if_needed()  # before any part imports megatron-core

    from tools.gpu_check import correctness, end_to_end, layouts, performance, training_run
    from tools.gpu_check.runner import Context, run_checks

    parts = (correctness, layouts, end_to_end, performance, training_run)
    checks = chosen([check for part in parts for check in part.CHECKS], settings)
    return run_checks(checks, Context(settings.out.absolute(), not torch.cuda.is_available(), deadline, settings.gpus))


if __name__ == "__main__":
    run_main(main)
