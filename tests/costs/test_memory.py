"""Parameters are counted exactly, and activations are those that autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from himix_megatron.config import METHODS, Config, InjectionConfig, ParallelConfig
from himix_megatron.costs.memory import (
    MicroBatch,
    chunks_under_way,
    input_activations,
    layer_activations,
    model_parameters,
    rank_memory,
    rank_parameters,
)
from himix_megatron.data.loading.image_table import ImageTable
from pipelines.recipes import RECIPES
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config

SAMPLES, TEXT, VISION = 2, 96, 196


def config_of(parts: Any, **layout: Any) -> Config:
    return small_config(Path("unused"), Path("unused"), parts=parts, **layout)


def built(configs: list[Config]) -> list[list[int]]:
    """This rank's stage and its parameters by part, the frozen tower counted, of each configuration."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks, part_of, unwrap_model
    from himix_megatron.model.towers import build_tower

    topology, rows = init_distributed(configs[0].parallel, seed=1), []
    for config in configs:
        tower = build_tower(config.vision, seed=0, dtype=torch.float32)
        model_chunks = build_model_chunks(config, detect(), topology, tower)
        found = {"language": 0, "vision_kv": 0, "tower": 0}
        for stage in model_chunks:
            for name, parameter in unwrap_model(stage).named_parameters():
                found[part_of(name)] += parameter.numel()
        if "tower" not in config.train.trainable_parts:
            found["tower"] = sum(parameter.numel() for parameter in tower.parameters())
        rows.append([topology.pipeline_rank, *found.values()])
    shutdown_distributed()
    return rows


def points(config: Config) -> list[Config]:
    """The methods, and points with what they leave out."""
    made = [make(config.model) for make in METHODS.values()]
    made += [
        InjectionConfig(position="learned", reduce="merge", layers=(1, 3)),
        InjectionConfig(fusion="separate", gate="tanh", norm="none", reduce="pool", position="learned"),
        InjectionConfig(fusion="block", gate="tanh", adapter="per_layer"),
    ]
    levels = replace(config, vision=replace(config.vision, feature_layer=-2, feature_layers=(-2, -1)))
    native = replace(config, vision=replace(config.vision, tower="tiny_native"))
    found = [replace(config, injection=injection) for injection in made]
    return [*found, replace(levels, injection=made[-2]), replace(native, injection=made[-3])]


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2, "split": "balanced"}],
    ids=["one rank", "tensor 2", "pipeline 2 interleaved", "pipeline 2 balanced"],
)
@pytest.mark.parametrize("parts", [("language", "vision_kv"), ("language", "vision_kv", "tower")], ids=["instruct", "all"])
def test_parameters_are_those_of_the_model(parts: Any, layout: dict[str, Any]) -> None:
    config = config_of(parts, **layout)
    tied = replace(config, model=replace(config.model, tie_embeddings=True))
    configs = [tied, *points(config)]
    for rows in run_ranks(built, 2 if layout else 1, configs, start_gloo=False):
        for config, (stage, *numbers) in zip(configs, rows, strict=True):
            expected = rank_parameters(config, stage)
            assert numbers == [expected.language, expected.vision_kv, expected.tower], config.injection
            if not layout and config is not tied:
                assert model_parameters(config).vision_kv == expected.vision_kv


@pytest.mark.parametrize(
    ("family", "millions"), [("qwen2_0_5b", 494), ("tinyllama_1_1b", 1100), ("llama3_2_1b", 1236), ("vicuna_7b", 6738)]
)
def test_a_language_model_has_as_many_parameters_as_it_is_known_for(family: str, millions: float) -> None:
    assert model_parameters(RECIPES[f"{family}_align"]()).language == pytest.approx(millions * 1e6, rel=1e-3)


@pytest.mark.parametrize("kind", ["siglip", "clip", "tiny", "tiny_native"])
def test_a_towers_parameters_are_counted(kind: Any) -> None:
    from himix_megatron.costs.memory import tower_parameters
    from himix_megatron.model.towers import build_tower

    config = config_of(("vision_kv",))
    config = replace(config, vision=replace(config.vision, tower=kind, num_layers=3, feature_layer=-2))
    tower = build_tower(config.vision, seed=0, dtype=torch.float32)
    assert tower_parameters(config) == sum(parameter.numel() for parameter in tower.parameters())


def kept_of(configs: list[Config]) -> list[tuple[float, float]]:
    """Bytes that autograd keeps of a micro-batch, parameters left out: in one layer (of 6 layers less 2), and beside them."""
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed

    topology, found = init_distributed(configs[0].parallel, seed=1), []
    for config in configs:
        two, six = (kept_by(replace(config, model=replace(config.model, num_layers=n)), topology) for n in (2, 6))
        found.append(((six - two) / 4, two - (six - two) / 2))
    shutdown_distributed()
    return found


def kept_by(config: Config, topology: Any) -> float:
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model

    [stage] = build_model_chunks(config, detect(), topology, torch.nn.Identity())
    stage.zero_grad_buffer()
    model = unwrap_model(stage)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    length = TEXT + VISION * config.injection.in_sequence
    ids = torch.randint(260, (SAMPLES, length), generator=torch.Generator().manual_seed(0))
    features = torch.randn(SAMPLES * VISION, config.vision.feature_width)
    images = ImageTable((1,) * SAMPLES, ((112, 112),) * SAMPLES, (VISION,) * SAMPLES, (0,) * SAMPLES)
    inside = torch.cat([sample * length + torch.arange(VISION) for sample in range(SAMPLES)])
    rows = inside if config.injection.in_sequence else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(ids, features, torch.zeros(SAMPLES, dtype=torch.bool), images, labels=ids, vision_rows=rows)
    losses.sum().backward()
    return float(sum(kept.values()))


