# SPDX-License-Identifier: Apache-2.0
"""HiMix for transformers: configuration, model, image processor and processor, in one file that stands alone.

Mixture Attention (HiMix, arXiv 2501.10318): in every decoder layer the text attends to `[vision keys; text keys]`. Vision keys
and values come from the tower's features through the layer's own norm and projections, carry no position, and are computed once
per image: the cache holds them with the text's. No image token is in the text; `<image>` marks are removed.

The entry `injection` of config.json changes this for methods of the same kind: fewer layers, an MLP from the features to the
text's width, the text's own norm and projections, rotary angles of vision keys, images that only later text sees. Where it
matters at which place of the text an image stood, its mark says so: `image_places`.

    model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)
    inputs = processor(conversation=[{"role": "user", "content": "What is this?"}], images=[image])
    print(processor.answers(model.generate(**inputs), inputs))

Shape letters: B samples, S text tokens given, T text tokens so far, I images of a sample (padded), n tokens of an image,
N = I * n, V width of the features, X what layers take of them, Q query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import secrets
import struct
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image, ImageOps
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

HIMIX = {
    "layers": None, "adapter": "none", "keys_values": "own", "norm": "own", "position": "none", "visibility": "all",
    "reduce": "none",
}  # fmt: skip
"""How vision enters, where config.json does not say. layers: decoder layers that inject, from 0; None: all."""
NUM_IMAGE_POSITIONS = 64
"""Learned positions of an image's number in its sample; later images share the last one."""


class HiMixConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's settings for the decoder, and the tower's. `attention_bias` is of q, k and v, not of the output."""

    model_type = "himix"
    base_model_tp_plan = None
    base_model_pp_plan = None

    def __init__(self, vision_config: Any = None, text_only_vision: str = "none", injection: Any = None, **kwargs: Any):
        """Args: vision_config: kind (`tower`: siglip, clip or tiny), sizes and `feature_layer`; text_only_vision: what a sample
        without an image attends to, `zero_image` (the features of an all-zero image) or `none`; injection: as HIMIX."""
        self.vision_config = dict(vision_config or {})
        self.text_only_vision = text_only_vision
        self.injection = {**HIMIX, **(injection or {})}
        super().__init__(**kwargs)

    @property
    def injecting_layers(self) -> list[int]:
        """The decoder layers that take up vision."""
        layers = self.injection["layers"]
        return list(range(self.num_hidden_layers)) if layers is None else list(layers)

    @property
    def feature_width(self) -> int:
        """Channels of a vision token in front of an adapter."""
        return int(self.vision_config["hidden_size"]) * (4 if self.injection["reduce"] == "merge" else 1)

    @property
    def vision_width(self) -> int:
        """Channels of what a layer's vision norm and projections take."""
        return self.feature_width if self.injection["adapter"] == "none" else int(self.hidden_size)

    @property
    def side(self) -> int:
        """Vision tokens of an image in a row and in a column, as the tower gives them."""
        return int(self.vision_config["image_size"] // self.vision_config["patch_size"])

    @property
    def reduced_side(self) -> int:
        """The same after `reduce`."""
        return self.side if self.injection["reduce"] == "none" else -(-self.side // 2)

    def validate_architecture(self) -> None:
        """Llama wants hidden_size to divide by the heads; with a head_dim of its own it need not."""


# ---- towers ---------------------------------------------------------------------------------------------------------


def _num_layers_run(vision: Mapping[str, Any]) -> int:
    """Layers whose output `feature_layer` needs: all for -1, one less for -2."""
    return int(vision["num_hidden_layers"]) + 1 + int(vision["feature_layer"])


class HiMixTransformersTower(nn.Module):
    """SigLIP or CLIP up to the chosen hidden state, patch tokens only: float[K, 3, H, W] to float[K, n, V]."""

    def __init__(self, config: HiMixConfig):
        super().__init__()
        vision = {name: value for name, value in config.vision_config.items() if name not in ("tower", "feature_layer")}
        is_clip = config.vision_config["tower"] == "clip"
        settings = (CLIPVisionConfig if is_clip else SiglipVisionConfig)(**vision)
        settings._attn_implementation = config._attn_implementation
        model = (CLIPVisionModel if is_clip else SiglipVisionModel)(settings)
        model = getattr(model, "vision_model", model)
        self.embeddings = model.embeddings
        self.pre_norm = getattr(model, "pre_layrnorm", nn.Identity())
        self.layers = nn.ModuleList(list(model.encoder.layers)[: _num_layers_run(config.vision_config)])
        self.num_class_tokens = int(is_clip)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pre_norm(self.embeddings(images.to(self.embeddings.patch_embedding.weight.dtype)))
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        features: Tensor = hidden[:, self.num_class_tokens :]
        return features


class HiMixTinyTower(nn.Module):
    """A small pre-norm ViT without class token: float[K, 3, H, W] to float[K, n, V]."""

    def __init__(self, config: HiMixConfig):
        super().__init__()
        vision = config.vision_config
        width, side = vision["hidden_size"], vision["image_size"] // vision["patch_size"]
        self.patch = nn.Conv2d(3, width, kernel_size=vision["patch_size"], stride=vision["patch_size"])
        self.position = nn.Parameter(torch.zeros(1, side * side, width))
        self.layers = nn.ModuleList(HiMixTinyTowerLayer(vision) for _ in range(_num_layers_run(vision)))
        self.final_norm = nn.LayerNorm(width) if vision["feature_layer"] == -1 else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patch(images.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        features: Tensor = self.final_norm(hidden)
        return features


class HiMixTinyTowerLayer(nn.Module):
    def __init__(self, vision: Mapping[str, Any]):
        super().__init__()
        width = vision["hidden_size"]
        self.num_heads = vision["num_attention_heads"]
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, vision["intermediate_size"])
        self.down = nn.Linear(vision["intermediate_size"], width)

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.num_heads, -1))
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(mixed)
        hidden = hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return hidden


