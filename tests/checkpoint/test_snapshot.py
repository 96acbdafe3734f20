"""Copies of the state in host memory take little more than the state, and a rank that has no memory for them says so to all."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from himix_megatron.checkpoint.manifest import complete_checkpoints
from himix_megatron.checkpoint.snapshot import HostCopies, PinnedPool
from himix_megatron.config import Config, ParallelConfig
from himix_megatron.costs.memory import padded_vocab
from pipelines.recipes import RECIPES
from tests.support.interrupted_saves import LAYOUTS, saving_config
from tests.support.ranks import run_ranks
from tests.support.small_runs import train


def state_shapes(recipe: str) -> list[tuple[int, ...]]:
    """A decoder's parameters, roughly in their order."""
    config = RECIPES[recipe]()
    model = config.model
    hidden, head = model.hidden_size, model.channels_per_head
    queries, groups = model.num_attention_heads * head, 2 * model.num_query_groups * head
    layer = [
        (hidden,), (queries + groups, hidden), (hidden, queries), (groups, 1152), (1152,), (hidden,),
        (2 * model.ffn_hidden_size, hidden), (hidden, model.ffn_hidden_size),
    ]  # fmt: skip
    table = (padded_vocab(replace(config, parallel=ParallelConfig())), hidden)
    return [table, *layer * model.num_layers, (hidden,), *([] if model.tie_embeddings else [table])]


@pytest.mark.parametrize("recipe", sorted(name for name in RECIPES if name.endswith("instruct")))
def test_blocks_of_powers_of_two_are_filled(recipe: str) -> None:
    """torch rounds each pinned allocation up to one. The state: bf16 weights; main weights and two moments in fp32."""
    sizes: list[int] = []
    asked = 0

    def allocate(size: int) -> Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)  # address space only: nothing is written

    room = PinnedPool(allocate)
    for dtype, times in ((torch.bfloat16, 1), (torch.float32, 3)):
        for shape in state_shapes(recipe) * times:
            given = torch.empty(shape, dtype=dtype, device="meta")
            asked += given.nbytes
            room.empty_like(given)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sum(sizes) <= max(1.1 * asked, PinnedPool.SMALLEST)


def test_what_is_laid_into_a_block_is_as_if_allocated_alone() -> None:
    room = PinnedPool(lambda size: torch.full((size,), 7, dtype=torch.uint8))
    given = [
        torch.randn(3, 5), torch.tensor(2.5), torch.randn(7).bfloat16(), torch.arange(4), torch.empty(0, 2),
        torch.randn(2, 3, dtype=torch.float64),
    ]  # fmt: skip
    copies = [room.empty_like(tensor).copy_(tensor) for tensor in given]
    for own, wanted in zip(copies, given, strict=True):
        assert torch.equal(own, wanted)
        assert (own.dtype, own.shape, own.is_contiguous()) == (wanted.dtype, wanted.shape, True)
        assert own.untyped_storage().nbytes() == wanted.nbytes, (
            "whoever writes it would copy it once more, or write its neighbours"
        )
    places = sorted((own.data_ptr(), own.nbytes) for own in copies if own.nbytes)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(places))
    assert all(start % 512 == places[0][0] % 512 for start, _ in places)


def test_copies_are_kept_from_one_to_the_next() -> None:
    with patch("torch.cuda.is_available", return_value=True):
        copies = HostCopies()
        copies._pool = PinnedPool(lambda size: torch.empty(size, dtype=torch.uint8))
        first = copies.copy(("a",), torch.ones(3))
        assert copies.copy(("a",), torch.zeros(3)).data_ptr() == first.data_ptr()
        assert first.tolist() == [0, 0, 0]
        assert copies.copy(("b",), torch.ones(3)).data_ptr() != first.data_ptr()
        assert copies.copy(("a",), torch.ones(4)).tolist() == [1] * 4
    assert np.asarray(first).flags.writeable


def test_a_rank_without_memory_for_its_copy_fails_the_save_on_all(mixed_dataset: Path, tmp_path: Path) -> None:
    """A distributed optimizer's part is copied as the rest is: the save fails, training goes on, the next one works."""
    config = saving_config(mixed_dataset, tmp_path, steps=2, layout=LAYOUTS["data 2 distributed"], mode="async", keep_last=9)
    run_ranks(train_short_of_memory, 2, config, start_gloo=False)
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["step-00000002"]
    for rank in range(2):
        log = (tmp_path / "log" / f"rank-{rank:03d}.log").read_text()
        assert "step-00000001 was not saved (rank 1: " in log
        assert "CUDA error: out of memory" in log


def train_short_of_memory(config: Config) -> None:
    from himix_megatron.checkpoint.distributed_optimizer import DistributedOptimizerCopy

    own, times = DistributedOptimizerCopy.copy_shard, [0]

    def copy_shard(self: DistributedOptimizerCopy, *args: Any) -> Any:
        times[0] += 1
        if times[0] == 1 and torch.distributed.get_rank() == 1:
            raise RuntimeError("CUDA error: out of memory")
        return own(self, *args)

    with patch.object(DistributedOptimizerCopy, "copy_shard", copy_shard):
        train(config)
