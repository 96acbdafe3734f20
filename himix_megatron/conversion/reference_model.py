"""HiMix's decoder in plain torch, straight from the paper and by the authors' parameter names: what conversions are held to.

Shares nothing with the Megatron model but the configuration. One layer's weights are touched at a time, in float32.
Source: HiMix, arXiv 2501.10318; rotary embedding and its Llama 3 scaling as in Llama's model card code.

Shape letters: B samples, S text tokens, N vision tokens of a sample (the same for all), H text width, V vision width,
Q query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import ModelConfig
from ..config.families import FAMILIES


@torch.no_grad()
def plain_logits(weights: Mapping[str, Tensor], model: ModelConfig, ids_BS: Tensor, vision_BNV: Tensor) -> Tensor:
    """float[B, S, vocabulary] of unpadded text; N may be 0. Raises: ValueError for a family with layers of its own."""
    if FAMILIES[model.family].layer is not None:
        raise ValueError(f"model.family is {model.family}, whose layers HiMix in plain torch does not compute")
    hidden_BSH = weights["model.embed_tokens.weight"][ids_BS].float()
    angles_SD = _angles(model, ids_BS.shape[1])
    for layer in range(model.num_layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): weights[name].float()
            for name in weights
            if name.startswith(f"model.layers.{layer}.")
        }
        normed_BSH = F.rms_norm(hidden_BSH, hidden_BSH.shape[-1:], own["input_layernorm.weight"], model.norm_eps)
        hidden_BSH = hidden_BSH + _attention(own, model, normed_BSH, vision_BNV, angles_SD)
        normed_BSH = F.rms_norm(hidden_BSH, hidden_BSH.shape[-1:], own["post_attention_layernorm.weight"], model.norm_eps)
        gate = F.silu(normed_BSH @ own["mlp.gate_proj.weight"].T)
        hidden_BSH = hidden_BSH + (gate * (normed_BSH @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    hidden_BSH = F.rms_norm(hidden_BSH, hidden_BSH.shape[-1:], weights["model.norm.weight"].float(), model.norm_eps)
    head = "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
    return hidden_BSH @ weights[head].float().T


def _attention(
    own: Mapping[str, Tensor], model: ModelConfig, text_BSH: Tensor, vision_BNV: Tensor, angles_SD: Tensor
) -> Tensor:
    seen_BNV = F.rms_norm(vision_BNV, vision_BNV.shape[-1:], own["input_layernorm_img.weight"], model.norm_eps)

    def project(name: str, inputs: Tensor) -> Tensor:
        """[B, heads, tokens, D]."""
        flat = F.linear(inputs, own[f"self_attn.{name}.weight"], own.get(f"self_attn.{name}.bias"))
        return flat.view(*flat.shape[:2], -1, model.channels_per_head).transpose(1, 2)

    query = _rotate(project("q_proj", text_BSH), angles_SD)
    key = torch.cat((project("k_proj_img", seen_BNV), _rotate(project("k_proj", text_BSH), angles_SD)), dim=2)
    value = torch.cat((project("v_proj_img", seen_BNV), project("v_proj", text_BSH)), dim=2)
    repeats = model.num_attention_heads // model.num_query_groups
    scores = query @ key.repeat_interleave(repeats, 1).transpose(-1, -2) / math.sqrt(model.channels_per_head)
    num_text, num_keys = scores.shape[-2:]
    # Text token t sees the whole image and the text up to itself: all but the last num_text - 1 - t keys.
    hidden = torch.ones(num_text, num_keys, dtype=torch.bool).triu(num_keys - num_text + 1)
    mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(repeats, 1)
    return mixed.transpose(1, 2).flatten(2) @ own["self_attn.o_proj.weight"].T


def _angles(model: ModelConfig, length: int) -> Tensor:
    """float[S, D]: position times frequency; halves alike."""
    frequencies = model.rope_theta ** -(torch.arange(0, model.channels_per_head, 2).float() / model.channels_per_head)
    if model.rope_scaling_factor is not None:
        wavelengths = 2 * math.pi / frequencies
        # 1 below 8192 / 4 tokens, where nothing is scaled; 0 above 8192 / 1, where all is; linear in 1 / wavelength between.
        kept = ((8192 / wavelengths - 1) / (4 - 1)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / model.rope_scaling_factor)
    return torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)


def _rotate(heads: Tensor, angles_SD: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * angles_SD.cos() + torch.cat((-second, first), dim=-1) * angles_SD.sin()
