"""Floating-point operations by arithmetic: of a training step; and layers split so that stages cost alike.

Flows in: the sizes of a configuration and what samples amount to; out: operations, 2 for each multiply-add. Two conventions
for attention: `causal`, what is needed (a text token over all vision of its sample, and over the text up to itself), and full
rectangles, the paper's way (at 64 text and 729 vision tokens, with the head on every token, they give its 78, 161 and 192
GFLOP for Qwen2-0.5B, TinyLlama-1.1B and Llama-3.2-1B to 0.6 %). No torch.

A step's model FLOPs are the products that forward and backward cannot do without: work whose result nobody needs, and what is
computed a second time to save memory, is not in them (`StepFlops.recomputed` has the latter). Norms, activations, softmax and
the optimizer are not counted, as is the custom.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..config import Config, ModelConfig, Part, VisionConfig
from ..config.towers import TOWERS


def head_flops(model: ModelConfig, *, text_tokens: float) -> float:
    """The LM head on every text token, forward."""
    return 2.0 * text_tokens * model.hidden_size * model.vocab_size


def image_flops(vision: VisionConfig, num_patches: float) -> float:
    """The vision tower's forward pass on one image of so many patches."""
    return _tower_flops(vision, images=1, patches=num_patches, patch_pairs=num_patches**2)


def patches_of(vision: VisionConfig, vision_tokens: float) -> float:
    """Patches that give so many vision tokens, at the tower's ratio in its largest image."""
    return vision_tokens * vision.max_patches_per_image / vision.max_tokens_per_image


def _tower_flops(vision: VisionConfig, *, images: float, patches: float, patch_pairs: float) -> float:
    """Up to the layer whose output is taken (class tokens counted)."""
    width, extra = vision.hidden_size, TOWERS[vision.tower].class_tokens
    tokens, pairs = patches + extra * images, patch_pairs + 2 * extra * patches + extra**2 * images
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.ffn_hidden_size) + 4 * pairs * width
    return float(layer * (vision.num_layers + 1 + vision.feature_layer) + _patch_flops(vision, patches))


def _patch_flops(vision: VisionConfig, patches: float) -> float:
    return 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size


