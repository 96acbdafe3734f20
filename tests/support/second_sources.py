"""Our model beside other people's code for the same method: names of weights both ways, texts with images, and what our model
makes of them.

Places of weights are as in himix_megatron/conversion/authors_layout.py: each tensor of ours, the tensors of theirs that lie in
it, and how many heads of each go to one key/value head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himix_megatron.config import (
    Config,
    DataConfig,
    InjectionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
)
from himix_megatron.conversion.authors_layout import is_new, join, layout, split
from himix_megatron.data.loading.batch import NO_LOSS, MicroBatch, StepBatch
from himix_megatron.data.loading.image_table import ImageTable
from himix_megatron.data.loading.plan import DataPosition

Places = dict[str, tuple[tuple[str, int], ...]]


# ---- weights -----------------------------------------------------------------------------------------------------------


def golden_places(model: ModelConfig, injection: InjectionConfig) -> Places:
    """Of the files in tests/data/methods."""
    places = _text_places(model)
    if injection.adapter == "shared":
        places |= _adapter_places("vision_input.adapter", "vision_adapter.fc{}")
    for layer in injection.injecting_layers(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.self_attention", f"model.layers.{layer}"
        if injection.adapter == "per_layer":
            places |= _adapter_places(f"{ours}.vision_adapter", theirs + ".vision_adapter.fc{}")
        if injection.keys_values == "own":
            for kind in ("weight", "bias"):
                places[f"{ours}.linear_vision_kv.{kind}"] = ((f"{theirs}.vision_kv.{kind}", 0),)
    return places


def llava_places(model: ModelConfig) -> Places:
    """Of transformers' LlavaForConditionalGeneration, but for its tower."""
    text = {
        ours: tuple((name.replace("model.", "model.language_model.", 1), heads) for name, heads in parts)
        for ours, parts in _text_places(model).items()
    }
    return text | _adapter_places("vision_input.adapter", "model.multi_modal_projector.linear_{}")


def mllama_layers(model: ModelConfig, injection: InjectionConfig) -> tuple[dict[int, int], dict[int, int]]:
    """transformers' numbers of our layers, and of the blocks before them: there a block counts as a layer."""
    injecting = injection.injecting_layers(model.num_layers)
    layers = {layer: layer + sum(other <= layer for other in injecting) for layer in range(model.num_layers)}
    return layers, {layer: layers[layer] - 1 for layer in injecting}


def mllama_places(model: ModelConfig, injection: InjectionConfig) -> Places:
    """Of transformers' MllamaForCausalLM."""
    layers, blocks = mllama_layers(model, injection)

    def renumbered(name: str) -> str:
        if not name.startswith("model.layers."):
            return name
        _, _, layer, rest = name.split(".", 3)
        return f"model.layers.{layers[int(layer)]}.{rest}"

    places: Places = {}
    for ours, parts in _text_places(model).items():
        places[ours] = tuple((renumbered(name), heads) for name, heads in parts)
    block: Places = {
        "input_layernorm.weight": (("input_layernorm.weight", 0),),
        "pre_mlp_layernorm.weight": (("post_attention_layernorm.weight", 0),),
        "linear_q.weight": (("cross_attn.q_proj.weight", 0),),
        "linear_vision_kv.weight": (("cross_attn.k_proj.weight", 1), ("cross_attn.v_proj.weight", 1)),
        "q_norm.weight": (("cross_attn.q_norm.weight", 0),),
        "k_norm.weight": (("cross_attn.k_norm.weight", 0),),
        "linear_proj.weight": (("cross_attn.o_proj.weight", 0),),
        "attention_gate": (("cross_attn_attn_gate", 0),),
        "mlp.linear_fc1.weight": (("mlp.gate_proj.weight", 0), ("mlp.up_proj.weight", 0)),
        "mlp.linear_fc2.weight": (("mlp.down_proj.weight", 0),),
        "mlp_gate": (("cross_attn_mlp_gate", 0),),
    }
    for layer, number in blocks.items():
        for ours, parts in block.items():
            theirs = tuple((f"model.layers.{number}.{name}", heads) for name, heads in parts)
            places[f"decoder.layers.{layer}.vision_block.{ours}"] = theirs
    return places


def _text_places(model: ModelConfig) -> Places:
    return {ours: parts for ours, parts in layout(model).items() if not any(is_new(name) for name, _ in parts)}


def _adapter_places(ours: str, theirs: str) -> Places:
    return {
        f"{ours}.linear_fc{number}.{kind}": ((f"{theirs.format(number)}.{kind}", 0),)
        for number in (1, 2)
        for kind in ("weight", "bias")
    }


def to_ours(theirs: Mapping[str, Tensor], places: Places, model: ModelConfig) -> dict[str, Tensor]:
    """Our weights from theirs, all of which must have a place."""
    assert theirs.keys() == {name for parts in places.values() for name, _ in parts}
    return {ours: join([theirs[name] for name, _ in p], [heads for _, heads in p], model) for ours, p in places.items()}


