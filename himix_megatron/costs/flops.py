"""Floating-point operations by arithmetic: of a training step; and layers split so that stages cost alike.

Flows in: the sizes of a configuration and what samples amount to; out: operations, 2 for each multiply-add. Two conventions
for attention: `causal`, what is needed (a text token over the vision that it sees, and over the text up to itself), and full
rectangles, the paper's way (at 64 text and 729 vision tokens, with the head on every token, they give its 78, 161 and 192
GFLOP for Qwen2-0.5B, TinyLlama-1.1B and Llama-3.2-1B to 0.6 %). No torch.

`Work` says what samples amount to, whatever the method; `decoder_layers` what each layer multiplies, by `config.injection`. An
adapter that all layers share is counted once in a step's FLOPs, though each model chunk that takes vision runs its own copy.

A step's model FLOPs are the products that forward and backward cannot do without: work whose result nobody needs, and what is
computed a second time to save memory, is not in them (`StepFlops.recomputed` has the latter). Norms, activations, softmax and
the optimizer are not counted, as is the custom.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from ..config import Config, InjectionConfig, ModelConfig, VisionConfig
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


def decoder_tokens(config: Config, vision_tokens: float) -> float:
    """Vision tokens that the decoder gets of so many of the tower's, at the ratio of its largest image."""
    side = config.vision.image_size // config.vision.patch_size
    rows, columns = config.injection.reduced_grid(side, side)
    return vision_tokens * rows * columns / side**2


def tower_layers(vision: VisionConfig) -> int:
    """Layers of the tower that run: those up to the deepest hidden state that is taken."""
    return vision.num_layers + 1 + max(vision.levels)


def _tower_flops(vision: VisionConfig, *, images: float, patches: float, patch_pairs: float) -> float:
    """Up to the last layer whose output is taken (class tokens counted)."""
    width, extra = vision.hidden_size, TOWERS[vision.tower].class_tokens
    tokens, pairs = patches + extra * images, patch_pairs + 2 * extra * patches + extra**2 * images
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.ffn_hidden_size) + 4 * pairs * width
    return float(layer * tower_layers(vision) + _patch_flops(vision, patches))


def _patch_flops(vision: VisionConfig, patches: float) -> float:
    return 2 * patches * 3 * vision.patch_size**2 * vision.hidden_size


# ---- what samples amount to --------------------------------------------------------------------------------------------

Images = Sequence[tuple[float, float]]
"""Of a sample, in the order of the text: of each image the text tokens before it, and its vision tokens in the decoder."""


@dataclass(frozen=True, slots=True)
class Work:
    """What samples amount to. Each field is a sum over samples: those of ranks and steps may be added."""

    text_tokens: float = 0.0
    vision_tokens: float = 0.0
    """As the decoder gets them: after `injection.reduce`."""
    text_pairs: float = 0.0
    """Text queries times the text keys each of them sees."""
    vision_pairs: float = 0.0
    """Text queries times the vision keys each of them sees, where it sees all of its sample."""
    earlier_pairs: float = 0.0
    """The same where it sees the images before it."""
    latest_pairs: float = 0.0
    """The same where it sees the latest of these."""
    local_pairs: float = 0.0
    """Text queries behind an image times the text keys since the latest image."""
    opening_pairs: float = 0.0
    """Text queries before a sample's first image times the text keys up to them."""
    sequence_pairs: float = 0.0
    """Queries times keys where vision stands in the text's sequence."""
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
        text_lengths: Sequence[float], vision_lengths: Sequence[float | Images], *, head_tokens: float, causal: bool = True
    ) -> Work:
        """Of samples with these numbers of text and vision tokens; padding belongs to no sample, so leave it out.

        Args: vision_lengths: of each sample its images; or their tokens alone, where they all stand before the text.
        """
        rows = [
            _sample_work(text, images if isinstance(images, Sequence) else [(0, images)][: bool(images)], causal)
            for text, images in zip(text_lengths, vision_lengths, strict=True)
        ]
        return replace(Work(*(float(sum(column)) for column in zip(*rows, strict=True))), head_tokens=float(head_tokens))

    @staticmethod
    def concatenated(
        text_lengths: Sequence[float], vision_lengths: Sequence[float], *, head_tokens: float, causal: bool = True
    ) -> Work:
        """Of the same samples where vision tokens are part of the text, without a projector: what HiMix is compared with."""
        both = [s + n for s, n in zip(text_lengths, vision_lengths, strict=True)]
        return Work.of(both, [0.0] * len(both), head_tokens=head_tokens, causal=causal)

    def seen_pairs(self, injection: InjectionConfig) -> float:
        """Text queries times the vision keys each of them sees."""
        return {"all": self.vision_pairs, "earlier": self.earlier_pairs, "latest": self.latest_pairs}[injection.visibility]

    def local_text_pairs(self, injection: InjectionConfig) -> float:
        """Text queries that see vision times the text keys each of them sees with `local_text`."""
        return self.local_pairs + self.opening_pairs * (injection.visibility == "all")


