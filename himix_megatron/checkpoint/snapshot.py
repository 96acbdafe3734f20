"""The state of a step, taken out of training, and written in megatron-core's format.

Flows in: megatron-core's sharded state; out: a `Snapshot`, which shares no memory with parameters and optimizer if it was
copied, and its files in a folder: `*.distcp` and `.metadata` (torch's distributed checkpoint), `common.pt`, `metadata.json`.

megatron-core plans a save by collectives of the training's group, and on a CPU hands the writer the very tensors that the
optimizer goes on to change. So its sharded state and its planner are used, and torch's distributed checkpoint is called with a
group of its own: all of planning and writing may then happen beside training.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan

from ..distributed.control_group import ControlGroup, SaveError
from ..runtime.durable_files import write_synced
from ..runtime.failpoints import failpoint

COMMON, CONFIG = "common.pt", "metadata.json"
"""megatron-core's names."""


@dataclass(slots=True)
class Snapshot:
    """What one rank contributes to a checkpoint."""

    shards: dict[str, list[ShardedBase]]
    """By their keys in the checkpoint; only what no other rank contributes."""
    common: dict[str, Any]
    """What is alike on all ranks; rank 0 writes it."""
    gather_optimizer_state: Callable[[], Any] | None = None
    """Gathers the optimizer's state, of which only this rank's part has been copied."""


def describe_state(state: dict[str, Any], *, validate: bool) -> Snapshot:
    """The rank's part of a sharded state, still sharing its memory; all ranks call it where training's group is idle.

    `validate`: let megatron-core check, over all ranks, that each part of each tensor is there exactly once.
    """
    sharded, common = save_preprocess(state, validate)
    shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    return Snapshot(dict(shards), common)


class PinnedRoom:
    """Room for tensors in pinned memory, laid into few large blocks.

    torch rounds each pinned allocation up to a power of two: with one for each tensor up to twice the state would be locked. So
    blocks of such sizes are taken, growing with what has been asked for.
    """

    SMALLEST, USUAL, ALIGNMENT = 64 << 20, 1 << 30, 512
    """Bytes."""

    def __init__(self, allocate: Callable[[int], Tensor] | None = None):
        """`allocate`: gives a block, uint8[bytes]; None: pinned memory."""
        self._allocate = allocate or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._blocks: list[npt.NDArray[np.uint8]] = []
        self._used: list[int] = []

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Contiguous, of the same shape and type. Its storage is no larger: torch copies a part of one before writing it."""
        size = tensor.nbytes
        if size == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        number = next((i for i, block in enumerate(self._blocks) if self._used[i] + size <= len(block)), len(self._blocks))
        if number == len(self._blocks):
            wanted = max(size, min(self.USUAL, max(self.SMALLEST, sum(map(len, self._blocks)))))
            self._blocks.append(self._allocate(1 << (wanted - 1).bit_length()).numpy())
            self._used.append(0)
        start = self._used[number]
        self._used[number] = start + -(-size // self.ALIGNMENT) * self.ALIGNMENT
        return torch.from_numpy(self._blocks[number][start : start + size]).view(tensor.dtype).view(tensor.shape)


class HostCopies:
    """Copies snapshots into host memory that is kept from one to the next: fresh pages cost more than the copy itself.

    Pinned where there is a GPU, so that the copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._room = PinnedRoom()

    def take(self, snapshot: Snapshot) -> None:
        """Let a snapshot hold the state as of now, sharing no memory with training."""
        for key, parts in snapshot.shards.items():
            for number, part in enumerate(parts):
                if not isinstance(part, ShardedTensor):
                    part.data = copy.deepcopy(part.data)
                elif part.data is not None:
                    part.data = self.copy((key, number, tuple(part.global_offset)), part.data.detach())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        snapshot.common = copy.deepcopy(snapshot.common)

    def copy(self, name: tuple[Any, ...], tensor: Tensor) -> Tensor:
        """A tensor's copy, in the memory that is kept under this name. On a GPU it is complete after `take`."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            on_gpu = torch.cuda.is_available()
            kept = self._room.empty_like(tensor) if on_gpu else torch.empty(tensor.shape, dtype=tensor.dtype)
            self._kept[name] = kept
        return kept.copy_(tensor, non_blocking=True)


class _Writer(torch_checkpoint.FileSystemWriter):  # type: ignore[misc]
    """Writes into a folder that is there: a folder that was taken away from this attempt must not come back."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def write_data(self, plan: SavePlan, planner: MCoreSavePlanner) -> Any:
        failpoint("save/tensors")
        try:
            # One thread: torch loses the errors of further ones, and the tensors with them.
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch closes its archive after a failed write, and complains of that instead.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None


def write(snapshot: Snapshot, folder: Path, ranks: ControlGroup) -> None:
    """Write a snapshot into a folder, synced; all ranks call it. Raises: SaveError on all ranks if one could not."""
    if snapshot.gather_optimizer_state is not None:
        ranks.on_all_ranks(lambda: _gather(snapshot))
    state = mcore_to_pyt_state_dict(snapshot.shards, False)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    try:
        torch_checkpoint.save(state, storage_writer=_Writer(folder, thread_count=1), planner=planner, process_group=ranks.group)
    except CheckpointException as error:
        raise SaveError(_one_line(error.failures)) from error
    ranks.on_rank_zero(lambda: _write_common(snapshot, folder))


def _gather(snapshot: Snapshot) -> None:
    assert snapshot.gather_optimizer_state is not None
    state = snapshot.gather_optimizer_state()
    if state is not None:
        snapshot.shards |= describe_state({"optimizer": {"param_state": state}}, validate=False).shards


def _write_common(snapshot: Snapshot, folder: Path) -> None:
    common = io.BytesIO()
    torch.save(snapshot.common, common)
    write_synced(folder / COMMON, common.getvalue())
    write_synced(folder / CONFIG, json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode())


def _one_line(failures: Mapping[int, Any]) -> str:
    """torch's errors by rank, each with its traceback, as one line that names the first."""
    rank, (error, _) = min(failures.items())
    return f"rank {rank}: {type(error).__name__}: {error}"


def own_files(folder: Path, rank: int) -> list[str]:
    """The files of a folder that a rank looks after: the tensors that it has written; rank 0 also all that are not tensors."""
    names = [path.name for path in folder.iterdir()]
    return [name for name in names if (_writer_of(name) or 0) == rank]


def _writer_of(name: str) -> int | None:
    return int(name.split("_")[2]) if name.endswith(".distcp") else None
