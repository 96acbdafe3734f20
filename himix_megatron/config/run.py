"""Every setting of a run, as one frozen tree. Flows in: a recipe and command-line overrides; out: plain values.

Each component receives only its own section. Units are in the names. Nothing here imports torch, so that a configuration can
be built, checked and printed anywhere. `__post_init__` only checks: it never changes a value. Checks that need the number of
ranks are in `check_ranks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .data import DataConfig
from .injection import InjectionConfig
from .model import ModelConfig, VisionConfig
from .operations import CheckpointConfig, HealthConfig, LogConfig, RunConfig
from .training import OptimizerConfig, ParallelConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run."""

    recipe: str
    """Name of the recipe this came from."""
    model: ModelConfig
    vision: VisionConfig
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        model, parallel = self.model, self.parallel
        self.injection.check(model, self.vision)
        for name, heads in (("num_attention_heads", model.num_attention_heads), ("num_query_groups", model.num_query_groups)):
            if heads % parallel.tensor:
                sizes = [n for n in range(1, heads + 1) if model.num_query_groups % n == 0]
                raise ValueError(
                    f"model.{name} ({heads}) does not divide over parallel.tensor ({parallel.tensor}): "
                    f"use --parallel.tensor {' or '.join(map(str, sizes[:6]))}"
                )
        if model.ffn_hidden_size % parallel.tensor:
            raise ValueError(
                f"model.ffn_hidden_size ({model.ffn_hidden_size}) does not divide over parallel.tensor ({parallel.tensor})"
            )
        if self.data.packs and self.train.global_batch_packs is None:
            raise ValueError("data.pack_max_text_tokens packs samples: give the batch in packs, --train.global-batch-packs")
        if not self.data.packs and self.train.global_batch_samples is None:
            raise ValueError(
                "train.global_batch_samples is missing"
                if self.train.global_batch_packs is None
                else "train.global_batch_packs needs --data.pack-max-text-tokens and --data.pack-max-vision-tokens"
            )
        budget, image = self.data.pack_max_vision_tokens, self.vision.max_tokens_per_image
        if budget is not None and budget < image:
            raise ValueError(
                f"data.pack_max_vision_tokens ({budget}) is below the vision tokens of the largest image ({image}): use a "
                f"multiple, e.g. --data.pack-max-vision-tokens {32 * image}"
            )
        chunks = parallel.pipeline * parallel.virtual_pipeline
        if "tower" in self.train.trainable_parts and (self.data.features or self.data.validation_features):
            raise ValueError(
                "data.features were made by a tower as it was, but here the tower trains: leave --data.features out, or tower "
                "out of --train.trainable-parts"
            )
        if parallel.overlap == "on" and self.sums_replicas:
            what = "the tower trains: its" if "tower" in self.train.trainable_parts else "vision's shared parts train: their"
            raise ValueError(
                f"parallel.overlap is on, but {what} gradients are summed over pipeline stages before they are over "
                "data-parallel ranks, so leave --parallel.overlap auto"
            )
        if self.train.cuda_graphs == "on":
            self._check_graphs()
        if model.num_layers < chunks or (parallel.split == "even" and model.num_layers % chunks):
            raise ValueError(
                f"model.num_layers ({model.num_layers}) does not divide over parallel.pipeline ({parallel.pipeline}) x "
                f"parallel.virtual_pipeline ({parallel.virtual_pipeline})"
                f"{'' if model.num_layers < chunks else ': use --parallel.split balanced, or other sizes'}"
            )

    def _check_graphs(self) -> None:
        """Raises: ValueError for what a recorded micro-batch cannot have."""
        parallel, train = self.parallel, self.train
        for field_name, found, wanted in (
            ("data.pack_max_text_tokens", self.data.packs, "--data.pack-max-text-tokens and --data.pack-max-vision-tokens"),
            ("parallel.tensor x parallel.pipeline", parallel.tensor * parallel.pipeline == 1, "one rank for each replica"),
            ("parallel.overlap", parallel.overlap != "on", "--parallel.overlap auto or off"),
            ("train.trainable_parts", "tower" not in train.trainable_parts, "a frozen tower"),
            ("train.fp8", train.fp8 == "none", "--train.fp8 none"),
            ("train.recompute", train.recompute == "none", "--train.recompute none"),
            (
                "injection",
                self.has_plain_injection,
                "layers that all take up vision by one softmax over all images of a sample, as they are",
            ),
        ):
            if not found:
                raise ValueError(f"train.cuda_graphs is on, which {field_name} does not allow: it needs {wanted}")

    @property
    def sums_replicas(self) -> bool:
        """Whether gradients are summed over parts of the model that several model chunks have."""
        parts, num_chunks = self.train.trainable_parts, self.parallel.pipeline * self.parallel.virtual_pipeline
        return "tower" in parts or ("vision_kv" in parts and self.injection.has_shared_parameters and num_chunks > 1)

    @property
    def has_plain_injection(self) -> bool:
        """Whether all layers take up vision by one softmax over all images of a sample, as the tower gives them."""
        injection = self.injection
        every = len(injection.injecting_layers(self.model.num_layers)) == self.model.num_layers
        is_flat = injection.reduce == "none" and injection.position == "none"
        return injection.fusion == "joint" and every and is_flat and not injection.needs_places

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks; with packing packs."""
        size = self.train.global_batch_packs if self.data.packs else self.train.global_batch_samples
        assert size is not None
        return size

    @property
    def micro_batch(self) -> int:
        """Samples of one forward pass on one replica; with packing one pack."""
        return 1 if self.data.packs else self.train.micro_batch_samples

    @property
    def batch_flags(self) -> tuple[str, str]:
        """The fields that say `global_batch` and `micro_batch`, for errors."""
        return (
            ("train.global_batch_packs", "1 pack")
            if self.data.packs
            else ("train.global_batch_samples", f"train.micro_batch_samples ({self.micro_batch})")
        )

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.recipe.replace(":", ".")


def check_layout(parallel: ParallelConfig, world_size: int) -> int:
    """Check that a whole number of model replicas fits into the ranks.

    Returns: that number, the data-parallel size. Raises: ValueError naming what would fit.
    """
    replica = parallel.tensor * parallel.pipeline
    if world_size % replica:
        raise ValueError(
            f"{world_size} rank{'s' if world_size > 1 else ''} cannot hold parallel.tensor ({parallel.tensor}) x "
            f"parallel.pipeline ({parallel.pipeline}): use a multiple of {replica}, "
            f"e.g. torchrun --nproc-per-node {replica} -m pipelines.pretrain ..."
        )
    return world_size // replica


def check_batch(
    global_batch: int, data_size: int, micro_batch: int, name: str = "the global batch", micro_name: str | None = None
) -> None:
    """Raises: ValueError if the data-parallel ranks cannot share the global batch in whole micro-batches."""
    if global_batch % (data_size * micro_batch):
        raise ValueError(
            f"{name} ({global_batch}) is not a multiple of {data_size} data-parallel ranks x "
            f"{micro_name or f'{micro_batch} in a micro-batch'}: use a multiple of {data_size * micro_batch}"
        )


def check_ranks(config: Config, world_size: int) -> int:
    """Check layout and batch against the number of ranks.

    Returns: the data-parallel size. Raises: ValueError naming what does not fit and what would.
    """
    parallel = config.parallel
    data_size = check_layout(parallel, world_size)
    size_field, micro_batch = config.batch_flags
    check_batch(config.global_batch, data_size, config.micro_batch, size_field, micro_batch)
    num_micro_batches = config.global_batch // (data_size * config.micro_batch)
    if parallel.virtual_pipeline > 1 and num_micro_batches % parallel.pipeline:
        raise ValueError(
            f"{num_micro_batches} micro-batches per step do not divide over parallel.pipeline ({parallel.pipeline}), which the "
            f"interleaved schedule needs: change {size_field}{'' if config.data.packs else ' or train.micro_batch_samples'}"
        )
    return data_size