def _sample_work(text: float, images: Images, causal: bool) -> tuple[float, ...]:
    """The fields of Work of one sample, up to the head's. Between two places of images text tokens see alike."""

    def among(tokens: float) -> float:
        return tokens * (tokens + 1) / 2 if causal else tokens * tokens

    vision = together = earlier = latest = local = 0.0
    for (place, tokens), (following, _) in itertools.pairwise((*images, (text, 0.0))):
        vision, together, place = vision + tokens, together + tokens, min(place, text)
        earlier += tokens * (text - place)
        if (until := min(following, text) - place) > 0:
            latest, local, together = latest + together * until, local + among(until), 0.0
    opening = among(min(images[0][0], text)) if images else 0.0
    return text, vision, among(text), text * vision, earlier, latest, local, opening, among(text + vision)


# ---- a training step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Of forward and backward over some work."""

    decoder: float
    """Layers, and the adapter in front of them."""
    head: float
    """LM head."""
    tower: float
    recomputed: float
    """Done beyond them: logits a second time (always counted, though Transformer Engine's loss does without), attention or
    whole layers as train.recompute says (which also takes the gradient of the text that enters the layers where nothing in
    front of them trains)."""

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
class Product:
    """Rows of activations times a weight of inner x columns, and which gradients are wanted of it."""

    rows: float
    inner: int
    columns: int
    weight: bool
    """The weight's."""
    below: bool
    """That of what goes in."""
    split: Literal["columns", "inner"] = "columns"
    """The side of the weight that tensor ranks share."""

    @property
    def forward(self) -> float:
        """FLOPs."""
        return 2.0 * self.rows * self.inner * self.columns

    @property
    def backward(self) -> float:
        """FLOPs."""
        return self.forward * (self.weight + self.below)


@dataclass(frozen=True, slots=True)
class Attention:
    """Scores and mixing over pairs of queries and keys, and whose gradients are wanted: the queries', the keys' and values'."""

    pairs: float
    width: int
    """Channels of all query heads."""
    queries: bool
    keys: bool

    @property
    def forward(self) -> float:
        """FLOPs."""
        return 4.0 * self.pairs * self.width

    @property
    def backward(self) -> float:
        """FLOPs: the forward is two products; of the same size are one for values, one for keys, one for queries, and one for
        the weights, which both queries and keys want."""
        return self.forward / 2 * ((self.queries or self.keys) + self.queries + 2 * self.keys)


@dataclass(frozen=True, slots=True)
class Layer:
    """What one decoder layer multiplies."""

    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    """That of the text itself is the last one."""
    tokens: float
    """Tokens that go through it: the text's, and those of vision where it stands in the sequence."""
    has_block: bool
    """Whether a block of its own takes up vision before it."""
    joins: bool
    """Whether keys and values of vision and text are put together."""

    @property
    def forward(self) -> float:
        """FLOPs."""
        return sum(item.forward for item in self.products) + sum(item.forward for item in self.attention)

    @property
    def backward(self) -> float:
        """FLOPs."""
        return sum(item.backward for item in self.products) + sum(item.backward for item in self.attention)


@dataclass(frozen=True, slots=True)
class Trains:
    """Which gradients are wanted."""

    language: bool
    vision: bool
    features: bool
    """Those of the features, with what is added to them."""
    adapted: bool
    """Those of what comes out of the adapter; without one, of the features."""

    @staticmethod
    def of(config: Config) -> Trains:
        injection, parts = config.injection, config.train.trainable_parts
        vision = "vision_kv" in parts
        features = "tower" in parts or (vision and injection.position == "learned")
        return Trains("language" in parts, vision, features, features or (vision and injection.adapter != "none"))


def adapter_products(config: Config, work: Work) -> tuple[Product, ...]:
    """Of one adapter on one of the tower's hidden states."""
    width, hidden, trains = config.injection.feature_width(config.vision), config.model.hidden_size, Trains.of(config)
    return (
        Product(work.vision_tokens, width, hidden, trains.vision, trains.features),
        Product(work.vision_tokens, hidden, hidden, trains.vision, trains.adapted, "inner"),
    )


def shared_adapter(config: Config, work: Work) -> tuple[Product, ...]:
    """Of the adapter in front of all layers, on each of the tower's hidden states; of none where there is none."""
    return adapter_products(config, work) * len(config.vision.levels) if config.injection.adapter == "shared" else ()


