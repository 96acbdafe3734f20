"""How much sooner does a HiMix model answer than one with the images inside the text?

    python -m tools.bench.generation

Two models of the same Megatron layers, sizes, torch attention and key/value cache: HiMix, and the usual design in which each
image is a number of tokens in front of the text. Measured are the time to the first token and the time per token after it,
without the vision tower and without the projection of its features to the text's width. Repetitions take turns. Exit code 1 if
HiMix's first token is less than 5 times faster.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himix_megatron.config import METHODS, Config, Count
from himix_megatron.data.loading.image_table import ImageTable
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import load_recipe, parse_settings, run_main
from tools.bench.decoder_setup import precision
from tools.bench.measure import Line, report, take_turns

WANTED_RATIO = 5.0
"""Least ratio of the concatenating model's time to the first token to HiMix's."""


@dataclass(frozen=True)
class Arguments:
    """Compare HiMix with a concatenating model: time to the first token, and per token after it."""

    recipe: str = "qwen2_0_5b_instruct"
    """Recipe whose sizes are used; weights are random."""
    layers: Count = 4
    """Number of decoder layers. Few layers favour the concatenating model: the head costs both the same."""
    images: Count = 8
    """Samples of a batch, each with one image."""
    text_tokens: Count = 64
    """Text tokens of each prompt."""
    vision_tokens: Count = 729
    """Vision tokens of each image."""
    new_tokens: Count = 8
    """Tokens after the first, over which the time per token is measured."""
    repetitions: Count = 5
    """Counted repetitions, after one uncounted one."""
    threads: Count = 2
    """Threads of torch."""


def sizes(arguments: Arguments) -> Config:
    """The recipe with this number of layers on one rank; fp32 on a CPU. Raises: ValueError for a bad argument."""
    config = load_recipe(arguments.recipe)()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=arguments.layers, layer_spec="torch"),
        train=dataclasses.replace(config.train, precision=precision(), trainable_parts=("vision_kv",)),
    )


def _now() -> float:
    """The clock in seconds, after all queued work has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Himix:
    """Text goes through the decoder, images beside it."""

    name = "himix"

    def __init__(self, config: Config, arguments: Arguments, topology: Topology):
        from himix_megatron.distributed.fused_kernels import detect
        from himix_megatron.model.himix_model import build_model_chunks, unwrap_model

        self.config, self.arguments = config, arguments
        self.model: Any = unwrap_model(
            build_model_chunks(config, detect(), topology, torch.nn.Identity(), trains=False)[0]
        ).eval()
        self.own = next(self.model.parameters())
        self.text_ids = torch.randint(config.model.vocab_size, (arguments.images, arguments.text_tokens)).to(self.own.device)
        self.features_TV = torch.randn(arguments.vision_tokens * arguments.images, config.vision.hidden_size).to(self.own)
        self.images = ImageTable.of_features([[arguments.vision_tokens]] * arguments.images)
        self.vision_rows: Tensor | None = None

    def cache(self) -> Any:
        """A cache for one answer."""
        from himix_megatron.model.attention.kv_cache import KVCache

        num_prompt = self.text_ids.shape[1]
        lengths = torch.full((self.arguments.images,), num_prompt, device=self.own.device)
        return KVCache(self.images, lengths, num_prompt, self.arguments.new_tokens + 1, self.config.injection)

    @torch.no_grad()
    def answer(self) -> tuple[float, float]:
        """Answer one batch. Returns: seconds to the first token, and per token after it."""
        cache = self.cache()
        begun = _now()
        ids = self._next(self.text_ids, cache)
        first = _now()
        for _ in range(self.arguments.new_tokens):
            ids = self._next(ids, cache)
        return first - begun, (_now() - first) / self.arguments.new_tokens

    def _next(self, text_ids: Tensor, cache: Any) -> Tensor:
        rows = self.vision_rows if cache.is_new else None
        logits_B1W: Tensor = self.model(text_ids, self.features_TV, None, self.images, cache=cache, vision_rows=rows)
        cache.advance()
        return logits_B1W.argmax(-1)


class Concatenating(Himix):
    """The same decoder with each image's tokens in front of its prompt, in the sequence."""

    name = "concatenating"

    def __init__(self, config: Config, arguments: Arguments, topology: Topology):
        super().__init__(dataclasses.replace(config, injection=METHODS["tokens"](config.model)), arguments, topology)
        places = self.text_ids.new_zeros(arguments.images, arguments.vision_tokens)
        self.text_ids = torch.cat((places, self.text_ids), dim=1)
        self.vision_rows = torch.arange(self.text_ids.numel(), device=self.own.device).view_as(self.text_ids)
        self.vision_rows = self.vision_rows[:, : arguments.vision_tokens].flatten()


def measure(models: list[Himix], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each model's repetitions, to the first token and per token after it."""
    taken = take_turns({model.name: model.answer for model in models}, repetitions, measure=lambda answer: answer())
    return {
        f"{what}, {name}": list(column)
        for name, pairs in taken.items()
        for what, column in zip(("first token", "per token"), zip(*pairs, strict=True), strict=True)
    }


def lines_of(seconds: dict[str, list[float]]) -> list[Line]:
    """Ratios of medians."""
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    return [
        Line(f"{what}: concatenation's time over HiMix's", median[f"{what}, concatenating"] / median[f"{what}, himix"], wanted)
        for what, wanted in (("first token", WANTED_RATIO), ("per token", None))
    ]


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.generation", __doc__)
    config = sizes(arguments)
    torch.set_num_threads(arguments.threads)
    topology = init_distributed(config.parallel, seed=0)
    seconds = measure([kind(config, arguments, topology) for kind in (Himix, Concatenating)], arguments.repetitions)
    shutdown_distributed()
    lines = lines_of(seconds)
    title = f"{arguments.recipe}, {arguments.layers} layers, {config.train.precision}, {arguments.images} samples of "
    title += f"{arguments.vision_tokens} vision and {arguments.text_tokens} text tokens, {arguments.threads} threads"
    report(title, lines, seconds)
    return Line.code(lines)


if __name__ == "__main__":
    run_main(main)
