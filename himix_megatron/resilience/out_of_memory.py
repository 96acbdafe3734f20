"""Out of memory, said in one line that names the settings to lower. Flows in: the error; out: another one, with the remedy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..config import Config
from ..runtime.stop_signals import FAILED

logger = logging.getLogger(__name__)

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
"""What torch's allocators (CUDA, CPU) and the kernel write into a RuntimeError or an OSError."""


class OutOfMemory(SystemExit):
    """This rank is out of memory, and ends with exit code 1; a traceback would tell nothing more."""

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.code = FAILED


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Within it an allocation that fails becomes one line in the log. Raises: OutOfMemory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _SIGNS)):
            raise
        line = f"out of memory ({' '.join(str(error).split())[:160] or type(error).__name__}): {remedy(config)}"
        logger.error("%s", line)
        raise OutOfMemory(line) from None


def remedy(config: Config) -> str:
    """The settings that use less memory than these do, those that cost the least speed first."""
    train, parallel = config.train, config.parallel
    less = []
    if config.data.packs:
        less.append(f"--data.pack-max-text-tokens below {config.data.pack_max_text_tokens}")
        less.append(f"--data.pack-max-vision-tokens below {config.data.pack_max_vision_tokens}")
    elif train.micro_batch_samples > 1:
        less.append(f"--train.micro-batch-samples below {train.micro_batch_samples} (the result stays the same)")
    if not parallel.distributed_optimizer:
        less.append("--parallel.distributed-optimizer (with several data-parallel ranks)")
    if train.recompute != "full":
        less.append(f"--train.recompute {'selective or full' if train.recompute == 'none' else 'full'}")
    if train.precision == "fp32":
        less.append("--train.precision bf16")
    if parallel.tensor > 1 and not parallel.sequence:
        less.append("--parallel.sequence")
    less.append(f"--parallel.tensor above {parallel.tensor} or --parallel.pipeline above {parallel.pipeline}")
    less.append(f"--data.max-text-tokens below {config.data.max_text_tokens}")
    return "try " + ", ".join(less)
