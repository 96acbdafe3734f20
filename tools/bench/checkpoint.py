"""How long a save blocks training, asynchronously and synchronously, for a checkpoint of a GB or more.

    make bench-checkpoint
    python -m tools.bench.checkpoint --layers 8 --folder DIR --repetitions 9

One rank with AdamW's state, undivided and as a distributed optimizer: on a CPU Qwen2-0.5B's widths in fp32, on a GPU the whole
Qwen2-0.5B in bf16 with its fp32 main weights (9 GB). Both modes save the same model to the same file system in turns; each
background save ends before the next begins, so that only the save is measured. The first background save also allocates the
host memory that later ones copy into (pinned beside a GPU), and is reported separately. Exit code 1 if an asynchronous save
blocks for more than a tenth of a synchronous one.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from himix_megatron.checkpoint.checkpointer import Checkpoints
from himix_megatron.checkpoint.description import Position
from himix_megatron.checkpoint.manifest import complete_checkpoints, verify_checkpoint
from himix_megatron.config import CheckpointConfig, Config, RunConfig
from himix_megatron.data.loading.plan import START
from himix_megatron.distributed.fused_kernels import detect
from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
from himix_megatron.model.himix_model import build_model_chunks
from himix_megatron.model.towers import build_tower
from himix_megatron.training.optimizer import build_optimizer
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import RECIPES
from tools.bench.measure import Line, report

WANTED = 0.1


SYNC, ASYNC, FIRST, WRITTEN = "sync", "async", "async, first of all", "async, written after"


@dataclass(frozen=True)
class Arguments:
    """Measure how long saves block training."""

    folder: Path | None = None
    """Folder on the file system to measure. None: the system's temporary folder."""
    layers: int | None = None
    """Decoder layers of about 0.2 GB each, besides 0.35 GB of embeddings. None: 4, or all 24 on a GPU."""
    repetitions: int = 5
    """Repetitions of each mode and optimizer."""
    tiny: bool = False
    """Use tiny widths, to test the benchmark itself."""


def sizes(arguments: Arguments, run: Path, *, divided: bool) -> Config:
    """Qwen2-0.5B, all of it trained, and a small frozen tower; on a CPU with fewer layers and a smaller vocabulary, in fp32."""
    recipe, tiny = RECIPES["qwen2_0_5b_instruct"](), RECIPES["tiny_instruct"]()
    on_gpu = torch.cuda.is_available()
    layers = arguments.layers or (24 if on_gpu else 4)
    model = tiny.model if arguments.tiny else recipe.model
    if not on_gpu:
        model = dataclasses.replace(model, vocab_size=min(model.vocab_size, 32768), layer_spec="torch")
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(model, num_layers=layers),
        vision=tiny.vision,
        train=dataclasses.replace(recipe.train, precision="bf16" if on_gpu else "fp32"),
        parallel=dataclasses.replace(recipe.parallel, distributed_optimizer=divided),
        checkpoint=CheckpointConfig(keep_last=1),
        run=RunConfig(dir=str(run)),
    )


def measure(config: Config, repetitions: int) -> tuple[dict[str, list[float]], float]:
    """Seconds for which training stands still, by mode; and the bytes of a checkpoint."""
    topology = init_distributed(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    model_chunks = build_model_chunks(config, detect(), topology, tower)
    optimizer = build_optimizer(config, model_chunks)
    for stage in model_chunks:
        stage.zero_grad_buffer()
    optimizer.step()  # makes AdamW's moments
    modes: dict[str, Literal["sync", "async"]] = {FIRST: "async"}
    modes |= {f"{mode} {number}": mode for number in range(repetitions) for mode in ("sync", "async")}
    checkpoints = Checkpoints(config, model_chunks, optimizer, tower)
    taken: dict[str, list[float]] = {SYNC: [], ASYNC: [], FIRST: [], WRITTEN: []}
    for step, (name, mode) in enumerate(modes.items(), start=1):
        checkpoints.config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, mode=mode))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        stall = checkpoints.save(Position(step=step, place=START, data={}))
        checkpoints.saves.wait()
        taken[FIRST if name == FIRST else mode].append(stall)
        if mode == "async" and name != FIRST:
            taken[WRITTEN].append(time.perf_counter() - begun)
    newest = complete_checkpoints(config.run_dir)[-1]
    assert not verify_checkpoint(newest)
    checkpoints.close()
    shutdown_distributed()
    return taken, float(sum(path.stat().st_size for path in newest.iterdir()))


def measure_in(arguments: Arguments, *, divided: bool) -> tuple[dict[str, list[float]], float]:
    """As `measure`, in a folder that is gone afterwards; no memory stays taken."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(sizes(arguments, Path(folder) / "run", divided=divided), arguments.repetitions)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # the pinned copies
    return found


def lines_of(optimizer: str, taken: dict[str, list[float]], num_bytes: float, *, judged: bool = True) -> list[Line]:
    """What is wanted of one optimizer's saves."""
    ratio = statistics.median(taken[ASYNC]) / statistics.median(taken[SYNC])
    stall = f"stall of a save beside training, over one that is waited for, {optimizer}"
    first = statistics.median(taken[FIRST]) / statistics.median(taken[SYNC])
    return [
        Line(stall, ratio, WANTED if judged else None, at_most=True),
        Line(f"the same for a process's first save, {optimizer}", first),
        Line("GB a checkpoint", num_bytes / 1e9, 1.0 if judged else None),
    ]


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.checkpoint", description=__doc__)
    found = []
    for optimizer, divided in (("undivided", False), ("distributed", True)):
        config = sizes(arguments, Path(), divided=divided)
        taken, num_bytes = measure_in(arguments, divided=divided)
        lines = lines_of(optimizer, taken, num_bytes, judged=not arguments.tiny)
        title = f"save stall: {config.model.num_layers} layers of Qwen2-0.5B's widths, {config.train.precision}, one rank"
        report(f"{title}, {optimizer} optimizer", lines, taken)
        found += lines
    return Line.code(found)


if __name__ == "__main__":
    run_main(main)
