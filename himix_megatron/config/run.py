"""Every setting of a run, as one frozen tree. Flows in: a recipe and command-line overrides; out: plain values.

Each component receives only its own section. Units are in the names. Nothing here imports torch, so that a
configuration can be built, checked and printed anywhere. `__post_init__` only checks: it never changes a value.
Checks that need the number of ranks are in `check_ranks`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Part = Literal["vision_kv", "language", "tower"]
"""What can train: the vision norms and vision K/V projections; the language model; the vision tower."""


class RankError(ValueError):
    """A mistake that one rank may be alone to see, in its own environment or node: each rank that has one says so."""


class StartError(ValueError):
    """A mistake that shows only when ranks have met and the model is built: all of them find it together."""


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name.replace('__', '.')} is {value}: it must be above 0{' and finite' if value > 0 else ''}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language decoder, and how it takes vision in."""

    family: Literal["llama", "qwen2"]
    """`llama`: no biases; `qwen2`: biases on q, k, v, the vision k and v included."""
    num_layers: int
    """Decoder layers."""
    hidden_size: int
    """Width of the text's hidden states."""
    ffn_hidden_size: int
    """Inner width of the SwiGLU MLP."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads (grouped-query attention); equal to the query heads for plain multi-head attention."""
    head_dim: int | None = None
    """Width of one head; None means hidden_size / num_attention_heads."""
    vocab_size: int
    """Rows of the embedding as published; it is padded internally so that it divides over tensor ranks."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling_factor: float | None = None
    """Llama 3's frequency scaling (low 1, high 4, original context 8192); None: unscaled."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm, the vision norms included."""
    tie_embeddings: bool = False
    """Whether the output head is the input embedding."""
    init_std: float = 0.02
    """Standard deviation of freshly initialised matrices."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """What decoder layers are made of: Transformer Engine's modules, megatron-core's own with torch's operations, or te where
    Transformer Engine is installed and a GPU is present."""
    attention_core: Literal["auto", "te", "flash", "triton"] = "auto"
    """Kernels of the attention itself, in training on a GPU in 16 bits: Transformer Engine's (cuDNN), torch's flash attention,
    or this project's in Triton, which read the vision where it lies; auto: the one that was measured to be fastest for the
    head's width (docs/results.md)."""
    text_only_vision: Literal["zero_image", "none"] = "none"
    """A sample without an image attends to the features of an all-zero image (as the authors' code does), or to none."""

    def __post_init__(self) -> None:
        _positive(
            model__num_layers=self.num_layers,
            model__hidden_size=self.hidden_size,
            model__ffn_hidden_size=self.ffn_hidden_size,
            model__num_attention_heads=self.num_attention_heads,
            model__num_query_groups=self.num_query_groups,
            model__vocab_size=self.vocab_size,
            model__head_dim=1 if self.head_dim is None else self.head_dim,
            model__rope_theta=self.rope_theta,
            model__rope_scaling_factor=1.0 if self.rope_scaling_factor is None else self.rope_scaling_factor,
            model__norm_eps=self.norm_eps,
            model__init_std=self.init_std,
        )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size ({self.hidden_size}) does not divide into model.num_attention_heads "
                f"({self.num_attention_heads}): change one, or give model.head_dim"
            )
        if self.channels_per_head % 2:
            raise ValueError(
                f"model.head_dim is {self.channels_per_head}: rotary position embedding turns pairs, so it must be even"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"model.num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"model.num_query_groups ({self.num_query_groups})"
            )

    @property
    def channels_per_head(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether q, k and v (text and vision) carry biases."""
        return self.family == "qwen2"


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower and the pixels it wants."""

    tower: Literal["tiny", "siglip", "clip"]
    """`siglip` and `clip` come from transformers; `tiny` is a small ViT of our own that can be trained from nothing."""
    path: str | None = None
    """Folder with the tower's config.json and safetensors; None: random weights (tests, quickstart)."""
    image_size: int
    """Pixels on a side after preprocessing."""
    patch_size: int
    """Pixels on a side of one patch."""
    hidden_size: int
    """Width of the features (Vh)."""
    num_layers: int
    """Transformer layers in the tower."""
    num_attention_heads: int
    """Attention heads in the tower."""
    ffn_hidden_size: int
    """Inner width of the tower's MLP."""
    feature_layer: int = -2
    """Which hidden state is taken: -1 is the last layer's output, -2 the second to last. Patch tokens only."""
    resize: Literal["square", "crop"] = "square"
    """`square` scales both sides to image_size; `crop` scales the shorter one and crops the centre (CLIP's own way)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of the resize; both are antialiased."""
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, on the 0..1 scale."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, on the 0..1 scale."""
    encoder_placement: Literal["replica_sharded", "replicated", "first_stage"] = "replica_sharded"
    """Where a frozen tower encodes a step's images: split over all tensor x pipeline ranks of a replica; all of them on each;
    or split over the ranks of pipeline stage 0. (A tower that trains runs on each rank; who reads the images goes by this.)"""
    prefetch_features: bool = True
    """Encode the next step's images while this step trains. Changes no result."""

    def __post_init__(self) -> None:
        _positive(vision__image_size=self.image_size, vision__patch_size=self.patch_size, vision__hidden_size=self.hidden_size)
        _positive(
            vision__num_layers=self.num_layers,
            vision__num_attention_heads=self.num_attention_heads,
            vision__ffn_hidden_size=self.ffn_hidden_size,
            vision__pixel_std=min(self.pixel_std),
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision.hidden_size ({self.hidden_size}) does not divide into vision.num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"vision.image_size ({self.image_size}) is below vision.patch_size ({self.patch_size})")
        if self.tower == "tiny" and self.image_size % self.patch_size:
            raise ValueError(
                f"vision.image_size ({self.image_size}) is not a multiple of vision.patch_size ({self.patch_size})"
            )
        if not -self.num_layers <= self.feature_layer <= -1:
            raise ValueError(f"vision.feature_layer is {self.feature_layer}: wanted -{self.num_layers} to -1")

    @property
    def tokens_per_image(self) -> int:
        """Patch tokens that one image contributes (N of one image)."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How a model replica is cut; what ranks remain are data parallel."""

    tensor: int = 1
    """Tensor-parallel ranks (TP)."""
    pipeline: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage (interleaved schedule); 1 is the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel blocks are split along the text."""
    distributed_optimizer: bool = False
    """Split optimizer state over the data-parallel ranks (ZeRO-1)."""
    split: Literal["even", "balanced"] = "even"
    """Layers on each pipeline stage: equally many; or so that stages do equal work, the LM head counted."""
    split_text_tokens: int = 64
    """Text tokens of a typical sample: with them, and one image, `balanced` weighs the layers against the head."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Sum gradients over data-parallel ranks, and gather parameters, while the passes run; auto: on GPUs, unless the tower
    trains."""
    timeout_seconds: float = 600.0
    """A collective, a read or any other part of a step that takes longer ends the run, with the stacks of all ranks in
    RUN/log."""

    def __post_init__(self) -> None:
        _positive(
            parallel__tensor=self.tensor,
            parallel__pipeline=self.pipeline,
            parallel__virtual_pipeline=self.virtual_pipeline,
            parallel__split_text_tokens=self.split_text_tokens,
            parallel__timeout_seconds=self.timeout_seconds,
        )
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor above 1: there is nothing to split")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline above 1 needs parallel.pipeline above 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards are read, and how a sample becomes tokens."""

    datasets: tuple[str, ...] = ()
    """Shard datasets (folders with manifest.json). The tiny recipes make their own when there is none."""
    weights: tuple[float, ...] = ()
    """Share of each dataset in the samples read, in any unit; none: each dataset is read once an epoch."""
    validation_path: str | None = None
    """Held-out shard dataset for the validation loss; None: no validation."""
    features: tuple[str, ...] = ()
    """Features that pipelines.encode made of the images, a folder for each of `path`: no image is read, and the frozen tower
    does not run. None: images are read and encoded in training."""
    validation_features: str | None = None
    """The same for validation_path."""
    features_dtype: Literal["bf16", "fp8_token", "fp8_image"] = "bf16"
    """How such features are stored: bf16, or half of that in fp8 (e4m3) with one scale for each token or for each image."""
    tokenizer: str = "bytes"
    """Folder of a Hugging Face tokenizer, or `bytes` for the built-in byte-level one."""
    template: Literal["plain", "vicuna", "llama3", "chatml", "tiny"]
    """How a conversation becomes one string: plain (captions only), Vicuna v1, Llama 3, ChatML (Qwen2), or our tiny one."""
    max_text_tokens: int
    """Most text tokens of one sample."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What becomes of a longer sample: its text is cut to max_text_tokens, or it is left out; both are counted."""
    pack_max_text_tokens: int | None = None
    """Text tokens of a pack: several samples share one sequence, each seeing only itself and its own images.
    None: no packing."""
    pack_max_images: int | None = None
    """Images of a pack."""
    shuffle: Literal["auto", "samples", "shards"] = "auto"
    """What is shuffled: all samples; or the shards, and the samples within each group of shuffle_shards of them, so that
    remote data is read a few shards at a time. auto: samples, or shards where a dataset is remote (s3://)."""
    shuffle_shards: int = 16
    """Shards read at the same time when shards are shuffled."""
    cache_dir: str | None = None
    """Where shards of remote datasets are kept while they are read; None: a folder of the user's cache."""
    cache_gib: float = 50.0
    """Most that the cache may hold, per machine; the shards used longest ago go first."""
    decode: Literal["fast", "exact"] = "fast"
    """Resizing by torch on bytes (faster, within 2 of 255 levels), or by Pillow, equal to transformers' to the bit."""
    webdataset_urls: tuple[str, ...] = ()
    """Instead of `path`: tar files of any WebDataset, read as a stream. Not exact: see docs/data.md."""
    num_workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process."""
    max_bad_fraction: float = 0.01
    """Samples that cannot be read in training keep their slot with zero loss; above this share of them (of those since the
    start, counted as at least 1,000) the run stops with exit code 3, and says why in RUN/STOP."""

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str) or isinstance(self.webdataset_urls, str):
            raise ValueError(f"data.datasets is {self.datasets!r}: wanted a list of folders")
        _positive(
            data__max_text_tokens=self.max_text_tokens,
            data__shuffle_shards=self.shuffle_shards,
            data__cache_gib=self.cache_gib,
        )
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}: wanted 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}: wanted 0 to 1")
        if self.weights and len(self.weights) != len(self.datasets):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.datasets)} datasets: give one for each"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"data.weights is {list(self.weights)}: wanted numbers above 0")
        if self.features and len(self.features) != len(self.datasets):
            raise ValueError(
                f"data.features names {len(self.features)} folders for {len(self.datasets)} datasets: give one for each"
            )
        if self.validation_features is not None and self.validation_path is None:
            raise ValueError("data.validation_features is given without --data.validation-path")
        if self.datasets and self.webdataset_urls:
            raise ValueError("data.datasets and data.webdataset_urls are both given: choose one")
        if (self.pack_max_text_tokens is None) != (self.pack_max_images is None):
            raise ValueError(
                "packing has two budgets: give both --data.pack-max-text-tokens and --data.pack-max-images, or neither"
            )
        if self.pack_max_text_tokens is not None and self.pack_max_images is not None:
            _positive(data__pack_text_tokens=self.pack_max_text_tokens, data__pack_images=self.pack_max_images)
            if self.max_text_tokens > self.pack_max_text_tokens:
                raise ValueError(
                    f"data.max_text_tokens ({self.max_text_tokens}) is above data.pack_max_text_tokens "
                    f"({self.pack_max_text_tokens}): a sample must fit into a pack"
                )
            if self.webdataset_urls:
                raise ValueError(
                    "data.webdataset_urls cannot be packed: packs are planned from an index, which only --data.datasets has"
                )

    @property
    def packs(self) -> bool:
        """Whether samples are packed."""
        return self.pack_max_text_tokens is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how much at once, what trains, in which precision."""

    trainable_parts: tuple[Part, ...]
    """What trains; the rest is frozen, bit for bit."""
    steps: int | None = None
    """Optimizer steps; None: as many as `epochs` takes."""
    epochs: float = 1.0
    """Passes over the data when `steps` is None."""
    global_batch_samples: int | None = None
    """Samples per optimizer step, over all ranks. Unused with packing."""
    global_batch_packs: int | None = None
    """Packs per optimizer step, over all ranks, with packing (data.pack_max_text_tokens); each pack is a micro-batch."""
    micro_batch_samples: int = 1
    """Samples per forward pass on one replica. Unused with packing."""
    precision: Literal["bf16", "fp32"]
    """bf16 keeps fp32 main weights and fp32 gradient sums."""
    fp8: Literal["none", "tensorwise", "blockwise"] = "none"
    """The layers' products of text in FP8, by Transformer Engine; needs bf16 and a GPU that has it. tensorwise: one scale a
    tensor, from what is in it (e4m3 forward, e5m2 backward); blockwise: one for 128 numbers of an activation, and for 128 x 128
    of a weight (e4m3). Neither keeps a state. Generation, and evaluation of a saved run, are in bf16."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: core attention only, or whole layers."""
    cuda_graphs: Literal["off", "on"] = "off"
    """Run forward and backward of each packed micro-batch as one CUDA graph, recorded once for each of a few sizes: for narrow
    decoders, which keep the host busier than the GPU. Needs a GPU, packing, one rank for each replica, a frozen tower, and
    memory for the activations of two micro-batches."""
    seed: int = 1234
    """Of the fresh weights and of the data order."""

    def __post_init__(self) -> None:
        if not self.trainable_parts or len(set(self.trainable_parts)) != len(self.trainable_parts):
            raise ValueError(
                f"train.trainable_parts is {list(self.trainable_parts)}: name each part once (vision_kv, language, tower)"
            )
        if self.steps is not None:
            _positive(train__steps=self.steps)
        _positive(
            train__epochs=self.epochs,
            train__micro_batch_samples=self.micro_batch_samples,
        )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}: wanted 0 to {2**32 - 1}")
        if self.fp8 != "none" and self.precision != "bf16":
            raise ValueError(f"train.fp8 is {self.fp8}, which keeps everything else in bf16: use --train.precision bf16")
        for name, size in (("samples", self.global_batch_samples), ("packs", self.global_batch_packs)):
            if size is not None and size <= 0:
                raise ValueError(f"train.global_batch_{name} is {size}: it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule. Embeddings, matrices: decayed; norms, biases: not."""

    learning_rate: float
    """Peak."""
    min_learning_rate: float = 0.0
    """Where the cosine ends."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up."""
    warmup_fraction: float = 0.03
    """Share of the run's samples over which the rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""

    def __post_init__(self) -> None:
        _positive(optimizer__learning_rate=self.learning_rate, optimizer__eps=self.eps)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: wanted 0 to below 1")
        for name in ("weight_decay", "min_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: wanted 0 or more")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"optimizer.warmup_fraction is {self.warmup_fraction}: wanted 0 to below 1")
        if not 0 <= self.clip_norm < math.inf:
            raise ValueError(f"optimizer.clip_norm is {self.clip_norm}: wanted 0 (never clip) or more")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate ({self.min_learning_rate}) is above "
                f"optimizer.learning_rate ({self.learning_rate})"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where weights come from and when they are saved."""

    init_from: str | None = None
    """Run or checkpoint folder whose weights a fresh run starts from (align: a converted model; instruct: align's run)."""
    interval_steps: int = 500
    """Steps between saves; the last step is always saved."""
    mode: Literal["async", "sync"] = "async"
    """async: the state is copied into host memory (as much again as a rank saves), and written while training goes on. sync:
    training waits until it is on the disk."""
    keep_last: int = 2
    """Newest checkpoints kept. The one with the lowest validation loss is kept besides."""
    keep_every: int | None = None
    """Checkpoints of steps that are a multiple of this are kept for good; None: none are."""
    max_failures: int = 3
    """Saves that may fail one after another (disk full, say); one more ends the run. The last save must not fail."""
    timeout_seconds: float = 1800.0
    """A save that takes longer hangs: the stacks go to RUN/log and the run ends, with the earlier checkpoints as they were."""

    def __post_init__(self) -> None:
        _positive(
            checkpoint__interval_steps=self.interval_steps,
            checkpoint__keep_last=self.keep_last,
            checkpoint__timeout_seconds=self.timeout_seconds,
        )
        if self.keep_every is not None:
            _positive(checkpoint__keep_every=self.keep_every)
        if self.max_failures < 0:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}: it must be 0 or above")

    @property
    def group_timeout_seconds(self) -> float:
        """For the messages of a save: a little more than the save itself has, since the watch on it can say more."""
        return self.timeout_seconds + 60


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What a run tells."""

    interval_steps: int = 10
    """Steps between log lines and TensorBoard points."""
    validation_interval_steps: int = 500
    """Steps between validation losses, when data.validation_path is given; a new lowest one is saved, and kept."""
    validation_samples: int = 512
    """Samples per validation, rounded down to whole batches (at least one; a smaller set is gone through again)."""
    ledger: bool = False
    """Write RUN/ledger/rank-000.jsonl: samples of each step; steps.jsonl: each step's loss and gradient norm, in hex."""
    predictions_interval_steps: int = 0
    """Steps between looks at a few samples in TensorBoard: picture, question, expected and given answer (held-out samples where
    data.validation_path is given); 0: none."""
    predictions_samples: int = 4
    """Samples of such a look."""
    peak_tflops: float | None = None
    """Dense peak of one GPU in the run's precision, in TFLOP/s: what MFU is a share of. None: by the GPU's name, where it is
    known; else there is no MFU."""
    profile_steps: tuple[int, ...] = ()
    """Steps whose trace each pipeline stage's first rank writes into RUN/profile, to be opened at ui.perfetto.dev."""

    def __post_init__(self) -> None:
        _positive(
            log__interval_steps=self.interval_steps,
            log__validation_interval_steps=self.validation_interval_steps,
            log__validation_samples=self.validation_samples,
            log__pictures_samples=self.predictions_samples,
        )
        if self.predictions_interval_steps < 0:
            raise ValueError(f"log.predictions_interval_steps is {self.predictions_interval_steps}: wanted 0 (none) or more")
        if self.peak_tflops is not None:
            _positive(log__peak_tflops=self.peak_tflops)


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """What a run bears before it gives up, and what it checks as it goes. Giving up is exit code 3, the reason in RUN/STOP."""

    max_skipped_steps: int = 10
    """Updates left out within 1,000 steps, for a loss or gradient that is not finite or by spike_action; one more ends it."""
    spike_action: Literal["none", "skip", "rollback"] = "none"
    """At a spike of the loss: only say so; leave the update out; or go back to the newest checkpoint and on behind the spike,
    without the batches between."""
    spike_sigmas: float = 6.0
    """A spike is a loss so many standard deviations above the mean of the last spike_window_steps (a deviation counts as at
    least 1 % of the mean)."""
    spike_window_steps: int = 100
    """Losses that a new one is held against; the first steps of a run, before there are as many, are not judged."""
    max_rollbacks: int = 3
    """Rollbacks in the whole run; one more ends it."""
    replica_check_steps: int = 500
    """Steps between comparisons of the parameters, bit for bit, over the ranks that should hold the same (also done before
    each save); a difference ends the run, and nothing of it is saved."""
    max_starts_without_progress: int = 3
    """Starts in a row, with the same settings, of which none saved a new step; another one ends it."""

    def __post_init__(self) -> None:
        _positive(
            health__spike_sigmas=self.spike_sigmas,
            health__replica_check_steps=self.replica_check_steps,
            health__max_fruitless_starts=self.max_starts_without_progress,
        )
        for name in ("max_skipped_steps", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise ValueError(f"health.{name} is {getattr(self, name)}: wanted 0 or more")
        if self.spike_window_steps < 2:
            raise ValueError(f"health.spike_window_steps is {self.spike_window_steps}: a deviation takes 2 losses or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run itself."""

    dir: str | None = None
    """Run folder; None: runs/RECIPE. A folder with a checkpoint is continued: the same command continues the same run."""
    ignore_stop_file: bool = False
    """Continue a run that stopped on purpose (its folder has a STOP file)."""
    fault_injection: str | None = None
    """Rehearse recovery: a file of faults that this run does to itself (format: runtime/failpoints.py).
    None: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run."""

    recipe: str
    """Name of the recipe this came from."""
    model: ModelConfig
    vision: VisionConfig
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
                else "train.global_batch_packs needs --data.pack-max-text-tokens and --data.pack-max-images"
            )
        chunks = parallel.pipeline * parallel.virtual_pipeline
        if "tower" in self.train.trainable_parts and (self.data.features or self.data.validation_features):
            raise ValueError(
                "data.features were made by a tower as it was, but here the tower trains: leave --data.features out, or tower "
                "out of --train.trainable-parts"
            )
        if parallel.overlap == "on" and "tower" in self.train.trainable_parts:
            raise ValueError(
                "parallel.overlap is on, but the tower trains: its gradients are summed over pipeline stages before they are "
                "over data-parallel ranks, so leave --parallel.overlap auto"
            )
        if self.train.cuda_graphs == "on":
            self._check_graphs()
        if self.log.predictions_interval_steps and self.data.webdataset_urls and self.data.validation_path is None:
            raise ValueError(
                "log.predictions_interval_steps is given, but a stream has no samples to choose from: give "
                "--data.validation-path, or leave it at 0"
            )
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
            (
                "data.pack_max_text_tokens",
                self.data.pack_max_text_tokens,
                "packing (--data.pack-max-text-tokens, --data.pack-max-images)",
            ),
            ("parallel.tensor x parallel.pipeline", parallel.tensor * parallel.pipeline == 1, "one rank for each replica"),
            ("parallel.overlap", parallel.overlap != "on", "--parallel.overlap auto or off"),
            ("train.trainable_parts", "tower" not in train.trainable_parts, "a frozen tower"),
            ("train.fp8", train.fp8 == "none", "--train.fp8 none"),
            ("train.recompute", train.recompute == "none", "--train.recompute none"),
        ):
            if not found:
                raise ValueError(f"train.cuda_graphs is on, which {field_name} does not allow: it needs {wanted}")

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
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.recipe


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


