"""How it is trained: length, batch, precision, optimizer and parallel layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .checks import positive

Part = Literal["vision_kv", "language", "tower"]
"""What can train: the vision norms and vision K/V projections; the language model; the vision tower."""


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
        positive(
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
            positive(train__steps=self.steps)
        positive(
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
        positive(optimizer__learning_rate=self.learning_rate, optimizer__eps=self.eps)
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