def decoder_layers(config: Config, work: Work, *, inputs_train: bool = False) -> list[Layer]:
    """What each layer multiplies, and which gradients are wanted by what trains: what is frozen gets no weight gradients, and
    no gradient flows where nothing in front of it trains.

    Args: inputs_train: something in front of the decoder trains though no part of ours says so (LLaVA's projector).
    """
    injection, num_layers, trains = config.injection, config.model.num_layers, Trains.of(config)
    injecting = set(injection.injecting_layers(num_layers))
    below = inputs_train or trains.language or (injection.in_sequence and trains.adapted)
    kinds: dict[tuple[bool, bool], Layer] = {}
    layers = []
    for injects in (number in injecting for number in range(num_layers)):
        if (injects, below) not in kinds:
            kinds[injects, below] = _layer(config, work, trains, injects, below)
        layers.append(kinds[injects, below])
        below = below or (injects and (trains.vision or trains.features))
    return layers


def _layer(config: Config, work: Work, trains: Trains, injects: bool, below: bool) -> Layer:
    """`below`: whether the text that comes in needs a gradient, as it does wherever the language model trains."""
    model, injection = config.model, config.injection
    hidden, text = model.hidden_size, work.text_tokens
    query, key_value = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    pairs = work.text_pairs
    if injection.in_sequence:
        text, pairs = text + work.vision_tokens, work.sequence_pairs
    products = _vision_products(config, work, trains) if injects else ()
    vision_keys = injects and (products[-1].weight or products[-1].below)
    passed = below or vision_keys  # behind the vision
    attention: tuple[Attention, ...] = ()

    def mlp(weights: bool) -> tuple[Product, Product]:
        inner = model.ffn_hidden_size
        return Product(text, hidden, 2 * inner, weights, passed), Product(text, inner, hidden, weights, passed, "inner")

    has_block = injects and injection.fusion == "block"
    if has_block:
        # The norm before its queries trains with it, and gets its gradient through them.
        queries = below or trains.vision
        products += Product(text, hidden, query, trains.vision, queries), *mlp(trains.vision)
        products += (Product(text, query, hidden, trains.vision, passed, "inner"),)
        attention += (Attention(work.seen_pairs(injection), query, queries, vision_keys),)
        below = passed
    elif injects:
        attention += (Attention(work.seen_pairs(injection), query, below, vision_keys),)
        attention += (Attention(work.local_text_pairs(injection), query, below, below),) if injection.local_text else ()
    apart = injects and injection.gate == "zero"
    if apart:
        products += (Product(text, query, hidden, trains.vision, passed, "inner"),)
    products += (
        Product(text, hidden, query + 2 * key_value, trains.language, below),
        Product(text, query, hidden, trains.language, below if apart else passed, "inner"),
        *mlp(trains.language),
    )
    joins = injects and (injection.fusion == "joint" or injection.local_text)
    return Layer(products, (*attention, Attention(pairs, query, below, below)), text, has_block, joins)


def _vision_products(config: Config, work: Work, trains: Trains) -> tuple[Product, ...]:
    """The layer's own adapter, and its vision's keys and values."""
    injection, model = config.injection, config.model
    weight = trains.vision if injection.keys_values == "own" else trains.language
    # The norm's weight is folded into the projection's: one product makes the gradients of both, or of either.
    norm = {"own": trains.vision, "input": trains.language, "none": False}[injection.norm]
    width, columns = injection.vision_width(model, config.vision), 2 * model.num_query_groups * model.channels_per_head
    adapter = adapter_products(config, work) if injection.adapter == "per_layer" else ()
    return *adapter, Product(work.vision_tokens, width, columns, weight or norm, trains.adapted)


def forward_flops(config: Config, work: Work) -> StepFlops:
    """The forward pass alone."""
    layers, adapter = decoder_layers(config, work), shared_adapter(config, work)
    return StepFlops(
        decoder=sum(layer.forward for layer in layers) + sum(product.forward for product in adapter),
        head=head_flops(config.model, text_tokens=work.head_tokens),
        tower=_tower_flops(config.vision, images=work.images, patches=work.patches, patch_pairs=work.patch_pairs),
        recomputed=0.0,
    )


def step_flops(config: Config, work: Work, *, inputs_train: bool = False) -> StepFlops:
    """Forward and backward, by what trains (`trainable_parts`). `inputs_train`: as in `decoder_layers`."""
    parts, recompute, forward = config.train.trainable_parts, config.train.recompute, forward_flops(config, work)
    layers, adapter = decoder_layers(config, work, inputs_train=inputs_train), shared_adapter(config, work)
    backward = sum(layer.backward for layer in layers)
    again = 0.0
    if recompute == "selective":
        again = sum(item.forward for layer in layers for item in layer.attention)
    elif recompute == "full":
        recomputed = decoder_layers(config, work, inputs_train=True)
        again = sum(layer.forward + layer.backward for layer in recomputed) - backward
    frozen_tower = "tower" not in parts
    return StepFlops(
        decoder=forward.decoder + backward + sum(product.backward for product in adapter),
        head=forward.head * (3 if "language" in parts else 2),
        tower=forward.tower if frozen_tower else 3 * forward.tower - _patch_flops(config.vision, work.patches),
        recomputed=again + forward.head,
    )


