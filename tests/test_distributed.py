"""The tests' own way to run a function on several ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_ranks


def _fail_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise KeyError("planted")
    torch.distributed.barrier()


def test_run_ranks_raises_with_the_failing_ranks_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(.|\n)*KeyError: 'planted'"):
        run_ranks(_fail_on_rank_one, 2)
