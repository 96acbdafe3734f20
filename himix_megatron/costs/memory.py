"""What a rank holds while it trains: parameters and what belongs to them, activations, features. By arithmetic; no torch.

Flows in: a configuration with its layout, the data-parallel size and a micro-batch's sizes; out: bytes of each pipeline stage.
Parameters are exact (a test builds the model). Activations are the tensors that autograd keeps, a few per mille
of them left out; what no arithmetic knows (the CUDA context, NCCL's buffers, fragments) is an allowance on top.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from ..config import Config
from ..config.families import FAMILIES
from ..config.towers import TOWERS
from .flops import Trains, chunk_layers, decoder_tokens, patches_of, tower_layers, vision_chunks

GIB = 2**30
VOCAB_MULTIPLE = 128
"""The embedding's rows are padded to a multiple of this and of the tensor ranks."""
CHUNK_LOGITS, GPU_CHUNK_LOGITS = 2**26, 2**28
"""Most logits of a rank that exist at once where the head runs in chunks, on a CPU and on a GPU: 256 MiB and 1 GiB in fp32.
Each chunk writes a gradient of the head's whole weight and adds it to the sum."""
MAX_LOGITS = 2**31
"""Most logits of a rank that are kept for the backward pass where the cross-entropy needs nothing beside them and writes its
gradient over them: 4 GiB in bf16. Above, chunks of an eighth of this."""
IMAGES_PER_FORWARD = 64
"""A frozen tower encodes at most as many vision tokens at once as this many of its largest images have."""
FIXED_BYTES = 2.5 * GIB
"""CUDA context, NCCL's buffers and cuBLAS's workspaces: an allowance, not measured here."""
FRAGMENTS = 0.05
"""Share of the rest that the caching allocator cannot hand out: an allowance, not measured here."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of them. Of a model, or of one rank."""

    language: float
    vision_kv: float
    tower: float

    @property
    def total(self) -> float:
        """All."""
        return self.language + self.vision_kv + self.tower

    def trained(self, config: Config) -> float:
        """Those of train.trainable_parts."""
        return sum(float(getattr(self, part)) for part in config.train.trainable_parts)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of a rank of one pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass by all micro-batches under way, and what one layer needs while it is computed again."""
    logits: float
    """A chunk of them, and the head's states; last stage only."""
    features: float
    """Of this step's images of the replica and the next step's, and what the tower needs while it encodes."""
    allowance: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(float(getattr(self, item.name)) for item in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sizes of one micro-batch as computed: padding included."""

    text_tokens: float
    vision_tokens: float
    """As the tower gives them."""
    rows: float = 1.0
    """Of text; a pack is one."""
    labelled_tokens: float | None = None
    """Text tokens with a label; None: all."""


def padded_vocab(config: Config) -> int:
    """Rows of the embedding as allocated."""
    multiple = math.lcm(VOCAB_MULTIPLE, config.parallel.tensor)
    return -(-config.model.vocab_size // multiple) * multiple


def tower_parameters(config: Config) -> int:
    """Of the layers that run: those up to the last one whose output is taken."""
    vision = config.vision
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    kind = TOWERS[vision.tower]
    positions = (vision.max_patches_per_image + kind.class_tokens) * kind.learned_positions
    norms = 2 * kind.norm_before + 2 * (kind.norm_after and -1 in vision.levels)
    vectors = kind.patch_bias + kind.class_tokens + positions + norms
    return layer * tower_layers(vision) + 3 * vision.patch_size**2 * width + vectors * width


def layer_parameters(config: Config, tensor: int = 1, *, injects: bool = True) -> Parameters:
    """Of one decoder layer, on one of `tensor` ranks."""
    model = config.model
    query, key_value = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    split = 2 * model.hidden_size * (query + key_value) + 3 * model.hidden_size * model.ffn_hidden_size
    split += (query + 2 * key_value) * model.has_qkv_bias
    weights = FAMILIES[model.family].layer_weights
    whole = 2 * model.hidden_size + sum(getattr(model, weight.length) for weight in weights)
    return Parameters(split / tensor + whole, _vision_parameters(config, tensor) if injects else 0.0, 0.0)


def _vision_parameters(config: Config, tensor: int) -> float:
    """What an injecting layer has of its own."""
    model, injection = config.model, config.injection
    hidden, head, width = model.hidden_size, model.channels_per_head, injection.vision_width(model, config.vision)
    query, key_value = model.num_attention_heads * head, model.num_query_groups * head
    split = 2.0 * key_value * (width + model.has_qkv_bias) * (injection.keys_values == "own")
    whole = width * (injection.norm == "own") + _adapter_parameters(config, tensor) * (injection.adapter == "per_layer")
    if injection.fusion == "block":
        split += 2 * hidden * query + query * model.has_qkv_bias + 3 * hidden * model.ffn_hidden_size
        return split / tensor + whole + 2 * hidden + 2 * head + 2
    split += hidden * query * (injection.gate == "zero")
    norms_keys = any("k_layernorm" in weight.name for weight in FAMILIES[model.family].layer_weights)
    return split / tensor + whole + head * (norms_keys and injection.key_norm == "own") + (injection.gate == "tanh")


def _adapter_parameters(config: Config, tensor: int) -> float:
    """An MLP from the features' width to the text's."""
    hidden = config.model.hidden_size
    return (config.injection.feature_width(config.vision) + 1 + hidden) * hidden / tensor + hidden


def vision_input_parameters(config: Config, tensor: int = 1) -> float:
    """What stands in front of all layers, in each model chunk that takes vision: the shared adapter, the tables of positions;
    on one of `tensor` ranks."""
    vision, injection = config.vision, config.injection
    tables = sum(injection.position_tables(vision).values()) * len(vision.levels) * injection.feature_width(vision)
    return _adapter_parameters(config, tensor) * (injection.adapter == "shared") + tables * (injection.position == "learned")


def _injecting(config: Config, layers: Iterable[int]) -> tuple[int, int]:
    """How many of these layers inject, and how many do not."""
    found = [number in config.injection.injecting_layers(config.model.num_layers) for number in layers]
    return sum(found), len(found) - sum(found)


def _stage_layers(config: Config, stage: int) -> list[int]:
    """The decoder layers of a pipeline stage."""
    ends = itertools.accumulate(chunk_layers(config), initial=0)
    chunks = [range(*span) for span in itertools.pairwise(ends)]
    return [layer for chunk in chunks[stage :: config.parallel.pipeline] for layer in chunk]


def model_parameters(config: Config) -> Parameters:
    """Of the whole model, the vocabulary as published."""
    model, layer = config.model, layer_parameters(config)
    ends = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2) + model.hidden_size
    injecting, _ = _injecting(config, range(model.num_layers))
    vision = injecting * layer.vision_kv + vision_input_parameters(config)
    return Parameters(model.num_layers * layer.language + ends, vision, tower_parameters(config))


def rank_parameters(config: Config, stage: int) -> Parameters:
    """On one rank of a pipeline stage: its layers' share, the embedding and the head where they are, a replica of what vision
    goes through first for each chunk that takes it, one of the tower for each chunk where it trains, and one where it is
    frozen."""
    model, parallel = config.model, config.parallel
    layer, layers = layer_parameters(config, parallel.tensor), _stage_layers(config, stage)
    table = padded_vocab(config) / parallel.tensor * model.hidden_size
    last = stage == parallel.pipeline - 1
    tables = (stage == 0) + (last and not (model.tie_embeddings and parallel.pipeline == 1))
    language = len(layers) * layer.language + tables * table + (model.hidden_size if last else 0)
    taking = sum(vision_chunks(config)[stage :: parallel.pipeline])
    vision = _injecting(config, layers)[0] * layer.vision_kv + taking * vision_input_parameters(config, parallel.tensor)
    replicas = parallel.virtual_pipeline if "tower" in config.train.trainable_parts else 0 if config.data.features else 1
    return Parameters(language, vision, replicas * tower_parameters(config))


def layer_activations(config: Config, micro_batch: MicroBatch, *, injects: bool = True) -> float:
    """Numbers that one layer keeps of a micro-batch, on one tensor rank."""
    model, parallel, injection = config.model, config.parallel, config.injection
    query, key_value = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    vision, sequence = decoder_tokens(config, micro_batch.vision_tokens), parallel.tensor if parallel.sequence else 1
    text = micro_batch.text_tokens + vision * injection.in_sequence
    trains, plain = "language" in config.train.trainable_parts, model.layer_spec == "torch"
    # The two norms' inputs; where weights train also what comes out of them, and in 16 bits torch's norm keeps what it scales.
    scaled = plain and config.train.precision == "bf16"
    whole = text * model.hidden_size * (2 + (2 + 2 * scaled) * trains) / sequence
    # Queries, keys and values, and what they mix to; torch's backend keeps the projection's output beside turned copies of it;
    # where it picks the keys that a text sees, what they mix to in two orders.
    picks = injects and injection.fusion == "joint" and injection.visibility != "all"
    heads = (2 + plain * (trains if picks else 1)) * query + (2 + (plain and not picks)) * key_value
    own_angles = injection.position in ("rotary", "rotary_image") and not injection.in_sequence  # of each row
    angles = 4 * model.channels_per_head * text / (1 if own_angles else micro_batch.rows)
    # The MLP's two halves; where weights train, what they activate to.
    mlp = text * model.ffn_hidden_size * (2 + trains) / parallel.tensor
    added = _vision_activations(config, text, vision) if injects and not injection.in_sequence else 0.0
    return whole + text * heads / parallel.tensor + angles + mlp + added


def _vision_activations(config: Config, text: float, vision: float) -> float:
    """What an injecting layer keeps besides."""
    model, injection, tensor, trains = config.model, config.injection, config.parallel.tensor, Trains.of(config)
    hidden, head, sequence = model.hidden_size, model.channels_per_head, tensor if config.parallel.sequence else 1
    query, key_value = model.num_attention_heads * head, model.num_query_groups * head
    of_text = injection.keys_values == "text"
    found = vision * 2 * key_value / tensor
    if injection.position in ("rotary", "rotary_image"):
        found += vision * 2 * head
    if injection.adapter == "per_layer":  # between its two products, behind them, and normed
        found += vision * hidden * (2 / tensor + 1 + (trains.language if of_text else trains.vision))
    if injection.norm != "none":  # weights times the norm's, where what they project needs a gradient
        folded = 2 * key_value * injection.vision_width(model, config.vision) / tensor
        found += folded * (trains.adapted + (of_text and trains.language))
    if injection.fusion == "separate":
        found += text * (2 * key_value * injection.local_text + 3 * query) / tensor
        found += text * query * (injection.gate == "tanh" and trains.language) / tensor
    if injection.fusion == "block":
        found += text * (6 * hidden / sequence + (5 * query + 3 * model.ffn_hidden_size) / tensor)
        found += vision * 3 * key_value / tensor  # keys before and behind their norm
    return found


def input_activations(config: Config, micro_batch: MicroBatch) -> float:
    """Numbers that a chunk that takes vision keeps of a micro-batch in front of its layers, the tower's features left out."""
    injection, vision, tensor = config.injection, config.vision, config.parallel.tensor
    hidden, features = config.model.hidden_size, injection.feature_width(vision)
    made = injection.position == "learned" or (injection.reduce != "none" and injection.adapter != "none")
    width: float = features * made + injection.vision_width(config.model, vision) * (injection.adapter != "per_layer")
    if injection.adapter == "shared":  # between its two products, and behind them
        width += hidden * (2 / tensor + (not injection.in_sequence))
    return decoder_tokens(config, micro_batch.vision_tokens) * len(vision.levels) * width


def chunks_under_way(config: Config, stage: int, num_micro_batches: int) -> int:
    """Micro-batches of a chunk whose activations a stage holds at most. Source: megatron-core's schedules."""
    size, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if chunks == 1:
        return min(num_micro_batches, size - stage)
    return min(num_micro_batches * chunks, 2 * (size - stage - 1) + (chunks - 1) * size + 1)


def rank_memory(
    config: Config, stage: int, *, data_size: int, micro_batch: MicroBatch, vision_tokens_per_step: float, on_gpu: bool = True
) -> RankMemory:
    """Bytes of a rank of `stage`.

    Args: micro_batch: the largest one; vision_tokens_per_step: of one replica.
    """
    parallel, train, vision = config.parallel, config.train, config.vision
    size = 2 if train.precision == "bf16" else 4
    own = rank_parameters(config, stage)
    trained = own.trained(config)
    states = (12 if size == 2 else 8) * trained / (data_size if parallel.distributed_optimizer else 1)
    num_micro_batches = config.global_batch // (data_size * config.micro_batch)
    injecting, others = _injecting(config, _stage_layers(config, stage))
    layer, other = (layer_activations(config, micro_batch, injects=injects) for injects in (True, False))
    text = micro_batch.text_tokens * config.model.hidden_size
    if config.injection.in_sequence:
        text += decoder_tokens(config, micro_batch.vision_tokens) * config.model.hidden_size
    taking = sum(vision_chunks(config)[stage :: parallel.pipeline])
    kept = injecting * layer + others * other
    if train.recompute == "full":
        kept = (injecting + others) * text / (parallel.tensor if parallel.sequence else 1)
    kept += taking * input_activations(config, micro_batch)
    under_way = chunks_under_way(config, stage, num_micro_batches) * kept / parallel.virtual_pipeline
    if train.cuda_graphs == "on":
        under_way *= 2  # the graphs' pool, and beside it micro-batches of a size that is not recorded yet
    again = (layer if injecting else other) if train.recompute == "full" else 0.0
    logits = 0.0
    if stage == parallel.pipeline - 1:
        rows = padded_vocab(config) / parallel.tensor
        tokens = micro_batch.text_tokens if micro_batch.labelled_tokens is None else micro_batch.labelled_tokens
        logits = 12 * min(GPU_CHUNK_LOGITS if on_gpu else CHUNK_LOGITS, tokens * rows)
        if on_gpu:
            # With Transformer Engine's loss, whatever the layers are: all logits once, and the weight's gradient beside them.
            chunk = tokens * rows if tokens * rows <= MAX_LOGITS else MAX_LOGITS / 8
            kept = size * (chunk + ("language" in train.trainable_parts) * rows * config.model.hidden_size)
            logits = kept if config.model.layer_spec != "torch" else max(logits, kept)
        logits += 3 * size * text
    features = 2 * vision_tokens_per_step * vision.feature_width * size if taking else 0.0
    if not config.data.features:
        share = vision_tokens_per_step / (parallel.tensor * parallel.pipeline)
        patches = patches_of(vision, min(IMAGES_PER_FORWARD * vision.max_tokens_per_image, share))
        features += patches * (6 * vision.hidden_size + vision.ffn_hidden_size) * size
    found = RankMemory(
        weights=size * own.total,
        gradients=4 * trained,
        optimizer=states,
        activations=size * (under_way + again),
        logits=logits,
        features=features,
    )
    return replace(found, allowance=FIXED_BYTES + FRAGMENTS * found.total) if on_gpu else found
