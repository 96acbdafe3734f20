"""Parameters are counted exactly, and activations are those that autograd keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from himix_megatron.config import Config, ParallelConfig
from himix_megatron.costs.memory import (
    MicroBatch,
    chunks_under_way,
    layer_activations,
    model_parameters,
    rank_memory,
    rank_parameters,
)
from himix_megatron.data.loading.image_table import ImageTable
from pipelines.recipes import RECIPES
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config

SAMPLES, TEXT, VISION = 2, 96, 200


def config_of(parts: Any, **layout: Any) -> Config:
    return small_config(Path("unused"), Path("unused"), parts=parts, **layout)


def built(config: Config) -> list[tuple[int, int, int]]:
    """This rank's parameters by part, the frozen tower counted."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks, part_of, unwrap_model
    from himix_megatron.model.towers import build_tower

    topology = init_distributed(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=0, dtype=torch.float32)
    model_chunks = build_model_chunks(config, detect(), topology, tower)
    found = {"language": 0, "vision_kv": 0, "tower": 0}
    for stage in model_chunks:
        for name, parameter in unwrap_model(stage).named_parameters():
            found[part_of(name)] += parameter.numel()
    if "tower" not in config.train.trainable_parts:
        found["tower"] = sum(parameter.numel() for parameter in tower.parameters())
    shutdown_distributed()
    return [(topology.pipeline_rank, *found.values())]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2, "split": "balanced"}],
    ids=["one rank", "tensor 2", "pipeline 2 interleaved", "pipeline 2 balanced"],
)
@pytest.mark.parametrize("parts", [("language", "vision_kv"), ("language", "vision_kv", "tower")], ids=["instruct", "all"])
def test_parameters_are_those_of_the_model(parts: Any, layout: dict[str, Any]) -> None:
    config = config_of(parts, **layout)
    for tied in (False, True):
        config = replace(config, model=replace(config.model, tie_embeddings=tied))
        for [(stage, *numbers)] in run_ranks(built, max(1, 2 if layout else 1), config, start_gloo=False):
            expected = rank_parameters(config, stage)
            assert numbers == [expected.language, expected.vision_kv, expected.tower]


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


def kept_by_layers(config: Config) -> float:
    """Bytes that autograd keeps of a micro-batch, of 6 layers less 2: what 4 layers keep, parameters left out."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model

    topology = init_distributed(config.parallel, seed=1)
    found = []
    for num_layers in (2, 6):
        sized = replace(config, model=replace(config.model, num_layers=num_layers))
        [stage] = build_model_chunks(sized, detect(), topology, torch.nn.Identity())
        stage.zero_grad_buffer()
        model = unwrap_model(stage)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, own: Any = own, kept: Any = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(260, (SAMPLES, TEXT), generator=torch.Generator().manual_seed(0))
        features = torch.randn(SAMPLES * VISION, config.vision.hidden_size)
        images = ImageTable.of_features([[VISION]] * SAMPLES)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model(ids, features, torch.zeros(SAMPLES, dtype=torch.bool), images, labels=ids)
        losses.sum().backward()
        found.append(sum(kept.values()))
    shutdown_distributed()
    return float(found[1] - found[0]) / 4


@pytest.mark.parametrize("parts", [("vision_kv",), ("language", "vision_kv")], ids=["align", "instruct"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_activations_are_what_autograd_keeps(parts: Any, recompute: Any) -> None:
    config = config_of(parts, recompute=recompute)
    config = replace(config, model=replace(config.model, hidden_size=256, ffn_hidden_size=704, num_query_groups=2))
    [kept] = run_ranks(kept_by_layers, 1, config, start_gloo=False)
    micro_batch = MicroBatch(text_tokens=SAMPLES * TEXT, vision_tokens=SAMPLES * VISION, rows=SAMPLES)
    text = SAMPLES * TEXT * config.model.hidden_size
    wanted = 4 * (layer_activations(config, micro_batch) if recompute == "none" else text)
    assert wanted == pytest.approx(kept, rel=0.02)


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
