"""A rank's state of one step, taken out of training and written in megatron-core's format.

Flows in: megatron-core's sharded state; out: a `Snapshot`, and its files in a folder: `*.distcp` and `.metadata` (torch's
distributed checkpoint), `common.pt`, `metadata.json`.

megatron-core's own save plans by collectives of training's group, and on a CPU writes the very tensors that the optimizer
changes next. So this module uses megatron-core's sharded state and planner, but calls torch's distributed checkpoint with a
group of its own: planning and writing can then run on a thread while training goes on.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan

from ..distributed.control_group import ControlGroup, SaveError
from ..runtime.durable_files import write_synced
from ..runtime.errors import StartError
from ..runtime.failpoints import failpoint
from .torch_metadata import METADATA

COMMON, CONFIG = "common.pt", "metadata.json"
"""megatron-core's file names."""


@dataclass(slots=True)
class Snapshot:
    """What one rank contributes to a checkpoint. It shares memory with training until `HostCopies.take` copies it."""

    shards: dict[str, list[ShardedBase]]
    """By their keys in the checkpoint; without what another rank contributes."""
    common: dict[str, Any]
    """What is equal on all ranks; rank 0 writes it."""
    gather_optimizer_state: Callable[[], Any] | None = None
    """Gathers a distributed optimizer's state, of which only this rank's shard has been copied; None: it is in `shards`."""
    error: Exception | None = None
    """Why this rank could not take its snapshot; it fails the save on all ranks."""


def describe_state(state: dict[str, Any], *, validate: bool) -> Snapshot:
    """This rank's part of a sharded state, still sharing its memory; all ranks call it while training's group is idle.

    `validate`: let megatron-core check, over all ranks, that each part of each tensor is there exactly once.
    """
    sharded, common = save_preprocess(state, validate)
    shards: dict[str, list[ShardedBase]] = defaultdict(list)
    for part in nested_values(sharded):
        if is_main_replica(part.replica_id):
            shards[part.unique_key if isinstance(part, ShardedObject) else part.key].append(part)
    return Snapshot(dict(shards), common)


class PinnedPool:
    """Pinned memory for tensors, allocated in few large blocks.

    torch rounds each pinned allocation up to a power of two, so one for each tensor would lock up to twice the state. Blocks
    have such sizes, and grow with the total.
    """

    SMALLEST, USUAL, ALIGNMENT = 64 << 20, 1 << 30, 512
    """Bytes."""

    def __init__(self, allocate: Callable[[int], Tensor] | None = None):
        """`allocate`: returns a block, uint8[bytes]; None: pinned memory."""
        self._allocate = allocate or (lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._blocks: list[npt.NDArray[np.uint8]] = []
        self._used: list[int] = []

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of the same shape and type. Its storage is no larger: of a part of one, torch makes a copy before
        writing."""
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
    """Copies snapshots into host memory, which is kept for the next one: fresh pages cost more than the copy itself.

    The memory is pinned if there is a GPU, so that the copy runs at the speed of the bus.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._pool = PinnedPool()

    def take(self, snapshot: Snapshot) -> None:
        """Replace a snapshot's tensors by copies, which share no memory with training."""
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
        """Copy a tensor into the memory kept under this name. From a GPU the copy is complete after `take`."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            on_gpu = torch.cuda.is_available()
            kept = self._pool.empty_like(tensor) if on_gpu else torch.empty(tensor.shape, dtype=tensor.dtype)
            self._kept[name] = kept
        return kept.copy_(tensor, non_blocking=True)


class _Writer(torch_checkpoint.FileSystemWriter):  # type: ignore[misc]
    """Writes into an existing folder only: a folder that a later launch took away must not come back."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def write_data(self, plan: SavePlan, planner: MCoreSavePlanner) -> Any:
        failpoint("save/tensors")
        try:
            # One thread: torch loses the errors of further threads, and their tensors.
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # torch closes its archive after a failed write, and reports the error of closing instead.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None


def write(snapshot: Snapshot, folder: Path, ranks: ControlGroup) -> None:
    """Write a snapshot into a folder and sync it; all ranks call it. Raises: SaveError on all ranks if one failed."""
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


def load_state(state: dict[str, Any], folder: Path, **options: Any) -> Any:
    """megatron-core's `load`, from a verified folder. Raises: as `opened`."""
    with opened(folder):
        return dist_checkpointing.load(state, str(folder), **options)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Within it megatron-core and torch read a verified folder.

    Raises: StartError where the files are what their maker wrote, and yet not what a save writes.
    """
    if not (folder / METADATA).is_file():
        raise StartError(f"checkpoint {folder} cannot be loaded: it has no {METADATA}")
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except UnpicklingError:  # its own text tells how to open it all the same
        raise StartError(f"checkpoint {folder}: {COMMON} holds more than numbers, texts and tensors: not opened") from None
    except CheckpointException as error:
        raise StartError(f"checkpoint {folder} cannot be loaded: {_one_line(error.failures)}") from error
    except (CheckpointingException, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise StartError(f"checkpoint {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def _one_line(failures: Mapping[int, Any]) -> str:
    """torch's errors by rank, each with its traceback, as one line with the first."""
    rank, (error, _) = min(failures.items())
    return f"rank {rank}: {type(error).__name__}: {error}"


def own_files(folder: Path, rank: int) -> list[str]:
    """The files of a folder that a rank syncs and hashes: the tensors that it wrote; rank 0 also all other files."""
    writers = {path.name: int(path.name.split("_")[2]) if path.suffix == ".distcp" else 0 for path in folder.iterdir()}
    return [name for name, writer in writers.items() if writer == rank]
