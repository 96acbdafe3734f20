"""A himix model in, a Hugging Face folder out that transformers loads without this package.

Flows in: whole weights by the authors' names (`conversion/authors_layout.py`), the tower's under `vision_tower.`, and the run's
settings; out: safetensors shards with an index, settings, tokenizer, chat template, and `modeling_himix.py`, which runs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import Config, VisionConfig
from ...config.families import FAMILIES
from ...model.towers import tower_settings
from ..huggingface import language_settings, rope_scaling
from ..safetensors_io import write_folder
from .tokenizer import write_tokenizer

CODE = "modeling_himix"
"""The module that is shipped in the folder."""
EXPORTED_TOWERS = ("siglip", "clip", "tiny")
"""The towers that this module computes."""
MAX_NEW_TOKENS = 512
"""Of an answer, where the caller of `generate` says nothing."""

_TOWER_FIELDS = (
    "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "hidden_act", "layer_norm_eps", "attention_dropout", "num_channels",
)  # fmt: skip
"""What of a SigLIP or CLIP tower's settings its layers need."""


def export(weights: Mapping[str, Tensor], config: Config, out: Path, tokenizer: Path | None = None) -> None:
    """Write the folder; it appears when it is whole.

    Args:
        weights: by the authors' names, without `lm_head.weight` where embeddings are tied; `vision_tower.*`: the tower's.
            Each is asked for when it is written.
        tokenizer: a Hugging Face tokenizer folder; None: the run's own, `config.data.tokenizer`.
    Raises: ValueError if the folder exists, the tokenizer lacks what the template needs, or the model computes what the shipped
    code does not.
    """
    _check(config)
    writing = out.with_name(f"{out.name}.writing")
    for path in (out, writing):
        if path.exists():
            raise ValueError(f"{path} exists: name a folder that does not")
    writing.mkdir(parents=True)
    try:
        tokens, control = write_tokenizer(
            str(tokenizer or config.data.tokenizer),
            config.data.template,
            writing,
            with_places=config.injection.needs_places,
        )
        write_folder(writing, weights)
        dtype = str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch.")
        _write(writing / "config.json", _settings(config, dtype) | tokens)
        _write(writing / "generation_config.json", {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, **tokens})
        _write(writing / "preprocessor_config.json", _image_processor(config.vision))
        processor = {"auto_map": {"AutoProcessor": f"{CODE}.HiMixProcessor"}, "processor_class": "HiMixProcessor"}
        places = {"needs_places": True} if config.injection.needs_places else {}
        _write(writing / "processor_config.json", processor | {"control_tokens": control} | places)
        shutil.copyfile(Path(__file__).with_name(f"{CODE}.py"), writing / f"{CODE}.py")
        writing.rename(out)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _check(config: Config) -> None:
    """Raises: ValueError naming what the shipped code does not compute."""
    injection = config.injection
    if FAMILIES[config.model.family].layer is not None or config.vision.tower not in EXPORTED_TOWERS:
        raise ValueError(
            f"{CODE}.py does not compute a {config.model.family} model with a {config.vision.tower} tower: no export"
        )
    if injection.fusion != "joint":
        why = "these weights are LLaVA's" if injection.in_sequence else f"{CODE}.py computes one softmax over vision and text"
        raise ValueError(f"injection.fusion is {injection.fusion}: {why}, so there is no export")
    if len(config.vision.levels) > 1:
        raise ValueError(
            f"vision.feature_layers names {len(config.vision.levels)} hidden states: {CODE}.py takes one, no export"
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _settings(config: Config, dtype: str) -> dict[str, Any]:
    """config.json, but for the special tokens' ids."""
    model = config.model
    return {
        "architectures": ["HiMixForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{CODE}.HiMixConfig",
            "AutoModelForImageTextToText": f"{CODE}.HiMixForConditionalGeneration",
            "AutoProcessor": f"{CODE}.HiMixProcessor",
        },
        "model_type": "himix",
        "dtype": dtype,
        **language_settings(model),
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta} | (rope_scaling(model) or {}),
        "max_position_embeddings": config.data.max_text_tokens,
        "attention_bias": model.has_qkv_bias,
        "text_only_vision": model.text_only_vision,
        "injection": _injection(config),
        "vision_config": _tower(config.vision),
    }


def _injection(config: Config) -> dict[str, Any]:
    """How vision enters, in the terms of the shipped code."""
    names = ("adapter", "keys_values", "norm", "position", "visibility", "reduce")
    layers = config.injection.injecting_layers(config.model.num_layers)
    everywhere = len(layers) == config.model.num_layers
    return {"layers": None if everywhere else layers} | {name: getattr(config.injection, name) for name in names}


def _tower(vision: VisionConfig) -> dict[str, Any]:
    """Kind, feature layer, and sizes under transformers' names."""
    settings = tower_settings(vision)
    return {"tower": vision.tower, "feature_layer": vision.levels[0]} | {
        name: settings[name] for name in _TOWER_FIELDS if name in settings
    }


def _image_processor(vision: VisionConfig) -> dict[str, Any]:
    return {
        "auto_map": {"AutoImageProcessor": f"{CODE}.HiMixImageProcessor", "AutoProcessor": f"{CODE}.HiMixProcessor"},
        "image_processor_type": "HiMixImageProcessor",
        "processor_class": "HiMixProcessor",
        "image_size": vision.image_size,
        "resize": vision.resize,
        "interpolation": vision.interpolation,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