def check_ranks(config: Config, world_size: int) -> int:
    """Check layout and batch against the number of ranks.

    Returns: the data-parallel size. Raises: ValueError naming what does not fit and what would.
    """
    parallel = config.parallel
    data_size = check_layout(parallel, world_size)
    per_forward = data_size * config.micro_batch
    size_field, micro_batch = config.batch_flags
    if config.global_batch % per_forward:
        raise ValueError(
            f"{size_field} ({config.global_batch}) is not a multiple of {data_size} data-parallel ranks x {micro_batch}: "
            f"use a multiple of {per_forward}"
        )
    num_micro_batches = config.global_batch // per_forward
    if parallel.virtual_pipeline > 1 and num_micro_batches % parallel.pipeline:
        raise ValueError(
            f"{num_micro_batches} micro-batches per step do not divide over parallel.pipeline ({parallel.pipeline}), which the "
            f"interleaved schedule needs: change {size_field}{'' if config.data.packs else ' or train.micro_batch_samples'}"
        )
    return data_size


VERSION = 1
"""Of config.json. Version 0, which has no number in it, is read through `RENAMED_FIELDS` and `_RENAMED_VALUES`."""

RENAMED_FIELDS = {
    "model.attention": "model.layer_spec",
    "model.text_only": "model.text_only_vision",
    "vision.placement": "vision.encoder_placement",
    "vision.encode_ahead": "vision.prefetch_features",
    "data.path": "data.datasets",
    "data.stream": "data.webdataset_urls",
    "data.too_long": "data.overlong",
    "data.pack_text_tokens": "data.pack_max_text_tokens",
    "data.pack_images": "data.pack_max_images",
    "train.parts": "train.trainable_parts",
    "checkpoint.initial": "checkpoint.init_from",
    "log.pictures_interval_steps": "log.predictions_interval_steps",
    "log.pictures_samples": "log.predictions_samples",
    "health.max_fruitless_starts": "health.max_starts_without_progress",
    "run.resume_after_stop": "run.ignore_stop_file",
    "run.faults": "run.fault_injection",
}
"""Fields as version 0 names them, and their names now."""
_RENAMED_VALUES = {
    # Transformer Engine no longer loads the state of delayed scaling.
    ("train.fp8", "hybrid"): "tensorwise",
    ("data.overlong", "cut"): "truncate",
}