def to_theirs(ours: Mapping[str, Tensor], places: Places, model: ModelConfig) -> dict[str, Tensor]:
    """The opposite; gradients too."""
    assert ours.keys() == places.keys()
    found: dict[str, Tensor] = {}
    for name, parts in places.items():
        tensors = split(ours[name], [heads for _, heads in parts], model)
        found |= {theirs: tensor for (theirs, _), tensor in zip(parts, tensors, strict=True)}
    return found


@torch.no_grad()
def fill(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module all its weights but a tower's; rows that its embedding has beyond ours stay."""
    state = module.state_dict()
    assert {name for name in state if "vision_tower." not in name} == weights.keys()
    for name, tensor in weights.items():
        own = state[name][: len(tensor)]
        assert own.shape == tensor.shape, name
        own.copy_(tensor)


def drawn(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Weights with which every part counts: matrices that keep lengths about, vectors around 1, biases and gates around 0."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in sorted(shapes.items()):
        weight = torch.randn(*shape, generator=generator)
        if len(shape) > 1:
            found[name] = weight if "embed" in name else weight / shape[1] ** 0.5
        else:
            found[name] = 0.5 * weight if "gate" in name else 0.2 * weight + (not name.endswith("bias"))
    return found


# ---- our model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """n texts with their images."""

    ids: Tensor
    """int64[n, S], without vision tokens; padded on the right."""
    answers: Tensor
    """bool[n, S], tokens that have loss."""
    lengths: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    """Of each text's images, the text tokens before them."""
    features: Tensor
    """float[T, V], of all images one after the other."""

    @property
    def labels(self) -> Tensor:
        """int64[n, S], the token itself, as transformers takes labels."""
        return self.ids.masked_fill(~self.answers, NO_LOSS)


@dataclass(frozen=True)
class Outcome:
    """What a model makes of texts."""

    logits: Tensor
    """float[n, S', vocabulary]; S' counts vision tokens where these stand in the text."""
    loss: float
    gradients: dict[str, Tensor]
    """By the weights' names."""
    weights: dict[str, Tensor]
    """As they are in the model."""


def run_config(model: ModelConfig, vision: VisionConfig, injection: InjectionConfig) -> Config:
    """One rank in float32, where all but the tower trains."""
    return Config(
        recipe="second source",
        model=model,
        vision=vision,
        injection=injection,
        data=DataConfig(template="plain", max_text_tokens=256),
        train=TrainConfig(
            trainable_parts=("language", "vision_kv"), global_batch_samples=1, micro_batch_samples=1, precision="fp32"),
        optimizer=OptimizerConfig(learning_rate=1.0),
    )  # fmt: skip


def our_outcomes(cases: Sequence[tuple[Config, Mapping[str, Tensor], Texts]]) -> list[Outcome]:
    """Our model of each configuration with the weights on the texts, one micro-batch; on one rank that nothing has started."""
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed

    topology = init_distributed(cases[0][0].parallel, seed=1)
    found = [_outcome(config, weights, texts, topology) for config, weights, texts in cases]
    shutdown_distributed()
    return found


def _outcome(config: Config, weights: Mapping[str, Tensor], texts: Texts, topology: Any) -> Outcome:
    from himix_megatron.conversion.sharding import gather, global_parameters, scatter
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.model.himix_model import build_model_chunks
    from himix_megatron.model.stage_input import stage_inputs
    from tools.compare_reference import run_forward_backward

    model_chunks: list[Any] = build_model_chunks(config, detect(), topology, torch.nn.Identity())
    assert {name for name, _ in global_parameters(model_chunks)} == weights.keys()
    scatter(model_chunks, weights, topology)
    for stage in model_chunks:
        stage.zero_grad_buffer()
    inputs = stage_inputs(_step(texts, config.vision), texts.features, config, topology.device)
    logits, loss = run_forward_backward(config, model_chunks, inputs, topology)
    vocabulary = config.model.vocab_size
    gradients = gather(model_chunks, lambda parameter: parameter.main_grad, topology, vocabulary)
    return Outcome(logits, loss, gradients, gather(model_chunks, lambda parameter: parameter, topology, vocabulary))


def _step(texts: Texts, vision: VisionConfig) -> StepBatch:
    """The texts as the loader hands them to training."""
    labels = torch.nn.functional.pad(texts.labels[:, 1:], (0, 1), value=NO_LOSS)
    images = ImageTable.of(vision, [[vision.blank_size] * len(places) for places in texts.places], texts.places)
    number = len(texts.ids)
    micro_batch = MicroBatch(
        texts.ids, labels, torch.tensor(texts.lengths), images, tuple(map(str, range(number))), (0,) * number
    )
    return StepBatch(
        step=0,
        micro_batches=(micro_batch,),
        blank=torch.zeros(len(images), dtype=torch.bool),
        pixels=texts.features,
        bad_keys=(),
        after=DataPosition(),
        is_last=True,
        num_samples=number,
    )


# ---- comparing ---------------------------------------------------------------------------------------------------------


def transformers_outcome(model: Any, labels: Tensor, **inputs: Any) -> Outcome:
    """What a model of transformers makes of its own inputs."""
    output = model(labels=labels, **inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(output.logits.detach(), float(output.loss.detach()), gradients, dict(model.state_dict()))


def relative(found: Tensor, wanted: Tensor) -> float:
    """The difference's norm by the wanted's."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