# ---- a training step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """What samples amount to. Each field is a sum over samples: those of ranks and steps may be added."""

    text_tokens: float = 0.0
    vision_tokens: float = 0.0
    text_pairs: float = 0.0
    """Text queries times the text keys each of them sees."""
    vision_pairs: float = 0.0
    """Text queries times the vision keys each of them sees."""
    head_tokens: float = 0.0
    """Tokens that go through the LM head: those with a label in training."""
    images: float = 0.0
    """Images that the tower encodes."""
    patches: float = 0.0
    """Their patches."""
    patch_pairs: float = 0.0
    """The squares of each image's patches."""

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Work)))

    def __mul__(self, times: float) -> Work:
        """The same, so many times."""
        return Work(*(getattr(self, item.name) * times for item in fields(Work)))

    @staticmethod
    def encoding(patches: Sequence[float]) -> Work:
        """Of the tower on images of so many patches each."""
        return Work(
            images=float(len(patches)), patches=float(sum(patches)), patch_pairs=float(sum(number**2 for number in patches))
        )

    @staticmethod
    def of(
        text_lengths: Sequence[float],
        vision_lengths: Sequence[float],
        *,
        head_tokens: float,
        causal: bool = True,
    ) -> Work:
        """Of samples with these numbers of text and vision tokens; padding belongs to no sample, so leave it out."""
        return Work(
            text_tokens=float(sum(text_lengths)),
            vision_tokens=float(sum(vision_lengths)),
            text_pairs=float(sum(s * (s + 1) / 2 if causal else s * s for s in text_lengths)),
            vision_pairs=float(sum(s * n for s, n in zip(text_lengths, vision_lengths, strict=True))),
            head_tokens=float(head_tokens),
        )

    @staticmethod
    def concatenated(
        text_lengths: Sequence[float],
        vision_lengths: Sequence[float],
        *,
        head_tokens: float,
        causal: bool = True,
    ) -> Work:
        """Of the same samples where vision tokens are part of the text, as in LLaVA: what HiMix is compared with."""
        both = [s + n for s, n in zip(text_lengths, vision_lengths, strict=True)]
        return Work.of(both, [0.0] * len(both), head_tokens=head_tokens, causal=causal)


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Of forward and backward over some work."""

    decoder: float
    """Layers."""
    head: float
    """LM head."""
    tower: float
    recomputed: float
    """Done beyond them: logits a second time (always counted, though Transformer Engine's loss does without), attention or
    whole layers as train.recompute says (which also takes the gradient of the first layer's text where nothing in front of it
    trains)."""

    @property
    def language(self) -> float:
        """Model FLOPs without the tower."""
        return self.decoder + self.head

    @property
    def model(self) -> float:
        """Model FLOPs: what MFU is made of."""
        return self.language + self.tower

    @property
    def hardware(self) -> float:
        """What the chips work through: HFU."""
        return self.model + self.recomputed


@dataclass(frozen=True, slots=True)
class _Products:
    """Forward FLOPs of one layer, by what differs in the backward pass."""

    qkv: float
    rest: float
    """Output projection and MLP."""
    vision: float
    text_attention: float
    vision_attention: float

    @property
    def total(self) -> float:
        return self.qkv + self.rest + self.vision + self.text_attention + self.vision_attention


def _products(model: ModelConfig, vision_width: int, work: Work) -> _Products:
    query, key_value = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    return _Products(
        qkv=2 * work.text_tokens * model.hidden_size * (query + 2 * key_value),
        rest=2 * work.text_tokens * model.hidden_size * (query + 3 * model.ffn_hidden_size),
        vision=2 * work.vision_tokens * vision_width * 2 * key_value,
        text_attention=4 * work.text_pairs * query,
        vision_attention=4 * work.vision_pairs * query,
    )


def forward_flops(config: Config, work: Work) -> StepFlops:
    """The forward pass alone."""
    layer = _products(config.model, config.vision.hidden_size, work)
    return StepFlops(
        decoder=config.model.num_layers * layer.total,
        head=head_flops(config.model, text_tokens=work.head_tokens),
        tower=_tower_flops(config.vision, images=work.images, patches=work.patches, patch_pairs=work.patch_pairs),
        recomputed=0.0,
    )


def step_flops(config: Config, work: Work, *, inputs_train: bool = False) -> StepFlops:
    """Forward and backward, by what trains (`trainable_parts`): what is frozen gets no weight gradients, and no gradient flows
    where nothing in front of it trains.

    Args: inputs_train: something in front of the decoder trains though no part of ours says so (LLaVA's projector).
    """
    parts, forward = config.train.trainable_parts, forward_flops(config, work)
    layer = _products(config.model, config.vision.hidden_size, work)
    first = layer_backward(layer, parts, text_below="language" in parts or inputs_train)
    others = layer_backward(layer, parts, text_below=True)
    again = {"none": 0.0, "selective": layer.text_attention + layer.vision_attention, "full": layer.total}
    beyond = others - first if config.train.recompute == "full" else 0.0
    frozen_tower = "tower" not in parts
    return StepFlops(
        decoder=forward.decoder + first + (config.model.num_layers - 1) * others,
        head=forward.head * (3 if "language" in parts else 2),
        tower=forward.tower if frozen_tower else 3 * forward.tower - _patch_flops(config.vision, work.patches),
        recomputed=config.model.num_layers * again[config.train.recompute] + beyond + forward.head,
    )


def layer_backward(layer: _Products, parts: tuple[Part, ...], *, text_below: bool) -> float:
    """Backward FLOPs of one layer. `text_below`: whether the text that comes into it needs a gradient."""
    weights = "language" in parts
    vision_weights, vision_states = "vision_kv" in parts, "tower" in parts
    text = layer.rest * (1 + weights) + layer.qkv * (text_below + weights)
    vision = layer.vision * (vision_weights + vision_states)
    # Attention's forward is two products; its backward four of the same size: for values, weights, queries and keys. Those for
    # values and keys are wanted by the projections behind them, those for queries by the text, those for weights by both.
    text_attention = layer.text_attention / 2 * (4 if text_below or weights else 0)
    wanted = 1 + (text_below or weights) + 2 * (vision_weights or vision_states)
    return text + vision + text_attention + layer.vision_attention / 2 * wanted


# ---- pipeline stages ---------------------------------------------------------------------------------------------------


def chunk_layers(config: Config) -> tuple[int, ...]:
    """Decoder layers of each model chunk in the order of the network: chunk i is on pipeline stage i % parallel.pipeline."""
    parallel, num_layers = config.parallel, config.model.num_layers
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.split == "even":
        return (num_layers // num_chunks,) * num_chunks
    # A stage without a layer has nothing to train but the head.
    layers = [1] * (num_chunks - 1) + [0 if "language" in config.train.trainable_parts else 1]
    # A layer at a time, to the stage that has least to do, there to its cheapest chunk: layers are alike, so none is better.
    for _ in range(num_layers - sum(layers)):
        costs = _chunk_costs(config, layers)
        stage = min(range(parallel.pipeline), key=lambda s: sum(costs[s :: parallel.pipeline]))
        layers[min(range(stage, num_chunks, parallel.pipeline), key=lambda chunk: costs[chunk])] += 1
    return tuple(layers)


def vision_chunks(config: Config) -> tuple[bool, ...]:
    """Whether each model chunk takes vision features, in the order of `chunk_layers`: those with a layer that injects; where
    vision stands in the text's sequence, the first alone."""
    layers = chunk_layers(config)
    if config.injection.in_sequence:
        return tuple(chunk == 0 for chunk in range(len(layers)))
    ends = list(itertools.accumulate(layers, initial=0))
    injecting = config.injection.injecting_layers(config.model.num_layers)
    return tuple(any(start <= layer < end for layer in injecting) for start, end in itertools.pairwise(ends))


def _chunk_costs(config: Config, layers: tuple[int, ...] | list[int]) -> list[float]:
    """Of each model chunk on a sample of `parallel.split_text_tokens` and one largest image, forward, the head counted."""
    vision, text_tokens = config.vision, config.parallel.split_text_tokens
    work = Work.of([text_tokens], [vision.max_tokens_per_image], head_tokens=text_tokens, causal=False)
    each = _products(config.model, vision.hidden_size, work).total
    costs = [each * number for number in layers]
    costs[-1] += head_flops(config.model, text_tokens=text_tokens)
    return costs
