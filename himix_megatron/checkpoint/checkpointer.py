"""Checkpoints: which state goes into one, and how it comes back at any layout of ranks.

Flows in: model chunks, optimizer, and a few numbers of position; out: RUN/checkpoints/step-00001000/, holding
megatron-core's distributed checkpoint (tensors by global name and offset) and `himix.json` (what model this is, what
trains, where in the data). The learning rate is a function of the position and is not stored. How a folder becomes a
checkpoint is in `saving.py`, and what vouches for it in `envelope.py`.

Modules' extra states are neither saved nor loaded: Transformer Engine's layers and megatron-core's each have their own, all of
them empty but for FP8's delayed scaling, which is not offered. So a checkpoint loads under either layer spec, and one that
holds extra states (as earlier versions wrote them) loads as if it did not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..config import Config, Part, current_fields
from ..data.loading.plan import DataPosition
from ..distributed.control_group import ControlGroup
from ..distributed.megatron_config import gather_parameters, optimizer_parts
from ..model.himix_model import unwrap_model
from ..runtime.durable_files import publish, write_synced
from ..runtime.failpoints import failpoint
from .async_save import AsyncSaves, CheckpointWriter
from .distributed_optimizer import DistributedOptimizerCopy, divided_part
from .manifest import (
    DESCRIPTION,
    DamagedError,
    complete_checkpoints,
    latest_intact,
    quarantine,
    read_description,
    tower_path,
    validation_loss,
    verify_distributed,
)
from .preflight import check_disk_space
from .run_lock import RunLock, acquire_on_all_ranks
from .snapshot import HostCopies, Snapshot, describe_state

logger = logging.getLogger(__name__)

_ARCHITECTURE = (
    "family", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
    "rope_theta", "rope_scaling_factor", "norm_eps", "tie_embeddings",
)  # fmt: skip
_EXTRA_STATE = "_extra_state"
"""How the name of a module's extra state ends in its state dict."""
_SHARDING = "fully_reshardable"
"""How megatron-core describes a distributed optimizer: as one that is not divided, so that it loads at any layout."""
_TOWER = (
    "tower", "hidden_size", "image_size", "patch_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "feature_layer",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where in the data a run stands: continuing is starting at this step of the same plan."""

    step: int
    """Optimizer steps done."""
    place: DataPosition
    """What of the data comes next."""
    data: dict[str, Any]
    """What fixes which sample is in which step, by the field that says it (`Plan.fixed`)."""


def position_of(description: dict[str, Any]) -> Position:
    """Where the run stood, from a checkpoint's `himix.json`."""
    stored = description["position"]
    return Position(step=stored["step"], place=DataPosition(**stored["place"]), data=current_fields(stored["data"]))


def architecture(config: Config) -> dict[str, Any]:
    """What must agree between a checkpoint and the model it is loaded into."""
    found = {f"model.{name}": getattr(config.model, name) for name in _ARCHITECTURE}
    found["model.head_dim"] = config.model.channels_per_head
    return found | {f"vision.{name}": getattr(config.vision, name) for name in _TOWER}


def check_architecture(folder: Path, config: Config) -> dict[str, Any]:
    """`himix.json` of a checkpoint. Raises: ValueError if it is damaged, or naming the first field in which the architectures
    differ."""
    description = read_description(folder)
    stored, wanted = description["architecture"], architecture(config)
    for name in wanted:
        # A field that came later than the checkpoint cannot disagree with it.
        if stored.get(name, wanted[name]) != wanted[name]:
            raise ValueError(
                f"checkpoint {folder} is of another architecture: {name} is {stored[name]} there and {wanted[name]} here"
            )
    return description


def write_description(
    folder: Path, config: Config, position: Position, parts: Sequence[Part], tower: str | None, validation_loss: float | None
) -> None:
    """Write `himix.json`. `parts`: what trained; none in a converted model."""
    description = {
        "position": asdict(position),
        "parts": parts,
        "architecture": architecture(config),
        "distributed_optimizer": config.parallel.distributed_optimizer,
        "tower": tower,
        "validation_loss": validation_loss,
    }
    write_synced(folder / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": _SHARDING,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(stages: list[Any]) -> dict[str, Any]:
    state = {}
    for i, stage in enumerate(stages):
        described = unwrap_model(stage).sharded_state_dict(metadata=_metadata())
        state[f"model{i}"] = {name: value for name, value in described.items() if not name.endswith(_EXTRA_STATE)}
    return state


def put_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load all of a module's parameters and buffers; its extra states stay as they are.

    Raises: RuntimeError naming what is missing, superfluous or of another shape.
    """
    found = module.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if not name.endswith(_EXTRA_STATE)]
    wrong = [f"missing: {', '.join(missing)}"] if missing else []
    wrong += [f"superfluous: {', '.join(found.unexpected_keys)}"] if found.unexpected_keys else []
    if wrong:
        raise RuntimeError(f"weights do not fit {type(module).__name__}: {'; '.join(wrong)}")


def _tower_state(tower: nn.Module) -> dict[str, Any]:
    """A frozen tower as the tower of a checkpoint in which it trained: whole on every rank, rank 0's counts."""
    tensors = {name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(tensors, "tower.")
    for tensor in state.values():
        tensor.replica_id = torch.distributed.get_rank()
    return state


def _optimizer_state(optimizer: Any, model_state: dict[str, Any], *, loading: bool) -> Any:
    if loading:
        _allocate(optimizer)
    return optimizer.sharded_state_dict(_merged(model_state), is_loading=loading, metadata=_metadata())


def _merged(model_state: dict[str, Any]) -> dict[str, Any]:
    """All chunks' parameters; their names mean nothing."""
    return {name: value for chunk in model_state.values() for name, value in _flat(chunk)}


def _divided_torch_optimizers(optimizer: Any) -> list[DistributedOptimizer]:
    """mcore's distributed optimizers over torch's AdamW (not Transformer Engine's or Apex's)."""
    parts = optimizer_parts(optimizer)
    plain = (torch.optim.Adam, torch.optim.AdamW)
    return [part for part in parts if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, plain)]


def _allocate(optimizer: Any) -> None:
    """Make the moments that AdamW's first step would make: the distributed optimizer describes and loads into them."""
    for part in _divided_torch_optimizers(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _load_optimizer(optimizer: Any, state: Any) -> None:
    """Put loaded state in. mcore's distributed optimizer trips over torch's per-parameter `step`, and gives all parameters
    one shared counter, which each of them would then advance: so it is set aside while the moments load."""
    divided = _divided_torch_optimizers(optimizer)
    if not divided:
        optimizer.load_state_dict(state)
        return
    (part,) = divided
    moments = state.pop("param_state")
    part.load_state_dict(state)
    steps = {parameter: own.pop("step") for parameter, own in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step.clone()


def _flat(chunk: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    # Interleaved chunks repeat local names; the optimizer matches parameters by identity, so any unique name will do.
    return ((f"{id(value)}.{name}", value) for name, value in chunk.items())


class Checkpoints:
    """Saves and restores one run.

    `frozen_tower` is the tower where it does not train: it is stored once in RUN/towers/ under its hash, and checkpoints
    refer to it. Where it trains (None here) it is in the model, and in every checkpoint. `run_lock`: the right to write into
    the run's folder; None: it is taken when something is to be saved.
    """

    def __init__(
        self,
        config: Config,
        stages: list[Any],
        optimizer: Any | None,
        frozen_tower: nn.Module | None,
        run_lock: RunLock | None = None,
        ranks: ControlGroup | None = None,
    ):
        self.config, self.stages, self.optimizer, self.frozen_tower = config, stages, optimizer, frozen_tower
        self.run_dir, self.run_lock, self._ranks = config.run_dir, run_lock, ranks
        self.stall_seconds = 0.0
        """Training time that saves have taken so far on this rank."""
        self._tower_name: str | None = None
        self._copies = HostCopies()
        self._validated = False

    @cached_property
    def ranks(self) -> ControlGroup:
        """The ranks' own group; all ranks must come to the first use together."""
        return self._ranks or ControlGroup(self.config.checkpoint.group_timeout_seconds)

    @cached_property
    def saves(self) -> AsyncSaves:
        """What is being saved; all ranks must come to the first use together."""
        if self.run_lock is None:
            self.run_lock = acquire_on_all_ranks(self.run_dir, self.ranks)
        return AsyncSaves(self.config.checkpoint, self.run_lock)

    def save(self, position: Position, *, validation_loss: float | None = None) -> float:
        """Save after `position.step` steps; all ranks call it. A save in flight is waited for.

        Returns: the seconds for which training stood still. In the background (`checkpoint.mode` async) the state is copied
        and the rest follows; `poll` tells how it went. Raises: RuntimeError as `poll`.
        """
        begun = time.perf_counter()
        self.saves.wait()
        assert self.run_lock is not None
        take = self._snapshot()
        describe = partial(self._describe, position=position, validation_loss=validation_loss)
        writer = CheckpointWriter(self.ranks, self.run_lock, self.config.checkpoint)
        name = f"step-{position.step:08d}"
        self.saves.start(name, partial(writer.run, name, take, describe))
        if self.config.checkpoint.mode == "sync":
            self.saves.wait()
        stall = time.perf_counter() - begun
        self.stall_seconds += stall
        return stall

    def poll(self) -> None:
        """Once a step, without waiting: what has become of the save in flight.

        Raises: RuntimeError if too many failed or one hangs, or another start has taken the run folder over.
        """
        self.saves.poll()

    def finish(self) -> None:
        """Complete the save in flight. Raises: RuntimeError if the last one failed."""
        begun = time.perf_counter()
        self.saves.finish()
        self.stall_seconds += time.perf_counter() - begun

    def wait(self) -> None:
        """Until no save is in flight, whether it failed or not. Raises: RuntimeError as `poll`."""
        self.saves.wait()

    def close(self) -> None:
        """The run has ended: the next start may take its folder without looking whether we live."""
        self.wait()
        self.saves.run_lock.end()

    def _snapshot(self) -> Callable[[], Snapshot]:
        """This rank's state as of now. An error of this rank is kept for all to agree on."""
        failure = _error_of(lambda: failpoint("save/begin", progress=True))
        gather_parameters(self.stages)
        state, mode = _model_state(self.stages), self.config.checkpoint.mode
        divided = self._divided if mode == "async" else None
        if divided is None:
            state["optimizer"] = _optimizer_state(self.optimizer, state, loading=False)
        else:
            assert self.optimizer is not None
            state["optimizer"] = self.optimizer.state_dict() | {"param_state_sharding_type": _SHARDING}
        snapshot = describe_state(state, validate=not self._validated)
        self._validated = True

        def copy() -> None:
            if divided is not None:
                snapshot.gather_optimizer_state = divided.copy_shard(self._copies, _merged(_model_state(self.stages)))
            self._copies.take(snapshot)

        if mode == "async":
            failure = failure or _error_of(copy)
        failure = failure or _error_of(lambda: failpoint("save/snapshot", progress=True))
        return partial(_or_raise, snapshot, failure)

    @cached_property
    def _divided(self) -> DistributedOptimizerCopy | None:
        part = divided_part(self.optimizer)
        return None if part is None else DistributedOptimizerCopy(part, self.ranks)

    def _describe(self, folder: Path, position: Position, validation_loss: float | None) -> None:
        write_description(
            folder, self.config, position, self.config.train.trainable_parts, self._store_tower(), validation_loss
        )

    def check_disk_space(self) -> None:
        """Before the first step; all ranks call it. Raises: ValueError if the run would not be able to save."""
        assert self.run_lock is not None
        check_disk_space(self.config.checkpoint, self.run_lock, self.ranks, self._checkpoint_bytes())

    def _checkpoint_bytes(self) -> int:
        """About what one checkpoint takes, over all ranks; a frozen tower included."""
        own, is_divided = 0, self.config.parallel.distributed_optimizer
        trained = {id(p) for stage in self.stages for p in stage.parameters() if p.requires_grad}
        for chunk in _model_state(self.stages).values():
            for part in chunk.values():
                if is_main_replica(part.replica_id):
                    width = part.data.element_size()
                    # Two moments and, beside weights of fewer bits or divided among ranks, the weights themselves: in fp32.
                    optimizer = (12 if width < 4 or is_divided else 8) if id(part.data) in trained else 0
                    own += part.data.numel() * (width + optimizer)
        if self.frozen_tower is not None and self.ranks.rank == 0:
            own += sum(tensor.nbytes for tensor in self.frozen_tower.state_dict().values())
        return sum(self.ranks.on_all_ranks(lambda: own))

    def restore(self, folder: Path, *, verified: bool = False) -> Position:
        """Continue a run: model, optimizer and position from one of its own checkpoints, at this run's layout.

        `start.prepare` has checked that it fits. `verified`: its bytes are known to be what was written.
        Raises: DamagedError if they are not.
        """
        self._verify(folder, verified)
        description = check_architecture(folder, self.config)
        failpoint("restore/read", progress=True)
        state = _model_state(self.stages)
        state["optimizer"] = _optimizer_state(self.optimizer, state, loading=True)
        loaded = dist_checkpointing.load(state, str(folder))
        failpoint("restore/put", progress=True)
        self._put(loaded)
        assert self.optimizer is not None
        _load_optimizer(self.optimizer, loaded["optimizer"])
        self._load_tower(folder, description["tower"])
        logger.info("restored %s", folder)
        return position_of(description)

    def roll_back(self) -> Position:
        """Go back to the newest of the run's checkpoints that is whole, after the save in flight; all ranks call it.

        Raises: DamagedError if none is; RuntimeError as `poll`.
        """
        self.saves.wait()
        failpoint("recovery/verify", progress=True)
        folders = self.ranks.on_rank_zero(lambda: complete_checkpoints(self.run_dir)[::-1])
        folder = latest_intact(folders, self.ranks)
        self.ranks.on_rank_zero(lambda: quarantine(folders[: folders.index(folder)]))
        return self.restore(folder, verified=True)

    def load_weights(self, folder: Path, *, verified: bool = False) -> None:
        """Weights only, as a fresh run's start; the tower's too. Raises: ValueError for a damaged checkpoint, or one of another
        architecture."""
        self._verify(folder, verified)
        description = check_architecture(folder, self.config)
        state, tower_file = _model_state(self.stages), description["tower"]
        if tower_file is not None and self.frozen_tower is None:
            # It was frozen there and trains here: its weights are not in that checkpoint's tensors.
            state = {m: {n: t for n, t in chunk.items() if not n.startswith("tower.")} for m, chunk in state.items()}
        self._put(dist_checkpointing.load(state, str(folder)), tower_file and read_tower(folder, tower_file))
        if self.frozen_tower is not None:
            self._load_tower(folder, tower_file)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()  # bf16: the fp32 main weights start from the loaded ones
        logger.info("weights from %s", folder)

    def _verify(self, folder: Path, verified: bool) -> None:
        if not verified and (wrong := verify_distributed(folder, self.ranks)):
            raise DamagedError(f"checkpoint {folder} cannot be trusted: {'; '.join(wrong)}")

    def _put(self, loaded: dict[str, Any], tower: dict[str, Tensor] | None = None) -> None:
        for i, stage in enumerate(self.stages):
            chunk = loaded[f"model{i}"]
            if tower is not None and self.frozen_tower is None:
                chunk |= {f"tower.{name}": tensor for name, tensor in tower.items()}
            put_weights(unwrap_model(stage), chunk)

    def _store_tower(self) -> str | None:
        """Rank 0: see that the frozen tower lies in the run folder. Returns: its file name, None if it trains."""
        if self.frozen_tower is None:
            return None
        if self._tower_name is None:
            self._tower_name = store_tower(self.run_dir, self.frozen_tower.state_dict())
        return self._tower_name

    def load_tower(self, folder: Path) -> None:
        """The frozen tower alone, whether it trained in that checkpoint or not. Raises: as `load_weights`."""
        self._verify(folder, False)
        self._load_tower(folder, check_architecture(folder, self.config)["tower"])

    def _load_tower(self, folder: Path, file: str | None) -> None:
        if self.frozen_tower is None:
            return
        if file is not None:
            self.frozen_tower.load_state_dict(read_tower(folder, file), strict=True)
            return
        loaded = dist_checkpointing.load({"tower": _tower_state(self.frozen_tower)}, str(folder))["tower"]
        self.frozen_tower.load_state_dict({n.removeprefix("tower."): t for n, t in loaded.items()}, strict=True)

    def best_validation_loss(self) -> float | None:
        """The lowest one among the run's checkpoints."""
        losses = (validation_loss(folder) for folder in complete_checkpoints(self.run_dir))
        return min((loss for loss in losses if loss is not None), default=None)


def _error_of(part: Callable[[], None]) -> Exception | None:
    try:
        part()
        return None
    except (OSError, RuntimeError, MemoryError) as error:
        return error


def _or_raise(snapshot: Snapshot, failure: Exception | None) -> Snapshot:
    if failure is not None:
        raise failure
    return snapshot


def tower_hash(weights: Mapping[str, Tensor]) -> str:
    """Of a tower's weights in their precision: the name they are stored under."""
    return hashlib.sha256(_tower_bytes(weights)).hexdigest()


def store_tower(run_dir: Path, weights: Mapping[str, Tensor]) -> str:
    """Put a frozen tower into a run folder, under its hash. Returns: its file name."""
    data = _tower_bytes(weights)
    path = run_dir / "towers" / f"{hashlib.sha256(data).hexdigest()}.safetensors"
    if not path.is_file():
        publish(path, data)
    return path.name


def _tower_bytes(weights: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.contiguous().cpu() for name, tensor in weights.items()})


def read_tower(folder: Path, file: str) -> dict[str, Tensor]:
    """A frozen tower's weights. Raises: ValueError if they are gone or are not what their name says."""
    path = tower_path(folder, file)
    if not path.is_file():
        raise ValueError(f"checkpoint {folder} refers to the tower {path}, which is missing: keep a run folder together")
    with path.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    if digest != path.stem:
        raise ValueError(f"tower {path} is damaged: its content does not have the hash that is its name")
    return load_file(path)  # mapped: a tower of 1.7 GB is not in memory twice