def kv_cache_bytes(config: Config, text_tokens: float, vision_tokens: float) -> float:
    """Keys and values that generation keeps of so many tokens, in the run's precision: of text in every layer, of vision in
    those that inject; where it stands in the text's sequence, in every layer too.

    Args: vision_tokens: as the tower gives them.
    """
    model, injection = config.model, config.injection
    holding = model.num_layers if injection.in_sequence else len(injection.injecting_layers(model.num_layers))
    each = 2 * model.num_query_groups * model.channels_per_head * (2 if config.train.precision == "bf16" else 4)
    return each * (model.num_layers * text_tokens + holding * decoder_tokens(config, vision_tokens))


# ---- pipeline stages ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def chunk_layers(config: Config) -> tuple[int, ...]:
    """Decoder layers of each model chunk in the order of the network: chunk i is on pipeline stage i % parallel.pipeline."""
    parallel, num_layers = config.parallel, config.model.num_layers
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.split == "even":
        return (num_layers // num_chunks,) * num_chunks
    # On a sample of usual text and one largest image, forward.
    text_tokens, injecting = parallel.split_text_tokens, _injecting(config)
    vision_tokens = decoder_tokens(config, config.vision.max_tokens_per_image)
    work = Work.of([text_tokens], [vision_tokens], head_tokens=text_tokens, causal=False)
    layers = tuple(layer.forward for layer in decoder_layers(config, work))
    adapter = sum(product.forward for product in shared_adapter(config, work))
    head = head_flops(config.model, text_tokens=text_tokens)
    # A stage without a layer has nothing to train but the head.
    least = (*[1] * (num_chunks - 1), 0 if "language" in config.train.trainable_parts else 1)
    return _balanced(layers, head, adapter, injecting, least, parallel.pipeline)


def vision_chunks(config: Config) -> tuple[bool, ...]:
    """Whether each model chunk takes vision features, in the order of `chunk_layers`: those with a layer that injects; where
    vision stands in the text's sequence, the first alone."""
    return _takes_vision(_injecting(config), chunk_layers(config))


def _injecting(config: Config) -> tuple[int, ...]:
    """The layers whose chunks take vision."""
    return (0,) if config.injection.in_sequence else config.injection.injecting_layers(config.model.num_layers)


def _takes_vision(injecting: Sequence[int], layers: Sequence[int]) -> tuple[bool, ...]:
    ends = itertools.accumulate(layers, initial=0)
    return tuple(any(start <= layer < end for layer in injecting) for start, end in itertools.pairwise(ends))


@functools.lru_cache(maxsize=64)
def _balanced(
    each: tuple[float, ...], head: float, adapter: float, injecting: tuple[int, ...], least: tuple[int, ...], pipeline: int
) -> tuple[int, ...]:
    """Layers of each chunk, at least `least`, such that stages cost alike: by what each layer costs, the head, and the adapter
    of each chunk that takes vision."""
    layers, before = list(least), list(itertools.accumulate(each, initial=0.0))

    def costs(split: Sequence[int]) -> list[float]:
        ends = itertools.accumulate(split, initial=0)
        found = [before[end] - before[begin] for begin, end in itertools.pairwise(ends)]
        if adapter:
            found = [cost + adapter * takes for cost, takes in zip(found, _takes_vision(injecting, split), strict=True)]
        found[-1] += head
        return found

    # A layer at a time, to the stage that has least to do, there to its cheapest chunk.
    for _ in range(len(each) - sum(layers)):
        found = costs(layers)
        stage = min(range(pipeline), key=lambda s: sum(found[s::pipeline]))
        layers[min(range(stage, len(layers), pipeline), key=lambda chunk: found[chunk])] += 1

    def slowest_first(split: Sequence[int]) -> list[float]:
        found = costs(split)
        total = sum(found)
        return sorted((round(sum(found[stage::pipeline]) / total, 9) for stage in range(pipeline)), reverse=True)

    # Where layers are alike, no split is better. Where they differ, one goes from chunk to chunk while that helps.
    while len(set(each)) > 1:
        moved = [
            [number - (chunk == source) + (chunk == target) for chunk, number in enumerate(layers)]
            for source, target in itertools.permutations(range(len(layers)), 2)
            if layers[source] > least[source]
        ]
        best = min(moved, key=slowest_first, default=layers)
        if slowest_first(best) >= slowest_first(layers):
            break
        layers = best
    return tuple(layers)
