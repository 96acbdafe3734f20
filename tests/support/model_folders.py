"""Small random Hugging Face folders for tests: language models of each family, and towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES = {"num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 96, "max_position_embeddings": 16384}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama, grouped heads": {
        "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
    },
    "llama, tied, Llama 3's rope, odd vocabulary, wide heads": {
        "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 263, "head_dim": 16,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, **_LLAMA3},
    },
    "llama, a head each, bfloat16": {
        "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 384, "dtype": "bfloat16",
    },
    "qwen2, tied": {
        "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 301,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2, untied, two shards": {
        "model_type": "qwen2", "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 97, "shards": True,
    },
}  # fmt: skip
"""What is special about each, and its settings."""


def make_language(folder: Path, *, shards: bool = False, dtype: str = "float32", **settings: Any) -> Path:
    """A language model's folder, every parameter random (norms and biases too)."""
    config = transformers.AutoConfig.for_model(**{**_SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomise(model)
    size = sum(p.nbytes for p in model.parameters())
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=size // 2 if shards else "5GB")
    return folder


def make_tower(folder: Path, kind: str = "siglip", width: int = 40, **settings: Any) -> Path:
    """A vision tower's folder: 4 layers on 28x28 pixels in patches of 7."""
    config_class = {"siglip": transformers.SiglipVisionConfig, "clip": transformers.CLIPVisionConfig}[kind]
    model_class = {"siglip": transformers.SiglipVisionModel, "clip": transformers.CLIPVisionModel}[kind]
    sizes = {"image_size": 28, "patch_size": 7, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56}
    model = model_class(config_class(hidden_size=width, **sizes | settings))
    _randomise(model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(centre + torch.randn(parameter.shape, generator=generator) * 0.1)
