"""Packed HiMix and HiMix as it is usually written, with padded texts, on lengths like LLaVA's: time and memory.

A part of `tools.bench.decoder`. `PlainDecoder` is plain torch in the manner of the authors' code: every layer normalises the
features for itself, keys are concatenated, and attention has a dense mask. Text lengths are log-normal, around 44 tokens for
captions and 314 for instructions, with one image each. Real text tokens are counted. Memory is the peak that a step adds to a
process of its own.

Shape letters: B samples, S text tokens (padded), N vision tokens, H text width, V vision width, Q and G query and key/value
heads, D head width.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from himix_megatron.config import ModelConfig
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import parse_settings, run_main
from tools.bench.decoder_setup import Arguments, build, layers_step, precision, sizes
from tools.bench.measure import Line, report, take_turns

LENGTHS = {44: 0.5, 314: 0.9}
"""Mean text tokens and the log-normal's sigma."""
WANTED_SPEED = {44: 1.5, 314: 2.0}
WANTED_MEMORY = 0.6


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


def lengths_of(mean: int, count: int) -> list[int]:
    """`count` text lengths with exactly this mean."""
    sigma = LENGTHS[mean]
    drawn = np.random.default_rng(0).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return [max(8, round(length)) for length in drawn * mean / drawn.mean()]


def padding(arguments: Arguments) -> list[Line]:
    """Measure, print and return the lines of both means."""
    torch.set_num_threads(arguments.threads)
    topology = init_distributed(sizes(arguments).parallel, seed=0)
    lines = []
    for mean in LENGTHS:
        lengths = lengths_of(mean, 2 * arguments.samples)
        fill = sum(lengths) / (max(lengths) * len(lengths))
        seconds = take_turns({name: make(arguments, lengths, topology) for name, make in SIDES.items()}, arguments.repetitions)
        speed = statistics.median(seconds["plain padded"]) / statistics.median(seconds["packed"])
        memory = {name: memory_of(name, mean) for name in SIDES}
        held = not torch.cuda.is_available()  # wanted of a CPU
        own = [
            Line(
                f"real text tokens a second, packed over plain padded, mean {mean}", speed, WANTED_SPEED[mean] if held else None
            ),
            Line(
                f"peak memory of a step, packed over plain padded, mean {mean} ({memory['packed'] / 2**20:.0f} and "
                f"{memory['plain padded'] / 2**20:.0f} MiB)",
                memory["packed"] / memory["plain padded"],
                WANTED_MEMORY if held else None,
                at_most=True,
            ),
        ]
        title = f"padding: {arguments.recipe}, {arguments.layers or 4} layers, {precision()}, {len(lengths)} samples of one "
        title += f"image of {arguments.vision_tokens} tokens, texts log-normal, mean {mean}, sigma "
        title += f"{LENGTHS[mean]}, padding filled to {fill:.2f}, {torch.get_num_threads()} threads"
        report(title, own, seconds)
        lines += own
    shutdown_distributed()
    return lines


def packed(arguments: Arguments, lengths: list[int], topology: Topology) -> Callable[[], None]:
    """A step of the project's layers: all texts one after the other."""
    config = sizes(arguments)
    model = build(config, topology)
    images = [arguments.vision_tokens] * len(lengths)
    return layers_step(model, lengths, images, config.vision.hidden_size, packed=True)


def plain_padded(arguments: Arguments, lengths: list[int], topology: Topology) -> Callable[[], None]:
    """A step of the plain layers; gradients are added up in place."""
    from himix_megatron.distributed.megatron_config import params_dtype

    config = sizes(arguments)
    width = config.vision.hidden_size
    decoder = PlainDecoder(config.model, width).to(topology.device, params_dtype(config))
    generator, own = torch.Generator().manual_seed(0), next(decoder.parameters())
    text = torch.randn(len(lengths), max(lengths), config.model.hidden_size, generator=generator).to(own).requires_grad_()
    vision = torch.randn(len(lengths), arguments.vision_tokens, width, generator=generator).to(own)
    grad = torch.randn(text.shape, generator=generator).to(own)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter).zero_()  # twice: the first leaves memory that is not there yet

    def step() -> None:
        decoder(text, vision, lengths).backward(grad)
        text.grad = None

    return step


SIDES = {"packed": packed, "plain padded": plain_padded}


def memory_of(side: str, mean: int) -> int:
    """Bytes that a step of one side adds at its peak, in a fresh process."""
    flags = [*sys.argv[1:], "--part", "padding", "--side", side, "--mean", str(mean)]
    done = subprocess.run([sys.executable, "-m", "tools.bench.padding", *flags], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def added_bytes(step: Callable[[], None]) -> int:
    """The most that a step holds less what was held before it: of the GPU's tensors, or of resident memory (Linux)."""
    if torch.cuda.is_available():
        step()  # workspaces are not the step's own
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@dataclass(frozen=True)
class OneSide(Arguments):
    """What a step of one side adds to this process's memory, in bytes; `tools.bench.decoder` calls this."""

    side: Literal["packed", "plain padded"] = "packed"
    """Which."""
    mean: int = 314
    """Text tokens a sample."""


def main() -> int:
    arguments = parse_settings(OneSide, sys.argv[1:], "python -m tools.bench.padding")
    torch.set_num_threads(arguments.threads)
    topology = init_distributed(sizes(arguments).parallel, seed=0)
    print(added_bytes(SIDES[arguments.side](arguments, lengths_of(arguments.mean, 2 * arguments.samples), topology)))
    shutdown_distributed()
    return 0


if __name__ == "__main__":
    run_main(main)