# ---- cache ----------------------------------------------------------------------------------------------------------


class VisionLayer(DynamicLayer):  # type: ignore[misc]
    """One decoder layer's vision keys and values in a cache: written once, the same for all steps."""

    places: Tensor | None = None
    """`Vision.places`."""

    def hold(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.places = keys, values, places

    def crop(self, *_: Any) -> None:
        """Forgetting text, as assisted generation does, forgets no image."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._pick(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.places is not None:
            self.places = self.places.repeat_interleave(repeats, dim=0)

    def _pick(self, rows: Tensor) -> None:
        if self.places is not None:
            self.places = self.places[rows.to(self.places.device)]


def vision_layers(cache: Cache, config: HiMixConfig) -> list[VisionLayer]:
    """A cache's layers behind the text's, added at first use. Raises: ValueError for a cache of fixed size."""
    num_layers, num_injecting = config.num_hidden_layers, len(config.injecting_layers)
    if len(cache.layers) < num_layers + num_injecting:
        if getattr(cache, "is_compileable", False):
            raise ValueError("HiMix needs a cache that grows: leave cache_implementation out, or use 'dynamic' or 'offloaded'")
        while len(cache.layers) < num_layers:  # a DynamicCache made without a config adds its layers as they come
            cache.layers.append(cache.layer_class_to_replicate())
        cache.layers.extend(VisionLayer() for _ in range(num_injecting))
    return list(cache.layers[num_layers:])


# ---- decoder --------------------------------------------------------------------------------------------------------


@dataclass
class Vision:
    """What the text of a batch sees."""

    features: Tensor
    """float[B, N, X]."""
    places: Tensor
    """int64[B, N]: text tokens before the image that each vision token is of; -1 where a sample has fewer images."""


class HiMixAdapter(nn.Module):
    """Linear, GELU, linear: from the features to the text's width."""

    def __init__(self, config: HiMixConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.feature_width, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        adapted: Tensor = self.linear_2(F.gelu(self.linear_1(features)))
        return adapted


class HiMixAttention(nn.Module):
    """Text queries over vision and text keys."""

    is_causal = False  # the mask says it

    def __init__(self, config: HiMixConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, vision_width, bias = config.hidden_size, config.vision_width, config.attention_bias
        query_width, key_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, key_width, bias=bias)
        self.v_proj = nn.Linear(width, key_width, bias=bias)
        self.has_own = config.injection["keys_values"] == "own" and layer_idx in config.injecting_layers
        if self.has_own:
            self.k_proj_img = nn.Linear(vision_width, key_width, bias=bias)
            self.v_proj_img = nn.Linear(vision_width, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=False)

    def project_vision(self, normed_BNX: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Vision keys and values, each float[B, G, N, D]; the keys are turned by the angles, if there are any."""
        projections = (self.k_proj_img, self.v_proj_img) if self.has_own else (self.k_proj, self.v_proj)
        key, value = (self._heads(proj(normed_BNX)) for proj in projections)
        return key if angles is None else apply_rotary_pos_emb(key, key, *angles)[1], value

    def forward(
        self,
        normed_BSH: Tensor,
        vision_key_value: tuple[Tensor, Tensor] | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's update of the text, and the weights float[B, Q, S, N + T] where the implementation gives them."""
        query, key, value = (self._heads(proj(normed_BSH)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if vision_key_value is not None:
            vision_key, vision_value = vision_key_value
            key, value = torch.cat((vision_key, key), dim=2), torch.cat((vision_value, value), dim=2)
        kind = self.config._attn_implementation
        attend = eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        mixed, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask[..., -key.shape[2] :],  # without vision where the layer takes up none
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(mixed.flatten(2)), weights

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], states.shape[2] // self.head_dim, self.head_dim).transpose(1, 2)


class HiMixDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """norm, Mixture Attention, add; norm, MLP, add."""

    def __init__(self, config: HiMixConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HiMixAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.injects, self.norm_of_vision = layer_idx in config.injecting_layers, config.injection["norm"]
        if self.injects and self.norm_of_vision == "own":
            self.input_layernorm_img = LlamaRMSNorm(config.vision_width, eps=config.rms_norm_eps)
        has_adapter = self.injects and config.injection["adapter"] == "per_layer"
        self.vision_adapter = HiMixAdapter(config) if has_adapter else None
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def project_vision(self, features_BNX: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """This layer's vision keys and values, each float[B, G, N, D]."""
        if self.vision_adapter is not None:
            features_BNX = self.vision_adapter(features_BNX)
        if self.norm_of_vision != "none":
            norm = self.input_layernorm_img if self.norm_of_vision == "own" else self.input_layernorm
            features_BNX = norm(features_BNX)
        return self.self_attn.project_vision(features_BNX, angles)

    def forward(
        self,
        hidden_BSH: Tensor,
        features_BNX: Tensor | None,
        vision_key_value: tuple[Tensor, Tensor] | None,
        vision_angles: tuple[Tensor, Tensor] | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Text states and attention weights; the features are given, or what `project_vision` made of them; to a layer that
        takes up no vision, neither."""
        if features_BNX is not None and vision_key_value is None:
            vision_key_value = self.project_vision(features_BNX, vision_angles)
        update, weights = self.self_attn(self.input_layernorm(hidden_BSH), vision_key_value, **kwargs)
        hidden_BSH = hidden_BSH + update
        return hidden_BSH + self.mlp(self.post_attention_layernorm(hidden_BSH)), weights


class HiMixModel(nn.Module):
    """Embedding, what vision goes through in front of the layers, layers, final norm."""

    def __init__(self, config: HiMixConfig):
        super().__init__()
        self.reduce, self.position = config.injection["reduce"], config.injection["position"]
        self.vision_adapter = HiMixAdapter(config) if config.injection["adapter"] == "shared" else None
        if self.position == "learned":
            side, width = config.reduced_side, config.feature_width
            self.vision_row_positions = nn.Parameter(torch.zeros(side, width))
            self.vision_column_positions = nn.Parameter(torch.zeros(side, width))
            self.vision_image_positions = nn.Parameter(torch.zeros(NUM_IMAGE_POSITIONS, width))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(HiMixDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)

    def adapt(self, features_BInV: Tensor) -> Tensor:
        """The tower's features to what all layers share of them, float[B, N, X]."""
        if self.reduce != "none":
            features_BInV = reduce_tokens(features_BInV, self.reduce)
        if self.position == "learned":
            numbers = torch.arange(features_BInV.shape[1], device=features_BInV.device).clamp(max=NUM_IMAGE_POSITIONS - 1)
            within = (self.vision_row_positions[:, None] + self.vision_column_positions).flatten(0, 1)
            features_BInV = features_BInV + (within + self.vision_image_positions[numbers, None])
        if self.vision_adapter is not None:
            features_BInV = self.vision_adapter(features_BInV)
        return features_BInV.flatten(1, 2)

    def _vision_angles(self, vision: Vision | None, hidden_BSH: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of the vision keys: as if they stood in the text, or all of an image at its place; None: they are not turned."""
        if vision is None or self.position not in ("rotary", "rotary_image"):
            return None
        positions = vision.places
        if self.position == "rotary":
            positions = positions + torch.arange(positions.shape[1], device=positions.device)
        angles: tuple[Tensor, Tensor] = self.rotary_emb(hidden_BSH, position_ids=positions.clamp(min=0))
        return angles

    def forward(
        self,
        hidden_BSH: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        vision: Vision | None,
        cached: list[VisionLayer] | None,
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Normed text states, the states before each layer and after the norm, and each layer's attention weights."""
        position_embeddings = self.rotary_emb(hidden_BSH, position_ids=position_ids)
        vision_angles = self._vision_angles(vision, hidden_BSH)
        states, weights, holders = [], [], iter(cached or ())
        layer: Any
        for layer in self.layers:
            states.append(hidden_BSH)
            seen = None
            if cached is not None and layer.injects:
                held: VisionLayer = next(holders)
                if vision is not None:
                    keys, values = layer.project_vision(vision.features, vision_angles)
                    held.hold(keys, values, vision.places)
                seen = (held.keys, held.values)
            hidden_BSH, layer_weights = layer(
                hidden_BSH,
                None if vision is None or not layer.injects else vision.features,
                seen,
                vision_angles,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
            weights.append(layer_weights)
        hidden_BSH = self.norm(hidden_BSH)
        return hidden_BSH, [*states, hidden_BSH], weights


def reduce_tokens(features_BInV: Tensor, way: str) -> Tensor:
    """Each 2x2 neighbouring tokens as one: `merge` puts them side by side in the channels, `pool` takes their mean."""
    leading, width, side = features_BInV.shape[:2], features_BInV.shape[3], math.isqrt(features_BInV.shape[2])
    up = -(-side // 2)
    padding = (0, 2 * up - side, 0, 2 * up - side)
    grid = F.pad(features_BInV.reshape(*leading, side, side, width), (0, 0, *padding))
    squares = grid.view(*leading, up, 2, up, 2, width).transpose(3, 4).flatten(2, 3)  # [B, I, n, 2, 2, V]
    if way == "merge":
        return squares.flatten(3)
    real = F.pad(features_BInV.new_ones(side, side), padding).view(up, 2, up, 2).sum((1, 3))
    pooled: Tensor = squares.sum((3, 4)) / real.view(-1, 1)
    return pooled


def seen_vision(places_BN: Tensor, numbers_BS: Tensor, visibility: str) -> Tensor:
    """bool[B, S, N]: what of the vision text tokens of these numbers in their texts see: all; what stands before them; or of
    that the latest image, with those at the same place."""
    places_B1N, numbers_BS1 = places_BN[:, None], numbers_BS[..., None]
    if visibility == "all":
        return (places_B1N >= 0).expand(-1, numbers_BS.shape[1], -1)
    seen_BSN = (places_B1N >= 0) & (places_B1N <= numbers_BS1)
    if visibility == "earlier" or not places_BN.shape[1]:
        return seen_BSN
    return seen_BSN & (places_B1N == places_B1N.where(seen_BSN, -1).amax(-1, keepdim=True))


def mixture_mask(vision_BSN: Tensor, text_mask_BT: Tensor | None, num_text: int, dtype: torch.dtype) -> Tensor:
    """What the last S of `num_text` text tokens see, to be added to the scores: float[B, 1, S, N + T].

    `vision_BSN` of the sample's images, and its text up to the token itself. A padding token's row, which may see nothing, is
    finite.
    """
    num_samples, num_new = vision_BSN.shape[:2]
    positions = torch.arange(num_text, device=vision_BSN.device)
    text_BST = (positions <= positions[num_text - num_new :, None]).expand(num_samples, -1, -1)
    if text_mask_BT is not None:
        text_BST = text_BST & text_mask_BT[:, None, :].bool()
    seen = torch.cat((vision_BSN, text_BST), dim=-1)
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
    return hidden[:, None]


class HiMixForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Tower, decoder and head."""

    config: HiMixConfig
    config_class = HiMixConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["HiMixDecoderLayer", "HiMixTinyTower", "HiMixTransformersTower"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HiMixConfig):
        super().__init__(config)
        tower = HiMixTinyTower if config.vision_config["tower"] == "tiny" else HiMixTransformersTower
        self.vision_tower = tower(config)
        self.model = HiMixModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HiMixTinyTower):
            init.normal_(module.position, std=0.5)
        elif isinstance(getattr(module, "position_ids", None), Tensor):  # of the tower's embeddings; no file holds them
            numbers: Tensor = module.position_ids  # type: ignore[assignment]
            init.copy_(numbers, torch.arange(numbers.shape[-1]).expand(1, -1))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """float[K, 3, H, W], normalised, to float[K, n, V]; at most 64 images at once bound the memory."""
        return torch.cat([self.vision_tower(part) for part in torch.split(pixel_values, 64)])

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_images: Tensor | None = None,
        image_features: Tensor | None = None,
        image_places: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits float[B, S, vocab].

        Args:
            input_ids: int64[B, S], the new tokens.
            attention_mask: [B, T], 0 for padding on either side, T counting the tokens in the cache.
            position_ids: the number of each token in its text; what vision adds to it is added here.
            pixel_values: float[B, I, 3, H, W] as the processor gives them; not looked at once a cache holds the images.
            num_images: int64[B], how many of the I are a sample's own; None: all.
            image_features: float[B, I, n, V], the tower's output, in the place of pixel_values.
            image_places: int64[B, I], how many of its text's tokens come before each image, padding not counted; None: all
                images stand before the text. Only models that ask where an image stands look at it.
            labels: int64[B, S] as input_ids, -100 for no loss.
        Raises: ValueError for shapes or numbers that do not fit each other, or the images that a cache holds.
        """
        images = pixel_values if image_features is None else image_features
        self._check_text(input_ids, inputs_embeds)
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        num_samples, num_new = hidden.shape[:2]
        self._check_images(num_samples, pixel_values, image_features, num_images, image_places)
        _check_shape("labels", labels, num_samples, num_new)
        _check_shape("position_ids", position_ids, "samples", num_new)
        cached = None if past_key_values is None else vision_layers(past_key_values, self.config)
        num_tokens = self._tokens_per_image(image_features)
        if cached is not None and cached[0].places is not None:
            vision, places = None, cached[0].places
            self._check_same_images(places, images, num_images, num_tokens)
        else:
            counts = self._counts(num_samples, images, num_images)
            vision = self._see(counts, num_tokens, pixel_values, image_features, image_places)
            places = vision.places
        num_text = num_new + (0 if past_key_values is None else past_key_values.get_seq_length())
        _check_shape("attention_mask", attention_mask, num_samples, num_text)
        everything = torch.ones(1, num_text, device=hidden.device) if attention_mask is None else attention_mask
        numbers = (everything.long().cumsum(-1) - 1).clamp(min=0)[:, num_text - num_new :]
        position_ids = numbers if position_ids is None else position_ids
        if self.config.injection["position"] == "rotary":
            position_ids = position_ids + seen_vision(places, numbers, "earlier").sum(-1)
        seen = seen_vision(places, numbers, self.config.injection["visibility"])
        mask = mixture_mask(seen, attention_mask, num_text, hidden.dtype)
        hidden, states, weights = self.model(
            hidden, position_ids, mask, vision, cached, past_key_values=past_key_values, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        return CausalLMOutputWithPast(
            # Trainer's num_items_in_batch is among kwargs: what the loss is divided by under gradient accumulation.
            loss=None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs),
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )

    def _check_text(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if input_ids is None and inputs_embeds is None:
            raise ValueError("input_ids are missing: wanted int64[samples, tokens]")
        _check_shape("input_ids", input_ids, "samples", "tokens")
        _check_shape("inputs_embeds", inputs_embeds, "samples", "tokens", self.config.hidden_size)
        if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids are {input_ids.dtype}: wanted whole numbers of 32 or 64 bits")

    def _check_images(
        self, num_samples: int, pixels: Tensor | None, features: Tensor | None, counts: Tensor | None, places: Tensor | None
    ) -> None:
        sizes, images = self.config.vision_config, pixels if features is None else features
        _check_shape("pixel_values", pixels, num_samples, "images", 3, *[sizes["image_size"]] * 2)
        _check_shape("image_features", features, num_samples, "images", "tokens", sizes["hidden_size"])
        _check_shape("num_images", counts, num_samples)
        if pixels is not None and not pixels.is_floating_point():
            raise ValueError(f"pixel_values are {pixels.dtype}: wanted floats, as the processor normalises them")
        _check_shape("image_places", places, num_samples, "images" if images is None else images.shape[1])
        if places is not None and (places.dtype not in (torch.int64, torch.int32) or (places < 0).any()):
            raise ValueError(f"image_places is {places.tolist()}: wanted whole numbers from 0 on")

    def _counts(self, num_samples: int, images: Tensor | None, num_images: Tensor | None) -> list[int]:
        """Images of each sample, the blank one of `zero_image` counted. Raises: ValueError for more than are given."""
        given = 0 if images is None else images.shape[1]
        counts = [given] * num_samples if num_images is None else [int(count) for count in num_images]
        if not all(0 <= count <= given for count in counts):
            raise ValueError(f"num_images is {counts}: wanted 0 to {given}, the images given for each sample")
        return [max(count, int(self.config.text_only_vision == "zero_image")) for count in counts]

    def _tokens_per_image(self, image_features: Tensor | None) -> int:
        """After `reduce`. Raises: ValueError for features of another number than the tower's where their grid matters."""
        has_grid = self.config.injection["reduce"] != "none" or self.config.injection["position"] == "learned"
        if has_grid:
            _check_shape("image_features", image_features, "samples", "images", self.config.side**2, "channels")
        return self.config.reduced_side**2 if image_features is None or has_grid else image_features.shape[2]

    def _see(
        self, counts: list[int], num_tokens: int, pixels: Tensor | None, given: Tensor | None, image_places: Tensor | None
    ) -> Vision:
        """Encode each image once, if its features are not given, and lay out by sample what layers take of it."""
        weight, most = next(self.vision_tower.parameters()), max(counts)
        real = (torch.arange(most)[None, :] < torch.tensor(counts)[:, None]).to(weight.device)
        if given is not None:
            features = given.to(weight.device, weight.dtype)
            features = F.pad(features, (0, 0, 0, 0, 0, most - features.shape[1]))
        else:
            features = weight.new_zeros(len(counts), most, self.config.side**2, self.config.vision_config["hidden_size"])
            if most:
                side = self.config.vision_config["image_size"]
                pixels = weight.new_zeros(len(counts), 0, 3, side, side) if pixels is None else pixels
                # A blank image is all zeros, as the slots of samples with fewer images are.
                pixels = F.pad(pixels.to(weight.device), (0, 0, 0, 0, 0, 0, 0, most - pixels.shape[1]))
                features = features.index_put((real,), self.get_image_features(pixels[real]))
        places = torch.zeros(len(counts), most, dtype=torch.int64, device=weight.device)
        if image_places is not None:
            places = F.pad(image_places.to(weight.device).long(), (0, most - image_places.shape[1]))
        return Vision(self.model.adapt(features), places.where(real, -1).repeat_interleave(num_tokens, dim=1))

    def _check_same_images(self, places_BN: Tensor, images: Tensor | None, num_images: Tensor | None, num_tokens: int) -> None:
        if images is None or (num_images is not None and not num_images.any()):  # a text alone adds to what is cached
            return
        held = ((places_BN >= 0).sum(1) // num_tokens).tolist()
        counts = self._counts(places_BN.shape[0], images, num_images)
        if held != counts:
            raise ValueError(f"past_key_values hold {held} images, and {counts} are given: new images need a new cache")


def _check_shape(name: str, tensor: Tensor | None, *wanted: int | str) -> None:
    """Raises: ValueError for no tensor, or another shape than these sizes; a name is any size."""
    if not isinstance(tensor, Tensor | None):
        raise ValueError(f"{name} is no tensor: wanted one of [{', '.join(map(str, wanted))}]")
    sizes = wanted if tensor is None else tuple(tensor.shape)
    if len(sizes) != len(wanted) or any(w not in (s, str(w)) for s, w in zip(sizes, wanted, strict=True)):
        raise ValueError(f"{name} is {list(sizes)}: wanted [{', '.join(map(str, wanted))}]")


# ---- processing -----------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # what training reads; for some others Pillow starts programs
MAX_PIXELS = 50_000_000
MAX_FILE_BYTES = 128 << 20
_MARK = re.compile(r"<image>\n|\n<image>|<image>")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_BAD_EXIF = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, struct.error)
_PILLOW_ERRORS = (*_BAD_EXIF, zlib.error, Image.DecompressionBombError)


class HiMixImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Pictures to the tower's input, exactly as in training: upright, on white, Pillow's resize, (x / 255 - mean) / std."""

    model_input_names = ["pixel_values", "num_images"]  # noqa: RUF012

    def __init__(
        self,
        image_size: int = 224,
        resize: str = "square",
        interpolation: str = "bicubic",
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        """Args: resize: `square` scales both sides to image_size; `crop` scales the shorter one and cuts the centre."""
        super().__init__(**kwargs)
        self.image_size, self.resize, self.interpolation = image_size, resize, interpolation
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, return_tensors: str = "pt", **_: Any) -> BatchFeature:
        """pixel_values float32[B, I, 3, H, W], zeros where a sample has fewer than I images, and num_images int64[B].

        I is at least 1, so that samples with and without images make one batch.
        Args: images: per sample a list; or one list, an image for each sample. Each a PIL image, a path, encoded bytes, or an
        array uint8[height, width, 3].
        Raises: ValueError for what is no image that training would take.
        """
        if not isinstance(images, list | tuple):
            images = [images]
        rows = [list(row) if isinstance(row, list | tuple) else [row] for row in images]
        side, most = self.image_size, max([1, *map(len, rows)])
        pixels = torch.zeros(len(rows), most, 3, side, side)
        mean, std = torch.tensor([self.image_mean, self.image_std], dtype=torch.float32).view(2, 3, 1, 1)
        for sample, row in enumerate(rows):
            for slot, image in enumerate(row):
                pixels[sample, slot] = (torch.from_numpy(self.pixels(image)).float() / 255 - mean) / std
        counts = torch.tensor([len(row) for row in rows])
        return BatchFeature({"pixel_values": pixels, "num_images": counts}, tensor_type=return_tensors)

    def pixels(self, image: Any) -> np.ndarray:
        """One picture as uint8[3, H, W]. Raises: ValueError."""
        rgb = _decoded(image)
        size, resample = self.image_size, _FILTERS[self.interpolation]
        if self.resize == "square":
            scaled = rgb.resize((size, size), resample)
        else:
            short, long = sorted(rgb.size)
            scaled_long = int(size * long / short)
            if size * scaled_long > MAX_PIXELS:
                raise ValueError(f"an image of {rgb.width}x{rgb.height} has more than {MAX_PIXELS} pixels once it is scaled")
            width, height = (size, scaled_long) if rgb.width <= rgb.height else (scaled_long, size)
            left, top = (width - size) // 2, (height - size) // 2
            scaled = rgb.resize((width, height), resample).crop((left, top, left + size, top + size))
        return np.ascontiguousarray(np.asarray(scaled).transpose(2, 0, 1))


def _decoded(image: Any) -> Image.Image:
    """Upright RGB; nothing is fetched. Raises: ValueError for whatever is no picture that training would take."""
    if isinstance(image, str) and ("://" in image or image.startswith("data:")):
        raise ValueError(f"{image[:80]!r} is a URL, and none is opened: fetch it, and give a PIL image or bytes")
    if isinstance(image, str | Path):
        if not os.path.isfile(image) or os.path.getsize(image) > MAX_FILE_BYTES:
            raise ValueError(f"{str(image)[:200]!r} is no regular file of at most {MAX_FILE_BYTES} bytes")
        image = Path(image).read_bytes()
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image), formats=FORMATS)
        elif not isinstance(image, Image.Image):
            image = np.asarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"{image.dtype}{list(image.shape)} is neither a PIL image nor uint8[height, width, 3]")
            image = Image.fromarray(image)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels")
        return _to_rgb(image)
    except _PILLOW_ERRORS as error:
        what = " ".join(str(error).split()).split(" <")[0][:200] or type(error).__name__  # behind it stands a memory address
        wanted = f"wanted {', '.join(FORMATS)} of at most {MAX_PIXELS} pixels"
        raise ValueError(f"an image cannot be read: {what} ({wanted})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: transparency on white, 16-bit greys scaled instead of clipped."""
    try:
        upright = ImageOps.exif_transpose(image)
    except _BAD_EXIF:
        upright = image
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    return upright.convert("RGB")


class HiMixProcessor(ProcessorMixin):  # type: ignore[misc]
    """Conversations and pictures to the model's input, and generated ids to answers."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, control_tokens: Any = (),
        needs_places: bool = False, **_: Any,
    ):  # fmt: skip
        """Args: control_tokens: those that the chat template writes; without any, all that the tokenizer has. needs_places:
        whether the model takes `image_places`."""
        self.control_tokens, self.needs_places = list(control_tokens), needs_places
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, conversation: Any = None, return_tensors: str = "pt", **options: Any
    ) -> BatchFeature:
        """input_ids and attention_mask int64[B, T], padded on the left, pixel_values and num_images, and image_places where
        the model takes them.

        Args:
            images: an image, a list with all images of the one sample or with one image for each sample, or a list per sample.
            text: a prompt or a list of them, spelled by the chat template; `<image>` marks are removed. Images of a text
                without any mark stand before it.
            conversation: in the place of `text`: messages {"role": ..., "content": ...}, or a list of such conversations.
                Images may be in the messages, but not their paths or URLs; those of a conversation that shows no place for
                them stand before its first question.
            options: a tokenizer's `padding`, `padding_side`, `max_length` and `pad_to_multiple_of`. Prompts are not truncated.
        Raises: ValueError where images cannot be told apart between samples, or are fewer or more than `<image>` marks.
        """
        if (text is None) == (conversation is None):
            raise ValueError("give either text (a prompt that the chat template spelled) or conversation (messages)")
        padding = {name: options.pop(name, usual) for name, usual in _PADDING.items()}
        if unknown := [name for name, value in options.items() if value is not None and value is not False]:
            raise ValueError(f"{', '.join(unknown)}: HiMix's processor has no such arguments")
        if conversation is not None:
            text = self.apply_chat_template(conversation, add_generation_prompt=True, images=images)
        prompts, talks = ([text], [conversation]) if isinstance(text, str) else (text, conversation)
        if not prompts or not isinstance(prompts, list | tuple) or not all(map(_is_text, prompts)):
            raise ValueError("text holds something else than prompts: wanted a text or a list of texts")
        said = talks if conversation is not None else [[{"content": prompt}] for prompt in prompts]
        seen = _images_of(said, images)
        pixels = self.image_processor(seen, return_tensors=return_tensors)
        all_ids, all_places = zip(*map(self._encode, prompts), strict=True)
        padded = self.tokenizer.pad({"input_ids": list(all_ids)}, return_tensors=return_tensors, **padding)
        found = BatchFeature({name: padded[name] for name in ("input_ids", "attention_mask")} | pixels)
        if not self.needs_places:
            return found
        for places, own in zip(all_places, seen, strict=True):
            if len(places) not in (0, len(own)):
                raise ValueError(f"{len(places)} <image> marks for {len(own)} images: wanted one for each, or none")
        most = max([1, *map(len, seen)])
        rows = [[*places, *[0] * (most - len(places))] for places in all_places]
        return BatchFeature(found | BatchFeature({"image_places": rows}, tensor_type=return_tensors))

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As of all processors; `images` as in `__call__`. Raises: ValueError for other messages than of texts and images, or
        images as there."""
        is_one = not isinstance(conversation, list | tuple) or not isinstance(next(iter(conversation), None), list | tuple)
        conversations = [conversation] if is_one else conversation
        for messages in conversations:
            _parts_of(messages)
        given = (kwargs.get("processor_kwargs") or kwargs).get("images")
        if kwargs.get("tokenize") or (given is not None and self.needs_places):
            seen = _images_of(conversations, given)
            if self.needs_places:
                marked = [_with_marks(*pair) for pair in zip(conversations, map(len, seen), strict=True)]
                conversation = marked[0] if is_one else marked
        if not kwargs.get("tokenize"):
            kwargs.pop("images", None)
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        except TemplateError as error:  # roles that do not take turns, for one
            raise ValueError(f"messages that the chat template does not take: {error}") from None

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt, exactly as in training: control tokens at its start by their names, then the rest as one string
        (a tokenizer may join a space to the first word of a string). Names of control tokens in messages are text."""
        return self._encode(prompt)[0]

    def _encode(self, prompt: str) -> tuple[list[int], list[int]]:
        """The ids, and how many of them come before each image; a token with characters on both sides of one comes after it."""
        rust, aliases, originals = _with_aliases(self.tokenizer, len(self.tokenizer))
        added = self.tokenizer.get_added_vocab()
        names = sorted(self.control_tokens or added, key=len, reverse=True)
        names += [_PLACE] * self.needs_places
        parts = re.split(f"({'|'.join(map(re.escape, names))})", _MARK.sub(_PLACE if self.needs_places else "", prompt))
        ids: list[int] = []
        marks: list[tuple[int, int]] = []
        text = ""
        for number, part in enumerate(parts):
            if number % 2 == 0:
                text += _ESCAPE.sub(lambda found: _ESCAPED[found[0]], part)
            elif part == _PLACE:
                marks.append((len(ids), len(text)))
            elif text:
                text += aliases[added[part]]
            else:
                ids.append(added[part])
        encoding = rust.encode(text, add_special_tokens=False)
        ends = [max(end, begin + 1) for begin, end in encoding.offsets]  # as in training
        places = [len(ids) + bisect_right(ends, offset) if offset else before for before, offset in marks]
        return ids + [originals.get(token, token) for token in encoding.ids], places

    def answers(self, generated: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """What `generate` added to each prompt, as text."""
        new = generated[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


_PADDING = {"padding": True, "padding_side": "left", "max_length": None, "pad_to_multiple_of": None}
_ESCAPED = {"\u2061a": "\u2060", "\u2061b": "\u2061", "\u2060": ""}  # see the ESCAPES of the chat template
_ESCAPE = re.compile("|".join(_ESCAPED))
_PLACE = "\u2061c"
"""What the chat template of a model that needs the images' places leaves of a mark; no message can hold it."""


@functools.lru_cache(maxsize=4)
def _with_aliases(tokenizer: Any, _size: int) -> tuple[Any, dict[int, str], dict[int, int]]:
    """As in training: a tokenizer that takes names of control tokens for text, the aliases that write them, and back."""
    rust: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rust.no_truncation()
    rust.no_padding()
    control = {i: t for i, t in rust.get_added_tokens_decoder().items() if t.special or t.content.startswith("<|")}
    aliases = {i: f"\U000f0000{secrets.token_hex(16)}" for i in control}
    rust.add_special_tokens(list(control.values()))
    rust.encode_special_tokens = True
    rust.add_tokens([AddedToken(aliases[i], normalized=False, lstrip=t.lstrip, rstrip=t.rstrip) for i, t in control.items()])
    return rust, aliases, {rust.token_to_id(alias): i for i, alias in aliases.items()}


def _is_text(value: Any) -> bool:
    """Whether this is text that has bytes: half of a surrogate pair has none."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _parts_of(messages: Any) -> list[Any]:
    """A conversation's texts and images, in order. Raises: ValueError for anything else."""
    parts: list[Any] = []
    for message in messages if isinstance(messages, list | tuple) and messages else [None]:
        content = message.get("content") if isinstance(message, Mapping) else None
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts += content if isinstance(content, list | tuple) and content else [None]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and _is_text(part.get("text"))):
            raise ValueError(f"a message has content of type {kind!r:.40}: wanted a text, or parts of type 'text' and 'image'")
    return parts


def _with_marks(messages: Sequence[Any], num_images: int) -> Sequence[Any]:
    """As in training: a conversation that shows no place for its images has them before its first question."""
    parts = _parts_of(messages)
    if any(part["type"] == "image" or "<image>" in part["text"] for part in parts):
        return messages
    first = {"type": "text", "text": "<image>" * num_images}
    content = messages[0]["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{**messages[0], "content": [first, *content]}, *messages[1:]]


def _images_of(conversations: Sequence[Any], given: Any) -> list[list[Any]]:
    """Each conversation's images, which are in it or given. Raises: ValueError for both, or fewer or more than their places."""
    found = []
    for number, parts in enumerate(map(_parts_of, conversations)):
        places = [part for part in parts if part["type"] == "image"]
        own = [part[key] for part in places for key in ("image", "url", "path", "base64") if part.get(key) is not None]
        if any(isinstance(image, str) for image in own):  # a message may be a stranger's, and its words would open files here
            raise ValueError("a message names an image by a text, which is not opened: give a PIL image or bytes, or images=")
        if own and given is not None:
            raise ValueError("images are both in the messages and in images=: give them in one place")
        found.append(own if given is None else _by_sample(given, conversations)[number])
        num_marks = sum(part["text"].count("<image>") for part in parts if part["type"] == "text")
        for kind, count in (("image parts", len(places)), ("<image> marks", num_marks)):
            if count not in (0, len(found[-1])):
                raise ValueError(f"{count} {kind} for {len(found[-1])} images: wanted one for each, or none")
    return found


def _by_sample(images: Any, prompts: Sequence[Any]) -> list[list[Any]]:
    """Each sample's list of pictures."""
    images = list(images) if isinstance(images, list | tuple) else [images]
    if images and all(isinstance(row, list | tuple) for row in images):
        rows = [list(row) for row in images]
    elif len(prompts) == 1:
        rows = [images]
    else:
        rows = [[image] for image in images]
    if len(rows) != len(prompts):
        raise ValueError(f"{len(rows)} images for {len(prompts)} prompts: give images as a list per prompt")
    return rows
