"""The model's benchmark runs, and says yes or no by its own figures."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from himix_megatron.distributed import cpu_backend

cpu_backend.activate_if_needed()

from himix_megatron.costs.flops import Work, step_flops  # noqa: E402
from tools.bench import generation, padding  # noqa: E402
from tools.bench.concatenation import lines_of, vanilla  # noqa: E402
from tools.bench.decoder_setup import Arguments, layers_step, sizes  # noqa: E402
from tools.bench.measure import Line  # noqa: E402


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench.decoder", "--repetitions", "1", "--threads", "1", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_it_compares_and_fails_where_a_line_is_missed() -> None:
    small = ("--layers", "1", "--samples", "2", "--text-tokens", "64", "--vision-tokens", "20")
    done = bench("--part", "concatenation", *small)
    assert done.returncode == 1, done.stderr  # 20 vision tokens leave nothing to gain
    assert "wanted >= 12, MISSED" in done.stdout.splitlines()[0]


def test_a_whole_decoder_is_measured_on_a_cpu_too() -> None:
    flags = ("--recipe", "tiny_align", "--pack-max-text-tokens", "128", "--images-per-pack", "3", "--packs", "2", "--optimizer")
    done = bench("--part", "training", *flags)
    assert done.returncode == 0, done.stderr
    assert "decoder's MFU" in done.stdout
    assert "optimizer's share" in done.stdout


def test_lines_are_held_to_what_was_wanted() -> None:
    arguments = Arguments(part="concatenation", text_tokens=(64,))
    config = sizes(arguments)
    needed = step_flops(config, Work.of([64] * 8, [729] * 8, head_tokens=0, causal=False)).decoder
    at_peak = needed / (2 * 2048**3)  # seconds, where a product takes one
    seconds = {"product": [1.0], "himix 64": [at_peak / 0.8], "vanilla 64": [13 * at_peak / 0.8], "align 64": [1.0]}
    seconds["ours, concatenating 64"] = [15 * at_peak / 0.8]
    ratio, ours, of_product, of_full = lines_of(arguments, config, seconds)
    assert ratio.value == pytest.approx(13)
    assert ours.value == pytest.approx(15)
    assert ours.wanted is None
    assert of_product.value == pytest.approx(0.8)
    assert ratio.holds
    assert of_product.holds
    assert of_full.wanted == 0.95
    assert Line.code([Line("", 0.5, 0.6, at_most=True)]) == 0
    assert Line.code([Line("", 0.7, 0.6, at_most=True)]) == 1
    assert not lines_of(arguments, config, seconds | {"vanilla 64": [11 * at_peak / 0.8]})[0].holds


META = torch.device("meta")
"""torch's device without memory, in the place of a GPU: it is not the CPU either, and every other one is refused."""


class Elsewhere(nn.Module):
    """A decoder of one number on that device, and in its dtype; notes where what it is given lies."""

    def __init__(self, *_: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16, device=META))
        self.seen: list[tuple[torch.device, torch.dtype]] = []

    def forward(self, hidden: Tensor, *_: Any, context: Tensor | None = None, **__: Any) -> Tensor:
        for tensor in (hidden, *(() if context is None else (context,))):
            self.seen.append((tensor.device, tensor.dtype))
        return hidden * self.weight


def test_layers_are_given_what_lies_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # for a GPU alone
    decoder: Any = Elsewhere()
    decoder.layers = [SimpleNamespace(mlp=decoder)]
    model: Any = SimpleNamespace(
        parameters=decoder.parameters, decoder=decoder, config=SimpleNamespace(hidden_size=8, layernorm_epsilon=1e-6),
        rotary_pos_emb=lambda length: torch.zeros(length, 1, 1, 4, device=META),
    )  # fmt: skip
    for is_packed in (False, True):
        layers_step(model, [3, 3], [2, 4], 16, packed=is_packed)()  # torch refuses a gradient from another device
    assert decoder.seen == [(META, torch.bfloat16)] * 4


def test_concatenation_and_padding_are_given_what_lies_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Arguments(samples=2, text_tokens=(3,), vision_tokens=4, layers=1)
    decoder, topology = Elsewhere(), SimpleNamespace(device=META)
    monkeypatch.setattr("tools.bench.vanilla_decoder.VanillaDecoder", lambda *_: decoder)
    vanilla(arguments, topology)["vanilla 3"]()  # type: ignore[arg-type]
    assert decoder.seen == [(META, torch.bfloat16)]

    seen = []

    class Noting(padding.PlainDecoder):
        def forward(self, text_BSH: Tensor, vision_BNV: Tensor, lengths: list[int]) -> Tensor:
            seen.extend([next(self.parameters()).device, text_BSH.device, vision_BNV.device])
            return super().forward(text_BSH, vision_BNV, lengths)

    monkeypatch.setattr(padding, "PlainDecoder", Noting)
    padding.plain_padded(arguments, [3, 5], topology)()  # type: ignore[arg-type]
    assert seen == [META] * 3


def test_answers_are_made_of_what_lies_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Answering(Elsewhere):
        embedding = nn.Identity()

        def forward(self, text_ids: Tensor, features_TV: Tensor, *_: Any, **__: Any) -> Tensor:
            given.extend([text_ids, features_TV])
            return torch.zeros(len(text_ids), 1, 7, device=text_ids.device)

    def cache(_: Any, lengths: Tensor, *__: Any) -> Any:
        given.append(lengths)
        return SimpleNamespace(advance=lambda: None, is_new=True)

    monkeypatch.setattr("himix_megatron.model.himix_model.build_model_chunks", lambda *_, **__: [Answering()])
    monkeypatch.setattr("himix_megatron.model.himix_model.unwrap_model", lambda stage: stage)
    monkeypatch.setattr("himix_megatron.model.attention.kv_cache.KVCache", cache)
    arguments = generation.Arguments(images=2, text_tokens=3, vision_tokens=4, new_tokens=1)
    for kind in (generation.Himix, generation.Concatenating):
        kind(generation.sizes(arguments), arguments, SimpleNamespace()).answer()  # type: ignore[arg-type]
    assert len(given) == 2 * 5
    assert {tensor.device for tensor in given} == {META}