def current_name(field_name: str) -> str:
    """A dotted field name of any version as it is now."""
    return RENAMED_FIELDS.get(field_name, field_name)


def current_fields(stored: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted name, as any version wrote them, by the names and values of this version."""
    named = {current_name(name): value for name, value in stored.items()}
    return {
        name: _RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value for name, value in named.items()
    }


def to_json(config: Any) -> str:
    """The tree as JSON text, two-space indented, fields in order."""
    return json.dumps({"version": VERSION, **dataclasses.asdict(config)}, indent=2) + "\n"


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(cls)
    built: dict[str, Any] = {}
    named = current_fields({prefix + name: value for name, value in values.items()})
    for dotted, value in named.items():
        name = dotted.removeprefix(prefix)
        if name not in hints:
            raise ValueError(f"{cls.__name__} has no field {name}: written by another version?")
        hint = hints[name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            built[name] = _build(hint, value, f"{dotted}.")
        elif isinstance(value, list):
            built[name] = tuple(value)
        else:
            built[name] = value
    return cls(**built)


def from_json(text: str) -> Config:
    """A Config from `to_json`'s text. Raises: ValueError for a version or a field that this version does not know."""
    tree = json.loads(text)
    version = tree.pop("version", 0)
    if version not in (0, VERSION):
        raise ValueError(f"config.json has version {version}: this program reads versions 0 and {VERSION}; use a newer program")
    config = _build(Config, tree)
    assert isinstance(config, Config)
    return config


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The fields in which two trees of one class differ, as (dotted name, old value, new value), in field order."""
    found: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(old):
        a, b = getattr(old, item.name), getattr(new, item.name)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            found += differences(a, b, f"{prefix}{item.name}.")
        elif a != b:
            found.append((prefix + item.name, a, b))
    return found


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Every leaf field as the command line spells it, e.g. `train.global_batch_samples`."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            names += field_names(hint, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names
