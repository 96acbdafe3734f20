"""Floating-point operations by arithmetic: what a decoder layer and the head cost, and layers split so that stages cost alike.

Flows in: the sizes of a configuration and the tokens of a sample; out: operations, 2 for each multiply-add, attention counted
as full rectangles (the paper's way: at 64 text and 729 vision tokens this gives its 78, 161 and 192 GFLOP for Qwen2-0.5B,
TinyLlama-1.1B and Llama-3.2-1B to 0.6 %). All are of the forward pass. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from himix_megatron.config import Config, ModelConfig


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """Of one decoder layer on one sample, forward."""

    text: float
    """Products of text with weights: q, k, v, output, MLP."""
    vision: float
    """The vision K/V projections."""
    attention: float
    """Scores and mixing: text queries over vision and text keys."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.text + self.vision + self.attention


def layer_flops(model: ModelConfig, vision_width: int, *, text_tokens: float, vision_tokens: float) -> LayerFlops:
    """One HiMix decoder layer on a sample of so many text and vision tokens."""
    query, key_value = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    weights = 2 * model.hidden_size * (query + key_value) + 3 * model.hidden_size * model.ffn_hidden_size
    return LayerFlops(
        text=2 * text_tokens * weights,
        vision=2 * vision_tokens * vision_width * 2 * key_value,
        attention=2 * 2 * text_tokens * (text_tokens + vision_tokens) * query,
    )


def head_flops(model: ModelConfig, *, text_tokens: float) -> float:
    """The LM head on every text token."""
    return 2.0 * text_tokens * model.hidden_size * model.vocab_size


def chunk_layers(config: Config) -> tuple[int, ...]:
    """Decoder layers of each model chunk in the order of the network: chunk i is on pipeline stage i % parallel.pipeline."""
    parallel, num_layers = config.parallel, config.model.num_layers
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.split == "even":
        return (num_layers // num_chunks,) * num_chunks
    # A stage without a layer has nothing to train but the head.
    layers = [1] * (num_chunks - 1) + [0 if "language" in config.train.parts else 1]
    # A layer at a time, to the stage that has least to do, there to its cheapest chunk: layers are alike, so none is better.
    for _ in range(num_layers - sum(layers)):
        costs = _chunk_costs(config, layers)
        stage = min(range(parallel.pipeline), key=lambda s: sum(costs[s :: parallel.pipeline]))
        layers[min(range(stage, num_chunks, parallel.pipeline), key=lambda chunk: costs[chunk])] += 1
    return tuple(layers)


def stage_flops(config: Config) -> tuple[float, ...]:
    """Of each pipeline stage on a sample of `parallel.split_text_tokens` and one image, forward, the head counted."""
    costs = _chunk_costs(config, chunk_layers(config))
    return tuple(sum(costs[stage :: config.parallel.pipeline]) for stage in range(config.parallel.pipeline))


def _chunk_costs(config: Config, layers: tuple[int, ...] | list[int]) -> list[float]:
    vision, text_tokens = config.vision, config.parallel.split_text_tokens
    layer = layer_flops(config.model, vision.hidden_size, text_tokens=text_tokens, vision_tokens=vision.tokens_per_image).total
    costs = [layer * number for number in layers]
    costs[-1] += head_flops(config.model, text_tokens=text_tokens)
    return costs