def wide(parts: Any, recompute: Any = "none", **choices: Any) -> Config:
    config = config_of(parts, recompute=recompute)
    model = replace(config.model, hidden_size=256, ffn_hidden_size=704, num_query_groups=2)
    return replace(
        config,
        model=model,
        vision=replace(config.vision, hidden_size=224, image_size=112),
        injection=InjectionConfig(**choices),
    )


BATCH = MicroBatch(text_tokens=SAMPLES * TEXT, vision_tokens=SAMPLES * VISION, rows=SAMPLES)


@pytest.mark.parametrize("parts", [("vision_kv",), ("language", "vision_kv")], ids=["align", "instruct"])
def test_activations_are_what_autograd_keeps(parts: Any) -> None:
    configs = [wide(parts, recompute) for recompute in ("none", "full")]
    text = SAMPLES * TEXT * configs[0].model.hidden_size
    [found] = run_ranks(kept_of, 1, configs, start_gloo=False)
    for config, (kept, _) in zip(configs, found, strict=True):
        wanted = layer_activations(config, BATCH) if config.train.recompute == "none" else text
        assert 4 * wanted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("parts", [("vision_kv",), ("language", "vision_kv")], ids=["align", "instruct"])
def test_layers_of_every_kind_keep_what_autograd_keeps(parts: Any) -> None:
    """With every layer injecting, then none that counts: what the choices add to a layer, and in front of all."""
    configs = [replace(wide(parts), injection=make(wide(parts).model)) for make in METHODS.values()]
    configs = [replace(config, injection=replace(config.injection, layers=(), every_layers=1)) for config in configs]
    configs += [
        wide(parts, layers=(0,)),
        wide(parts, fusion="separate", gate="tanh"),
        wide(parts, position="learned", reduce="merge"),
        replace(wide(parts, adapter="shared"), vision=replace(wide(parts).vision, feature_layers=(-1, -2))),
    ]
    [found] = run_ranks(kept_of, 1, configs, start_gloo=False)
    himix = found[0][1] - 4 * input_activations(configs[0], BATCH)
    for config, (kept, beside) in zip(configs, found, strict=True):
        injection = config.injection
        # A CPU's kernel takes a mask for text keys that are picked, of all queries of a group; on a GPU there is none.
        picks = injection.local_text or (injection.fusion == "joint" and injection.visibility != "all")
        mask = 2 * TEXT * (TEXT + VISION) * picks
        wanted = layer_activations(config, BATCH, injects=injection.layers == ()) + mask
        assert 4 * wanted == pytest.approx(kept, rel=0.02), injection
        # In align the first layer keeps less, and where vision stands in the text there is more of it in front of the layers.
        if "language" in parts and not injection.in_sequence and not injection.layers:
            # An adapter keeps the features too, which are held anyway.
            features = 4 * SAMPLES * VISION * config.vision.feature_width * (injection.adapter != "none")
            assert beside - himix == pytest.approx(4 * input_activations(config, BATCH) + features, rel=0.05), injection


def test_a_stage_holds_as_many_micro_batches_as_its_schedule_has_under_way() -> None:
    plain = config_of(("language",), pipeline=4)
    assert [chunks_under_way(plain, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_under_way(plain, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    interleaved = config_of(("language",), pipeline=2, virtual_pipeline=2)
    assert [chunks_under_way(interleaved, stage, 8) for stage in range(2)] == [5, 3]


def test_a_distributed_optimizer_holds_its_share() -> None:
    config = RECIPES["llama3_2_3b_instruct"]()
    sizes = {"micro_batch": MicroBatch(text_tokens=2048, vision_tokens=729), "vision_tokens_per_step": 8 * 729}
    one, eight = (rank_memory(config, 0, data_size=size, **sizes) for size in (1, 8))  # type: ignore[arg-type]
    assert one.optimizer == 8 * eight.optimizer
    assert one.gradients == eight.gradients
    # fp32 main weights and two moments, beside bf16 weights and fp32 gradients.
    trained = rank_parameters(config, 0).trained(config)
    assert (one.optimizer, one.gradients) == (12 * trained, 4 * trained)


def test_the_towers_memory_is_bounded_by_what_it_encodes_at_once() -> None:
    config = RECIPES["llama3_2_1b_instruct"]()
    config, vision = replace(config, parallel=ParallelConfig()), config.vision
    largest = MicroBatch(text_tokens=2048, vision_tokens=729)

    def features(tokens: float) -> float:
        return rank_memory(config, 0, data_size=1, micro_batch=largest, vision_tokens_per_step=tokens).features

    held, inner = 2 * 2 * vision.hidden_size, 2 * (6 * vision.hidden_size + vision.ffn_hidden_size)
    for images in (1, 64, 65, 200):  # bf16: this step's features and the next one's; 64 images at once
        assert features(729 * images) == 729 * (images * held + min(images, 64) * inner)


def test_constants_are_those_of_the_model() -> None:
    from himix_megatron.costs import memory
    from himix_megatron.distributed import megatron_config
    from himix_megatron.model import loss, vision_encoder

    assert megatron_config.padded_vocab is memory.padded_vocab
    assert (memory.CHUNK_LOGITS, memory.GPU_CHUNK_LOGITS) == (loss.CHUNK_LOGITS, loss.GPU_CHUNK_LOGITS)
    assert memory.MAX_LOGITS == loss.MAX_LOGITS
    assert vision_encoder.IMAGES_PER_FORWARD is memory.IMAGES_PER_FORWARD
