"""How it is trained: length, batch, precision, optimizer and parallel layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..runtime.limits import BelowOne, Count, Limit, Positive, ZeroOrMore, check_limits

Part = Literal["vision_kv", "language", "tower"]
"""What can train: all that brings vision into the decoder (vision norms, vision K/V projections, adapters, gates, blocks of
their own); the language model; the vision tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How a model replica is divided over ranks; the remaining factor of ranks is data parallel."""

    tensor: Count = 1
    """Number of tensor-parallel ranks (TP)."""
    pipeline: Count = 1
    """Number of pipeline stages (PP)."""
    virtual_pipeline: Count = 1
    """Number of model chunks per pipeline stage (interleaved schedule); 1: the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism: whether activations between the tensor-parallel blocks are split along the text."""
    distributed_optimizer: bool = False
    """Whether optimizer state is split over the data-parallel ranks (ZeRO-1)."""
    split: Literal["even", "balanced"] = "even"
    """Division of layers over pipeline stages. even: equally many; balanced: equal work, the LM head included."""
    split_text_tokens: Count = 64
    """Number of text tokens in a typical sample; `balanced` weighs layers against the head with them and one image."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether gradients are summed over data-parallel ranks, and parameters gathered, during the forward and backward passes;
    auto: on GPUs, unless the tower trains."""
    timeout_seconds: Positive = 600.0
    """Maximum duration of a collective, a read or any other part of a step, in seconds; a longer one ends the run, with the
    stacks of all ranks in RUN/log."""

    def __post_init__(self) -> None:
        check_limits(self, "parallel")
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor above 1: there is nothing to split")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline above 1 needs parallel.pipeline above 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, how much at once, what trains, in which precision."""

    trainable_parts: tuple[Part, ...]
    """Parts of the model that train; the rest stays frozen, bit for bit."""
    steps: Count | None = None
    """Number of optimizer steps; None: as many as `epochs` takes."""
    epochs: Positive = 1.0
    """Number of passes over the data when `steps` is None."""
    global_batch_samples: Count | None = None
    """Samples per optimizer step, over all ranks. Unused with packing."""
    global_batch_packs: Count | None = None
    """Packs per optimizer step, over all ranks, with packing (data.pack_max_text_tokens); each pack is a micro-batch."""
    micro_batch_samples: Count = 1
    """Samples per forward pass on one replica. Unused with packing."""
    precision: Literal["bf16", "fp32"]
    """Precision of weights and activations; bf16 keeps fp32 main weights and fp32 gradient sums."""
    fp8: Literal["none", "tensorwise", "blockwise"] = "none"
    """FP8 format of the layers' matrix products of text, by Transformer Engine; needs bf16 and a GPU that supports it.
    tensorwise: one scale per tensor, from its current values (e4m3 forward, e5m2 backward); blockwise: one scale per 128
    numbers of an activation and per 128 x 128 block of a weight (e4m3). Neither keeps a state. Generation, and evaluation of a
    saved run, use bf16."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass. selective: core attention only; full: whole layers."""
    cuda_graphs: Literal["off", "on"] = "off"
    """Whether forward and backward of each packed micro-batch run as one CUDA graph, recorded once for each of a few sizes.
    Made for narrow decoders, which keep the host busier than the GPU. Needs a GPU, packing, one rank per replica, a frozen
    tower, and memory for the activations of two micro-batches."""
    initialization: Literal["sequential", "by_name"] = "sequential"
    """Way in which fresh weights are drawn. sequential: as modules are built, so that they depend on what else is built;
    by_name: each by its name, so that models that differ in some parts, or in their layout, begin with the same weights in
    all others."""
    seed: Annotated[int, Limit(0, 2**32 - 1)] = 1234
    """Seed of weight initialisation and data order."""

    def __post_init__(self) -> None:
        check_limits(self, "train")
        if not self.trainable_parts or len(set(self.trainable_parts)) != len(self.trainable_parts):
            raise ValueError(
                f"train.trainable_parts is {list(self.trainable_parts)}: name each part once (vision_kv, language, tower)"
            )
        if self.fp8 != "none" and self.precision != "bf16":
            raise ValueError(f"train.fp8 is {self.fp8}, which keeps everything else in bf16: use --train.precision bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule. Weight decay applies to embeddings and matrices, not to norms and biases."""

    learning_rate: Positive
    """Peak learning rate."""
    min_learning_rate: ZeroOrMore = 0.0
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_fraction: BelowOne = 0.03
    """Share of the run's samples over which the learning rate rises linearly from 0."""
    weight_decay: ZeroOrMore = 0.0
    """Decoupled weight decay, as in AdamW."""
    beta1: BelowOne = 0.9
    """Decay rate of the first moment."""
    beta2: BelowOne = 0.999
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Epsilon of Adam's denominator."""
    clip_norm: ZeroOrMore = 1.0
    """Global norm that gradients are scaled down to; 0: no clipping."""

    def __post_init__(self) -> None:
        check_limits(self, "optimizer")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate ({self.min_learning_rate}) is above "
                f"optimizer.learning_rate ({self.learning_rate})"
            )
