"""Saves and restores a run at any layout of ranks.

Flows in: model chunks, optimizer and a Position; out: RUN/checkpoints/step-00001000/, which holds megatron-core's distributed
checkpoint (tensors by global name and offset) and himix.json (description.py). The learning rate is a function of the position
and is not stored. async_save.py writes the folder, and manifest.py verifies it.

Extra states of modules are neither saved nor loaded. Transformer Engine's layers and megatron-core's each have their own, empty
without FP8's delayed scaling, which is not offered. So a checkpoint loads under either layer spec, also one that holds extra
states, as earlier versions wrote them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor, nn

from ..config import Config
from ..distributed.control_group import ControlGroup
from ..model.himix_model import gather_parameters, unwrap_model
from ..runtime.failpoints import failpoint
from .async_save import AsyncSaves, CheckpointWriter
from .description import Position, check_architecture, position_of, write_description
from .distributed_optimizer import (
    SHARDING,
    DistributedOptimizerCopy,
    distributed_part,
    load_optimizer,
    merged_chunks,
    optimizer_state,
    sharding_metadata,
)
from .frozen_tower import read_tower, store_tower, tower_state
from .manifest import (
    DamagedError,
    complete_checkpoints,
    latest_intact,
    quarantine,
    validation_loss,
    verify_distributed,
)
from .preflight import check_disk_space
from .run_lock import RunLock, acquire_on_all_ranks
from .snapshot import HostCopies, Snapshot, describe_state, load_state

logger = logging.getLogger(__name__)

_EXTRA_STATE = "_extra_state"
"""The names of modules' extra states end in it."""


def model_state(model_chunks: list[Any]) -> dict[str, Any]:
    """The sharded state of each model chunk, without extra states."""
    state = {}
    for i, model_chunk in enumerate(model_chunks):
        described = unwrap_model(model_chunk).sharded_state_dict(metadata=sharding_metadata())
        state[f"model{i}"] = {name: value for name, value in described.items() if not name.endswith(_EXTRA_STATE)}
    return state


