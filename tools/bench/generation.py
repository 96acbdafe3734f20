"""How much sooner does a HiMix model answer than one that puts the image into the text?

    python -m tools.bench.generation

Two models of the same Megatron layers, sizes, torch attention and key/value cache: HiMix, and the usual design in which each
image is so many more tokens in front of the text (`concatenating`). Of both, the time to the first token and from one token
to the next. Left out on both sides: the vision tower, and what brings its features to the text's width in front of a
concatenating model. Repetitions take turns. Exit code 1 when HiMix's first token is less than 5 times faster.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himix_megatron.config import Config
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import RECIPES

WANTED_RATIO = 5.0
"""Of the concatenating model's time to the first token to HiMix's."""


@dataclass(frozen=True)
class Arguments:
    """Compare HiMix with a concatenating model: first token, and time per token after it."""

    recipe: str = "qwen2_0_5b_instruct"
    """Whose sizes are taken; weights are random."""
    layers: int = 4
    """Decoder layers that are built. Few of them flatter the concatenating model: the head costs both the same."""
    images: int = 8
    """Samples of a batch, each with one image."""
    text_tokens: int = 64
    """Of each prompt."""
    vision_tokens: int = 729
    """Of each image."""
    new_tokens: int = 8
    """Tokens after the first, over which the time per token is taken."""
    repetitions: int = 5
    """Measured ones; one more before them is not counted."""
    threads: int = 2
    """Of torch."""


def sizes(arguments: Arguments) -> Config:
    """The recipe, with as many layers, on one rank; on a CPU in fp32. Raises: ValueError for an unknown recipe."""
    if arguments.recipe not in RECIPES:
        raise ValueError(f"--recipe is {arguments.recipe}: wanted one of {', '.join(RECIPES)}")
    for name in ("layers", "images", "text_tokens", "vision_tokens", "new_tokens", "repetitions", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: wanted 1 or more")
    config = RECIPES[arguments.recipe]()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=arguments.layers, layer_spec="torch"),
        train=dataclasses.replace(
            config.train, precision="bf16" if torch.cuda.is_available() else "fp32", trainable_parts=("vision_kv",)
        ),
    )


def _now() -> float:
    """Seconds, when all work begun so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Himix:
    """Text through the decoder, images beside it."""

    name = "himix"

    def __init__(self, config: Config, arguments: Arguments, topology: Topology):
        from himix_megatron.distributed.fused_kernels import detect
        from himix_megatron.model.himix_model import build_stage, unwrap_model

        self.config, self.arguments = config, arguments
        self.model: Any = unwrap_model(build_stage(config, detect(), topology, torch.nn.Identity(), trains=False)[0]).eval()
        self.own = next(self.model.parameters())
        """Whose device and dtype all has."""
        self.text_ids = torch.randint(config.model.vocab_size, (arguments.images, arguments.text_tokens)).to(self.own.device)
        self.vision_NBV = torch.randn(arguments.vision_tokens, arguments.images, config.vision.hidden_size).to(self.own)

    def cache(self) -> Any:
        """Room for one answer; the images' features are in it."""
        return self._cache(self.vision_NBV, self.text_ids.shape[1])

    def _cache(self, vision_NBV: Tensor, num_prompt: int) -> Any:
        from himix_megatron.model.attention.kv_cache import KVCache

        lengths = torch.full((self.arguments.images,), num_prompt, device=self.own.device)
        return KVCache(vision_NBV, None, lengths, num_prompt, self.arguments.new_tokens + 1)

    @torch.no_grad()
    def answer(self) -> tuple[float, float]:
        """One batch of answers. Returns: seconds to the first token, and per token after it."""
        cache = self.cache()
        begun = _now()
        ids = self._next(self.text_ids, cache)
        first = _now()
        for _ in range(self.arguments.new_tokens):
            ids = self._next(ids, cache)
        return first - begun, (_now() - first) / self.arguments.new_tokens

    def _next(self, text_ids: Tensor, cache: Any) -> Tensor:
        logits_B1W: Tensor = self.model(text_ids, None, None, (), cache=cache)
        cache.advance()
        return logits_B1W.argmax(-1)


class Concatenating(Himix):
    """The same layers, without vision beside the text: each image's tokens are embeddings in front of its prompt."""

    name = "concatenating"

    def __init__(self, config: Config, arguments: Arguments, topology: Topology):
        super().__init__(config, arguments, topology)
        shape = (arguments.vision_tokens, arguments.images, config.model.hidden_size)
        image_NBH = (torch.randn(shape) * config.model.init_std).to(self.own)
        places = self.text_ids.new_zeros(arguments.images, arguments.vision_tokens)
        self.text_ids = torch.cat((places, self.text_ids), dim=1)

        def put_in_front(_: Any, given: Any, embedded_SBH: Tensor) -> Tensor:
            if len(embedded_SBH) > 1:
                embedded_SBH[: len(image_NBH)] = image_NBH
            return embedded_SBH

        self.model.embedding.register_forward_hook(put_in_front)

    def cache(self) -> Any:
        """Room for one answer; all of the prompt goes through the layers."""
        return self._cache(self.vision_NBV[:0], self.text_ids.shape[1])


def measure(models: list[Himix], repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """(first token, per token) seconds of each model's repetitions, taken in turns; the first of each is not counted."""
    taken: dict[str, list[tuple[float, float]]] = {model.name: [] for model in models}
    for number in range(repetitions + 1):
        for model in models:
            seconds = model.answer()
            if number:
                taken[model.name].append(seconds)
    return taken


def report(
    arguments: Arguments, config: Config, taken: dict[str, list[tuple[float, float]]], say: Callable[[str], None]
) -> float:
    """Ratios first, then medians with the smallest and largest. Returns: the ratio of the first tokens."""
    columns = {name: list(zip(*seconds, strict=True)) for name, seconds in taken.items()}
    median = {name: [statistics.median(column) for column in pair] for name, pair in columns.items()}
    ratios: list[float] = [slow / fast for slow, fast in zip(median["concatenating"], median["himix"], strict=True)]
    say(f"HiMix's first token is {ratios[0]:.1f} times faster (wanted {WANTED_RATIO:.0f}), the following ones {ratios[1]:.2f}")
    say(
        f"{arguments.recipe}, {arguments.layers} layers, {config.train.precision}, {arguments.images} samples of "
        f"{arguments.vision_tokens} vision and {arguments.text_tokens} text tokens, {arguments.threads} threads, "
        f"{arguments.repetitions} repetitions in turns, load {os.getloadavg()[0]:.1f}"
    )
    say(f"{'milliseconds':<16}{'first token':>30}{'per token':>30}")
    for name, pair in columns.items():
        cells = [f"{1000 * statistics.median(c):.0f} ({1000 * min(c):.0f} to {1000 * max(c):.0f})" for c in pair]
        say(f"{name:<16}{cells[0]:>30}{cells[1]:>30}")
    return ratios[0]


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.generation")
    config = sizes(arguments)
    torch.set_num_threads(arguments.threads)
    topology = init_distributed(config.parallel, seed=0)
    models = [Himix(config, arguments, topology), Concatenating(config, arguments, topology)]
    ratio = report(arguments, config, measure(models, arguments.repetitions), print)
    shutdown_distributed()
    return 0 if ratio >= WANTED_RATIO else 1


if __name__ == "__main__":
    run_main(main)
