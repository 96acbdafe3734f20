"""HiMix as it is usually written: what `tools.bench.decoder` compares the project's layers with.

Flows in: texts padded to the longest of the batch and one image each; out: hidden states. Plain torch, in the manner of the
authors' code: every layer normalises the features for itself, keys are concatenated, and attention has a dense mask.

Shape letters: B samples, S text tokens (padded), N vision tokens, H text width, V vision width, Q and G query and key/value
heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from himix_megatron.config import ModelConfig


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
        query = rotate(self._heads(self.query(normed)), rope)
        key = torch.cat((self._heads(self.vision_key(seen)), rotate(self._heads(self.key(normed)), rope)), dim=2)
        value = torch.cat((self._heads(self.vision_value(seen)), self._heads(self.value(normed))), dim=2)
        grouped = self.heads != self.groups
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B1SL, enable_gqa=grouped)
        text_BSH = text_BSH + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(text_BSH)
        return text_BSH + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.width)).transpose(1, 2)


class PlainDecoder(nn.Module):
    """The layers, without embedding and head."""

    def __init__(self, model: ModelConfig, vision_width: int):
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(PlainLayer(model, vision_width) for _ in range(model.num_layers))

    def forward(self, text_BSH: Tensor, vision_BNV: Tensor, lengths: list[int]) -> Tensor:
        """float[B, S, H] of texts of these lengths, padded on the right."""
        num_text, width = text_BSH.shape[1], self.model.channels_per_head
        places = torch.arange(num_text, device=text_BSH.device)
        frequencies = 1 / self.model.rope_theta ** (torch.arange(0, width, 2, device=text_BSH.device) / width)
        angles = torch.outer(places, frequencies).repeat(1, 2)
        real_BS = places < torch.tensor(lengths, device=text_BSH.device)[:, None]
        text_B1SS = (places[:, None] >= places)[None, None] & real_BS[:, None, None]
        vision_B1SN = text_B1SS.new_ones(1, 1, 1, 1).expand(len(lengths), 1, num_text, vision_BNV.shape[1])
        mask_B1SL = torch.cat((vision_B1SN, text_B1SS), dim=-1)
        rope = angles.cos().to(text_BSH.dtype), angles.sin().to(text_BSH.dtype)
        for layer in self.layers:
            text_BSH = layer(text_BSH, vision_BNV, rope, mask_B1SL)
        return text_BSH


def rotate(heads_BQSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, halves paired."""
    first, second = heads_BQSD.chunk(2, dim=-1)
    return heads_BQSD * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]
