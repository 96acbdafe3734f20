"""How long a save keeps training waiting, beside training and not, for a checkpoint of a GB or more.

    make bench-checkpoint
    python -m tools.bench_checkpoint --layers 8 --folder DIR --repetitions 9

One rank, Qwen2-0.5B's widths in fp32, AdamW's state included, undivided and as a distributed optimizer. Both modes save the
same model into the same file system by turns; each save in the background comes to its end before the next begins, so that
nothing but the save itself is measured.
Exit code 1 if the stall is more than a tenth of a save that is waited for.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from himix_megatron import parallel
from himix_megatron.checkpoint import Checkpoints, Position
from himix_megatron.config import CheckpointConfig, Config, RunConfig
from himix_megatron.data.plan import START
from himix_megatron.envelope import complete_checkpoints, problems
from himix_megatron.kernels import detect
from himix_megatron.model.himix import build_stage
from himix_megatron.model.vision import build_tower
from himix_megatron.optim import build_optimizer
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import RECIPES
from tools.measure import Line, report

WANTED = 0.1


@dataclass(frozen=True)
class Arguments:
    """What is saved, where, and how often."""

    folder: Path | None = None
    """On the file system to measure; None: where temporary files go."""
    layers: int = 4
    """Of the decoder: about 0.2 GB each, besides 0.35 GB of embeddings."""
    repetitions: int = 5
    """Of each mode and optimizer."""


def sizes(arguments: Arguments, run: Path, *, divided: bool) -> Config:
    """Qwen2-0.5B with a smaller vocabulary, all of it trained, and a small frozen tower."""
    recipe, tiny = RECIPES["qwen2_0_5b_instruct"](), RECIPES["tiny_instruct"]()
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, num_layers=arguments.layers, vocab_size=32768, attention="torch"),
        vision=tiny.vision,
        train=dataclasses.replace(recipe.train, precision="fp32"),
        parallel=dataclasses.replace(recipe.parallel, distributed_optimizer=divided),
        checkpoint=CheckpointConfig(keep_last=1),
        run=RunConfig(dir=str(run)),
    )


def measure(config: Config, repetitions: int) -> tuple[dict[str, list[float]], float]:
    """Seconds for which training stands still, by mode; and the bytes of a checkpoint."""
    topology = parallel.start(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    stages = build_stage(config, detect(), topology, tower)
    optimizer = build_optimizer(config, stages)
    for stage in stages:
        stage.zero_grad_buffer()
    optimizer.step()  # makes AdamW's moments
    modes = {
        mode: dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, mode=mode))
        for mode in ("sync", "async")
    }
    checkpoints = Checkpoints(config, stages, optimizer, tower)
    taken: dict[str, list[float]] = {"sync": [], "async": [], "async, written after": []}
    step = 0
    for number in range(repetitions + 1):
        for mode, of_mode in modes.items():
            step += 1
            checkpoints.config = of_mode
            begun = time.perf_counter()
            stall = checkpoints.save(Position(step=step, place=START, data={}))
            checkpoints.saves.wait()
            if number:  # the first of each is a warm-up
                taken[mode].append(stall)
                if mode == "async":
                    taken["async, written after"].append(time.perf_counter() - begun)
    newest = complete_checkpoints(config.run_dir)[-1]
    assert not problems(newest)
    checkpoints.close()
    parallel.shutdown()
    return taken, float(sum(path.stat().st_size for path in newest.iterdir()))


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench_checkpoint", description=__doc__)
    found = []
    for optimizer, divided in (("undivided", False), ("distributed", True)):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            taken, num_bytes = measure(sizes(arguments, Path(folder) / "run", divided=divided), arguments.repetitions)
        ratio = statistics.median(taken["async"]) / statistics.median(taken["sync"])
        lines = [
            Line(f"stall of a save beside training, over one that is waited for, {optimizer}", ratio, WANTED, at_most=True),
            Line("GB a checkpoint", num_bytes / 1e9, 1.0),
        ]
        title = f"save stall: {arguments.layers} layers of Qwen2-0.5B's widths, fp32, one rank, {optimizer} optimizer"
        report(title, lines, taken)
        found += lines
    return Line.code(found)


if __name__ == "__main__":
    run_main(main)
