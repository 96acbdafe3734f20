"""Recipes hold the published sizes and the paper's settings, and each can start somewhere."""

from __future__ import annotations

import pytest

from himix_megatron.config import ModelConfig, check_ranks, from_json, to_json
from himix_megatron.data.text.tokenizer import ByteTokenizer
from pipelines.recipes import RECIPES, clip_large_336, siglip_so400m_384

FAMILIES = ["tiny", "qwen2_0_5b", "tinyllama_1_1b", "llama3_2_1b", "llama3_2_3b", "vicuna_7b"]


def _language_parameters(model: ModelConfig) -> int:
    """Parameters of the plain language model, without HiMix's additions."""
    key_value = model.num_query_groups * model.channels_per_head
    query = model.num_attention_heads * model.channels_per_head
    bias = query + 2 * key_value if model.has_qkv_bias else 0
    attention = 2 * model.hidden_size * (query + key_value) + bias
    layer = attention + 3 * model.hidden_size * model.ffn_hidden_size + 2 * model.hidden_size
    tables = 1 if model.tie_embeddings else 2
    return model.num_layers * layer + tables * model.vocab_size * model.hidden_size + model.hidden_size


def test_every_family_has_both_stages_under_its_own_name() -> None:
    assert sorted(RECIPES) == sorted(f"{family}_{stage}" for family in FAMILIES for stage in ("align", "instruct"))
    for name, recipe in RECIPES.items():
        assert recipe().recipe == name
        assert "Command:" in (recipe.__doc__ or "")
        assert "Hardware:" in (recipe.__doc__ or "")
        assert "Expected:" in (recipe.__doc__ or "")


@pytest.mark.parametrize(
    ("family", "parameters"),
    [  # As counted by Hugging Face from the published files.
        ("qwen2_0_5b", 494_032_768),
        ("tinyllama_1_1b", 1_100_048_384),
        ("llama3_2_1b", 1_235_814_400),
        ("llama3_2_3b", 3_212_749_824),
        ("vicuna_7b", 6_738_415_616),
    ],
)
def test_sizes_give_the_published_number_of_parameters(family: str, parameters: int) -> None:
    for stage in ("align", "instruct"):
        assert _language_parameters(RECIPES[f"{family}_{stage}"]().model) == parameters


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_stages_train_the_papers_parts(name: str) -> None:
    wanted = ("vision_kv",) if name.endswith("align") else ("language", "vision_kv")
    assert RECIPES[name]().train.trainable_parts == wanted


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_published_recipes_hold_the_papers_settings(family: str) -> None:
    align, instruct = RECIPES[f"{family}_align"](), RECIPES[f"{family}_instruct"]()
    assert align.train.global_batch_samples == 256
    assert instruct.train.global_batch_samples == 128
    assert 5e-4 <= align.optimizer.learning_rate <= 1e-3
    assert instruct.optimizer.learning_rate == 2e-5
    assert align.data.template == "plain"
    assert instruct.checkpoint.init_from == str(align.run_dir)
    for config in (align, instruct):
        assert (config.optimizer.schedule, config.optimizer.warmup_fraction, config.optimizer.weight_decay) == (
            "cosine",
            0.03,
            0,
        )
        assert config.train.precision == "bf16"
        assert (config.vision.resize, config.vision.feature_layer, config.vision.max_tokens_per_image) == ("square", -2, 729)
        assert config.model.text_only_vision == "zero_image"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_layouts_fit_the_ranks_that_the_recipes_name(name: str) -> None:
    for world_size in (1, 2) if name.startswith("tiny") else (8, 16):
        check_ranks(RECIPES[name](), world_size)


def test_tiny_recipes_fit_the_byte_tokenizer_and_one_tensor_group_of_two() -> None:
    for stage in ("align", "instruct"):
        config = RECIPES[f"tiny_{stage}"]()
        assert config.model.vocab_size == ByteTokenizer.vocab_size
        assert config.model.num_query_groups % 2 == 0
        assert config.train.precision == "fp32"


def test_towers_have_their_published_tokens() -> None:
    assert (siglip_so400m_384().max_tokens_per_image, clip_large_336().max_tokens_per_image) == (729, 576)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_survives_its_json(name: str) -> None:
    config = RECIPES[name]()
    assert from_json(to_json(config)) == config