def put_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load all parameters and buffers of a module; its extra states stay as they are.

    Raises: RuntimeError naming what is missing, superfluous or of another shape.
    """
    found = module.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(_EXTRA_STATE)]
    wrong = [f"missing: {', '.join(missing)}"] if missing else []
    wrong += [f"superfluous: {', '.join(found.unexpected_keys)}"] if found.unexpected_keys else []
    if wrong:
        raise RuntimeError(f"weights do not fit {type(module).__name__}: {'; '.join(wrong)}")


class Checkpoints:
    """Saves and restores one run.

    A frozen tower (`frozen_tower`) is stored once, in RUN/towers/, and checkpoints refer to it. A tower that trains (then it is
    None) is part of the model and of every checkpoint. `run_lock`: the right to write into the run folder; None: it is acquired
    at the first save.
    """

    def __init__(
        self,
        config: Config,
        model_chunks: list[Any],
        optimizer: Any | None,
        frozen_tower: nn.Module | None,
        run_lock: RunLock | None = None,
        ranks: ControlGroup | None = None,
    ):
        self.config, self.model_chunks, self.optimizer, self.frozen_tower = config, model_chunks, optimizer, frozen_tower
        self.run_dir, self.run_lock, self._ranks = config.run_dir, run_lock, ranks
        self._tower_name: str | None = None
        self._copies = HostCopies()
        self._validated = False

    @cached_property
    def ranks(self) -> ControlGroup:
        """The group of the ranks; the first use is collective."""
        return self._ranks or ControlGroup(self.config.checkpoint.group_timeout_seconds)

    @cached_property
    def saves(self) -> AsyncSaves:
        """The saves in the background; the first use is collective."""
        if self.run_lock is None:
            self.run_lock = acquire_on_all_ranks(self.run_dir, self.ranks)
        return AsyncSaves(self.config.checkpoint, self.run_lock)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(self, position: Position, *, validation_loss: float | None = None) -> float:
        """Save after `position.step` steps, after the save in flight; all ranks call it.

        With `checkpoint.mode` async the state is copied, and a thread writes it; `poll` reports the outcome. Returns: the
        seconds for which training waited. Raises: RuntimeError as `poll`.
        """
        begun = time.perf_counter()
        self.saves.wait()
        assert self.run_lock is not None
        snapshot = self._snapshot()
        describe = partial(self._describe, position=position, validation_loss=validation_loss)
        writer = CheckpointWriter(self.ranks, self.run_lock, self.config.checkpoint)
        name = f"step-{position.step:08d}"
        self.saves.start(name, partial(writer.run, name, snapshot, describe))
        if self.config.checkpoint.mode == "sync":
            self.saves.wait()
        return time.perf_counter() - begun

    def poll(self) -> None:
        """Once a step: look, without waiting, whether the save in flight has ended.

        Raises: RuntimeError if too many saves failed, one hangs, or another launch holds the run folder.
        """
        self.saves.poll()

    def finish(self) -> None:
        """Complete the save in flight. Raises: RuntimeError if the last save failed."""
        self.saves.finish()

    def wait(self) -> None:
        """Wait until no save is in flight, whether it fails or not. Raises: RuntimeError as `poll`."""
        self.saves.wait()

    def close(self) -> None:
        """The run has ended: the next launch may take its folder at once."""
        self.wait()
        self.saves.run_lock.end()

    def _snapshot(self) -> Snapshot:
        """This rank's state as of now: copied in mode async; else it shares the memory of training, which waits.

        Describing the state is collective, so a rank whose own part fails still takes part in it: the error goes into the
        snapshot, and the writer's first common step raises it on all ranks.
        """
        errors: list[Exception] = []
        with _kept_in(errors):
            failpoint("save/begin", progress=True)
        gather_parameters(self.model_chunks)
        state, copies_state = model_state(self.model_chunks), self.config.checkpoint.mode == "async"
        divided = self._divided if copies_state else None
        if divided is None:
            state["optimizer"] = optimizer_state(self.optimizer, state, loading=False)
        else:
            # Its moments and main weights are copied below, and gathered on the save's thread.
            assert self.optimizer is not None
            state["optimizer"] = self.optimizer.state_dict() | {"param_state_sharding_type": SHARDING}
        snapshot = describe_state(state, validate=not self._validated)
        self._validated = True
        with _kept_in(errors):
            if divided is not None:
                snapshot.gather_optimizer_state = divided.copy_shard(
                    self._copies, merged_chunks(model_state(self.model_chunks))
                )
            if copies_state:
                self._copies.take(snapshot)
            failpoint("save/snapshot", progress=True)
        snapshot.error = errors[0] if errors else None
        return snapshot

    @cached_property
    def _divided(self) -> DistributedOptimizerCopy | None:
        part = distributed_part(self.optimizer)
        return None if part is None else DistributedOptimizerCopy(part, self.ranks)

    def _describe(self, folder: Path, position: Position, validation_loss: float | None) -> None:
        """Rank 0 writes himix.json, and the frozen tower if it is not stored yet."""
        if self.frozen_tower is not None and self._tower_name is None:
            self._tower_name = store_tower(self.run_dir, self.frozen_tower.state_dict())
        parts = self.config.train.trainable_parts
        write_description(folder, self.config, position, parts, self._tower_name, validation_loss)

    def check_disk_space(self) -> None:
        """Before the first step; all ranks call it. Raises: StartError if the run could not save."""
        assert self.run_lock is not None
        check_disk_space(self.config.checkpoint, self.run_lock, self.ranks, self._checkpoint_bytes())

    def _checkpoint_bytes(self) -> int:
        """About the size of a checkpoint over all ranks, including a frozen tower."""
        own, is_divided = 0, self.config.parallel.distributed_optimizer
        trained = {id(p) for model_chunk in self.model_chunks for p in model_chunk.parameters() if p.requires_grad}
        for chunk in model_state(self.model_chunks).values():
            for part in chunk.values():
                if is_main_replica(part.replica_id):
                    width = part.data.element_size()
                    # In fp32: two moments, and the main weights, where weights have fewer bits or the optimizer is divided.
                    optimizer = (12 if width < 4 or is_divided else 8) if id(part.data) in trained else 0
                    own += part.data.numel() * (width + optimizer)
        if self.frozen_tower is not None and self.ranks.rank == 0:
            own += sum(tensor.nbytes for tensor in self.frozen_tower.state_dict().values())
        return sum(self.ranks.on_all_ranks(lambda: own))

    # ---- loading -----------------------------------------------------------------------------------------------------

    def restore(self, folder: Path, *, verified: bool = False) -> Position:
        """Continue a run: model, optimizer and position from one of its own checkpoints, at this run's layout.

        `verified`: its bytes have been verified. Raises: DamagedError if they are not what was written.
        """
        self._verify(folder, verified)
        description = check_architecture(folder, self.config)
        failpoint("restore/read", progress=True)
        state = model_state(self.model_chunks)
        state["optimizer"] = optimizer_state(self.optimizer, state, loading=True)
        loaded = load_state(state, folder)
        failpoint("restore/put", progress=True)
        self._put(loaded)
        assert self.optimizer is not None
        load_optimizer(self.optimizer, loaded["optimizer"])
        self._load_tower(folder, description.tower)
        logger.info("restored %s", folder)
        return position_of(description)

    def roll_back(self) -> Position:
        """Restore the newest intact checkpoint of the run, after the save in flight; all ranks call it.

        Raises: DamagedError if none is intact; RuntimeError as `poll`.
        """
        self.saves.wait()
        failpoint("recovery/verify", progress=True)
        folders = self.ranks.on_rank_zero(lambda: complete_checkpoints(self.run_dir)[::-1])
        folder = latest_intact(folders, self.ranks)
        self.ranks.on_rank_zero(lambda: quarantine(folders[: folders.index(folder)]))
        return self.restore(folder, verified=True)

    def load_weights(self, folder: Path, *, verified: bool = False) -> None:
        """Load weights only, the tower's too, as the start of another run.

        Raises: ValueError for a damaged checkpoint, or one of another architecture.
        """
        self._verify(folder, verified)
        description = check_architecture(folder, self.config)
        state, tower_file = model_state(self.model_chunks), description.tower
        if tower_file is not None and self.frozen_tower is None:
            # The tower was frozen there and trains here: its weights are in a file of their own.
            state = {m: {n: t for n, t in chunk.items() if not n.startswith("tower.")} for m, chunk in state.items()}
        self._put(load_state(state, folder), read_tower(folder, tower_file) if tower_file else None)
        if self.frozen_tower is not None:
            self._load_tower(folder, tower_file)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()  # bf16: the fp32 main weights are copied from the loaded ones
        logger.info("weights from %s", folder)

    def _verify(self, folder: Path, verified: bool) -> None:
        if not verified and (wrong := verify_distributed(folder, self.ranks)):
            raise DamagedError(f"checkpoint {folder} cannot be trusted: {'; '.join(wrong)}")

    def _put(self, loaded: dict[str, Any], tower: dict[str, Tensor] | None = None) -> None:
        for i, model_chunk in enumerate(self.model_chunks):
            chunk = loaded[f"model{i}"]
            if tower is not None and self.frozen_tower is None:
                chunk |= {f"tower.{name}": tensor for name, tensor in tower.items()}
            put_weights(unwrap_model(model_chunk), chunk)

    def load_tower(self, folder: Path) -> None:
        """Load the frozen tower alone, whether it trained in that checkpoint or not. Raises: as `load_weights`."""
        self._verify(folder, False)
        self._load_tower(folder, check_architecture(folder, self.config).tower)

    def _load_tower(self, folder: Path, file: str | None) -> None:
        if self.frozen_tower is None:
            return
        if file is not None:
            self.frozen_tower.load_state_dict(read_tower(folder, file), strict=True)
            return
        loaded = load_state({"tower": tower_state(self.frozen_tower)}, folder)["tower"]
        self.frozen_tower.load_state_dict({n.removeprefix("tower."): t for n, t in loaded.items()}, strict=True)

    def best_validation_loss(self) -> float | None:
        """The lowest validation loss among the run's checkpoints."""
        losses = (validation_loss(folder) for folder in complete_checkpoints(self.run_dir))
        return min((loss for loss in losses if loss is not None), default=None)


@contextmanager
def _kept_in(errors: list[Exception]) -> Iterator[None]:
    """Within it, an error that fails this rank's save is appended to `errors` instead of raised."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        errors.append(error)
