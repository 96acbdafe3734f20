"""CUDA graphs: what ours (`train.cuda_graphs`) save a packed step, and whether megatron-core's own could carry one.

    python -m tools.gpu_check.graphs --out DIR        (a process of its own: what fails here can hurt nobody)

Flows out: DIR/graphs.json, milliseconds of a step without graphs, with ours and with megatron-core's, or why there are none.

What reading megatron-core 0.19 says of its own, one a layer: `transformer_engine` graphs take tensors only and refuse
`packed_seq_params`, so attention stays outside. `local` graphs take a dataclass; its tensors are copied into fixed places, and
all its other fields must be equal to the recorded ones at every replay: our Layout has the lengths of the samples among them.
So they could only be replayed for packs of the very lengths that were recorded. This trial gives them that. Tuples in a
dataclass are refused by a check of types, which the trial takes away.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from himix_megatron import parallel
from himix_megatron.config import Config
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import RECIPES
from tools.bench_training import Decoder, Packs, packed
from tools.gpu_check.runner import Context
from tools.measure import Line, seconds_of

SIZES = {"2k": (2048, 6), "8k": (8192, 26)}
"""Text tokens and samples of a pack."""
PACKS = 2
"""Of a step, of the same lengths."""
Kind = Literal["none", "ours", "megatron-core"]
KINDS: tuple[Kind, ...] = ("none", "ours", "megatron-core")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the trial."""

    out: Path
    """Where graphs.json goes."""


def configuration(kind: Kind, text_tokens: int, samples: int) -> Config:
    """Qwen2-0.5B in bf16; without a GPU the tiny model."""
    on_gpu = torch.cuda.is_available()
    config = RECIPES["qwen2_0_5b_instruct" if on_gpu else "tiny_instruct"]()
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, attention="te" if on_gpu else "torch"),
        train=dataclasses.replace(config.train, precision="bf16" if on_gpu else "fp32"),
    )
    config = packed(config, text_tokens=text_tokens, images=samples, packs=PACKS)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs="on" if kind == "ours" else "off"))


def milliseconds(kind: Kind, config: Config, packs: Packs) -> float:
    """Median of a step."""
    from megatron.core import tensor_parallel

    from himix_megatron.model import himix

    topology = parallel.start(config.parallel, seed=0)
    before = himix.transformer_config
    if kind == "megatron-core":
        tensor_parallel.model_parallel_cuda_manual_seed(0, te_rng_tracker=True, force_reset_rng=True)
        himix.transformer_config = with_graphs(before)
    try:
        decoder = Decoder(config, topology)
        step = decoder.step_on(packs)
        for _ in range(5):  # recorded in the second at the latest
            step()
        return 1e3 * statistics.median(seconds_of(step) for _ in range(7))
    finally:
        himix.transformer_config = before
        parallel.shutdown()


def with_graphs(settings_of: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's configuration, with a graph for each layer."""
    from megatron.core.transformer import cuda_graphs

    cuda_graphs._check_supported_type = lambda meta: None

    def settings(*args: Any) -> Any:
        return dataclasses.replace(settings_of(*args), cuda_graph_impl="local")

    return settings


def main() -> int:
    """Writes what was found after each number: what comes next may end the process."""
    settings = parse_settings(Settings, sys.argv[1:], "python -m tools.gpu_check.graphs", __doc__)
    found: dict[str, Any] = {}
    sizes = SIZES if torch.cuda.is_available() else {"tiny": (96, 3)}
    for kind in KINDS:
        for name, (text_tokens, samples) in sizes.items():
            config = configuration(kind, text_tokens, samples)
            packs = Packs.of(text_tokens, samples, 1, config.vision.tokens_per_image)
            packs = dataclasses.replace(packs, text_lengths=packs.text_lengths * PACKS)
            found["model_flops", name] = packs.flops(config)
            try:
                found[kind, name] = milliseconds(kind, config, packs)
            except Exception as error:  # the reason is what is wanted, whatever it is
                found["reason", kind] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            written = {", ".join(key): value for key, value in found.items()}
            (settings.out / "graphs.json").write_text(json.dumps(written, indent=1) + "\n")
    return 0


def check(context: Context) -> Iterator[Line]:
    """The trial in a process of its own; a failure is a line, not an error."""
    file = context.out / "graphs.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.gpu_check.graphs", "--out", str(context.out)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=max(10.0, min(90.0, context.remaining()))
        )
        ended = f"exit code {done.returncode}: {' '.join(done.stderr.split())[-200:]}"
    except subprocess.TimeoutExpired:
        ended = "no end within its time"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for name in (*SIZES, "tiny"):
        plain = found.get(f"none, {name}")
        for kind in KINDS[1:]:
            graphed, reason = found.get(f"{kind}, {name}"), found.get(f"reason, {kind}", ended)
            if plain and graphed:
                mfu = found[f"model_flops, {name}"] / graphed * 1e3 / 989e12
                what = f"CUDA graphs, {kind}, Qwen2-0.5B, {PACKS} packs of {name}: MFU {mfu:.3f}; a step without over one with"
                yield Line(f"{what} ({plain:.1f} and {graphed:.1f} ms)", plain / graphed)
            elif plain:
                yield Line(f"CUDA graphs, {kind}, pack of {name}: did not run ({reason}); ms without", plain)
    if not found:
        yield Line(f"CUDA graphs: the trial did not run ({ended})", 0.0)


if __name__ == "__main__":
    run_main(main)
