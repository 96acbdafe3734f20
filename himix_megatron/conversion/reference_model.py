"""HiMix's decoder in plain torch, straight from the paper: what conversions are compared with, and benchmarks.

Flows in: embedded texts padded to the longest of the batch, and vision features; out: hidden states, or logits by weights in
the authors' layout. Shares nothing with the Megatron model but the configuration. As in the authors' code every layer
normalises the features for itself, keys are concatenated, and attention has a dense mask.
Source: HiMix, arXiv 2501.10318; rotary embedding and its Llama 3 scaling as in Llama's model card code.

Shape letters: B samples, S text tokens (padded), N vision tokens of a sample (the same for all), L = N + S keys, H text width,
V vision width, Q query heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..config import ModelConfig
from ..config.families import FAMILIES

_AUTHORS_NAMES = {
    "norm": "input_layernorm",
    "vision_norm": "input_layernorm_img",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "vision_key": "self_attn.k_proj_img",
    "vision_value": "self_attn.v_proj_img",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""A part of PlainLayer -> the authors' name."""


class PlainLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, model: ModelConfig, vision_width: int):
        super().__init__()
        self.heads, self.groups, self.width = model.num_attention_heads, model.num_query_groups, model.channels_per_head
        hidden, key_width, bias = model.hidden_size, self.groups * self.width, model.has_qkv_bias
        self.norm, self.mlp_norm = nn.RMSNorm(hidden, model.norm_eps), nn.RMSNorm(hidden, model.norm_eps)
        self.vision_norm = nn.RMSNorm(vision_width, model.norm_eps)
        self.query = nn.Linear(hidden, self.heads * self.width, bias)
        self.key, self.value = nn.Linear(hidden, key_width, bias), nn.Linear(hidden, key_width, bias)
        self.vision_key, self.vision_value = nn.Linear(vision_width, key_width, bias), nn.Linear(vision_width, key_width, bias)
        self.out = nn.Linear(self.heads * self.width, hidden, bias=False)
        self.gate, self.up = (nn.Linear(hidden, model.ffn_hidden_size, bias=False) for _ in range(2))
        self.down = nn.Linear(model.ffn_hidden_size, hidden, bias=False)

    def forward(self, text_BSH: Tensor, vision_BNV: Tensor, rope: tuple[Tensor, Tensor], mask_B1SL: Tensor) -> Tensor:
        """float[B, S, H]."""
        normed, seen = self.norm(text_BSH), self.vision_norm(vision_BNV)
        query = _rotate(self._heads(self.query(normed)), rope)
        key = torch.cat((self._heads(self.vision_key(seen)), _rotate(self._heads(self.key(normed)), rope)), dim=2)
        value = torch.cat((self._heads(self.vision_value(seen)), self._heads(self.value(normed))), dim=2)
        grouped = self.heads != self.groups
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1SL, enable_gqa=grouped)
        text_BSH = text_BSH + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(text_BSH)
        text_BSH = text_BSH + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return text_BSH

    def _heads(self, flat: Tensor) -> Tensor:
        return torch.unflatten(flat, -1, (-1, self.width)).transpose(1, 2)


class PlainDecoder(nn.Module):
    """The layers, without embedding and head."""

    def __init__(self, model: ModelConfig, vision_width: int):
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(PlainLayer(model, vision_width) for _ in range(model.num_layers))

    def forward(self, text_BSH: Tensor, vision_BNV: Tensor, lengths: Sequence[int]) -> Tensor:
        """float[B, S, H] of texts of these lengths, padded on the right."""
        rope, mask_B1SL = _angles(self.model, text_BSH), _mask(text_BSH, vision_BNV, lengths)
        for layer in self.layers:
            text_BSH = layer(text_BSH, vision_BNV, rope, mask_B1SL)
        return text_BSH


@torch.no_grad()
def plain_logits(weights: Mapping[str, Tensor], model: ModelConfig, ids_BS: Tensor, vision_BNV: Tensor) -> Tensor:
    """float[B, S, vocabulary] of unpadded text, by weights in the authors' layout, one layer of which is in memory in float32.

    N may be 0. Raises: ValueError for a family with layers of its own.
    """
    if FAMILIES[model.family].layer is not None:
        raise ValueError(f"model.family is {model.family}, whose layers HiMix in plain torch does not compute")
    with torch.device("meta"):
        layer = PlainLayer(model, vision_BNV.shape[-1])
    text_BSH = weights["model.embed_tokens.weight"][ids_BS].float()
    rope, mask_B1SL = _angles(model, text_BSH), _mask(text_BSH, vision_BNV, [ids_BS.shape[1]] * len(ids_BS))
    for number in range(model.num_layers):
        own = {}
        for name, _ in layer.named_parameters():
            part, kind = name.split(".")
            own[name] = weights[f"model.layers.{number}.{_AUTHORS_NAMES[part]}.{kind}"].float()
        text_BSH = functional_call(layer, own, (text_BSH, vision_BNV, rope, mask_B1SL))
    text_BSH = F.rms_norm(text_BSH, text_BSH.shape[-1:], weights["model.norm.weight"].float(), model.norm_eps)
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    return text_BSH @ weights[head].float().T


def _mask(text_BSH: Tensor, vision_BNV: Tensor, lengths: Sequence[int]) -> Tensor:
    """bool[B, 1, S, L]: a text token sees its sample's vision, and the text up to itself."""
    places = torch.arange(text_BSH.shape[1], device=text_BSH.device)
    real_BS = places < torch.tensor(lengths, device=text_BSH.device)[:, None]
    text_B1SS = (places[:, None] >= places)[None, None] & real_BS[:, None, None]
    vision_B1SN = text_B1SS.new_ones(1, 1, 1, 1).expand(len(lengths), 1, len(places), vision_BNV.shape[1])
    return torch.cat((vision_B1SN, text_B1SS), dim=-1)


def _angles(model: ModelConfig, text_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, each float[S, D]; halves alike."""
    num_text, width, device = text_BSH.shape[1], model.channels_per_head, text_BSH.device
    frequencies = model.rope_theta ** -(torch.arange(0, width, 2, device=device) / width)
    if model.rope_scaling_factor is not None:
        wavelengths = 2 * math.pi / frequencies
        # 1 below 8192 / 4 tokens, where nothing is scaled; 0 above 8192 / 1, where all is; linear in 1 / wavelength between.
        kept = ((8192 / wavelengths - 1) / (4 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / model.rope_scaling_factor)
    angles_SD = torch.outer(torch.arange(num_text, device=device), frequencies).repeat(1, 2)
    return angles_SD.cos().to(text_BSH.dtype), angles_SD.sin().to(text_BSH.dtype)


def _rotate(heads_BQSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    first, second = heads_BQSD.chunk(2, dim=-1)
    return heads_BQSD * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]
