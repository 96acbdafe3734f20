"""All ranks come to the same answer about a checkpoint, while training continues.

Flows in: what each rank does or found; out: everybody's answer, or the same error on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class SaveError(RuntimeError):
    """A rank could not do its part; raised on all ranks, naming the first one."""


class ControlGroup:
    """A gloo group of all ranks that only checkpoints use, from one thread of each rank at a time.

    Its own group, because a save that is written during training would otherwise mix its messages with the steps'. gloo,
    because what is exchanged is small and in host memory.
    """

    def __init__(self, timeout_seconds: float):
        self.timeout = timedelta(seconds=timeout_seconds)
        self.group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def on_all_ranks(self, part: Callable[[], T]) -> list[T]:
        """Every rank does its part. Returns: the results by rank. Raises: SaveError on all ranks if one failed."""
        result: T | None = None
        failure = None
        try:
            result = part()
        except (OSError, RuntimeError, MemoryError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (failure, result), group=self.group)
        for rank, (failed, _) in enumerate(answers):
            if failed is not None:
                raise SaveError(f"rank {rank}: {failed}")
        return [answer for _, answer in answers]

    def on_rank_zero(self, part: Callable[[], T]) -> T:
        """Rank 0 does it. Returns: its result, on every rank. Raises: as `on_all_ranks`."""
        answer = self.on_all_ranks(lambda: part() if self.rank == 0 else None)[0]
        return answer  # type: ignore[return-value]
