"""How evenly do pipeline stages work when the tower costs as much as the decoder?

    python -m tools.bench.pipeline

Real training steps on CPU ranks of one thread each, on rendered scenes: reading, decoding, tower, decoder, optimizer. The tower
is sized so that its forward pass takes the CPU time of the decoder's forward and backward pass over all stages. For each
placement of the tower it reports the CPU time of the slowest rank over that of the fastest, and the step time; for comparison
also the step time with cached features. Exit code 1 if the sharded tower's ratio is above 1.10, or if the losses of two
placements differ.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from himix_megatron.config import Config, Count, ParallelConfig, RunConfig, read_config, to_json
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import RECIPES
from tools.bench.measure import take_turns

MOST = 1.10
"""Largest ratio of the slowest rank's CPU time to the fastest's, with the sharded tower."""
SAME_LOSS = 1e-5
NEAR = 0.05
"""Relative difference of the tower's CPU time to the decoder's, at which sizing stops."""
PLACEMENTS = ("replica_sharded", "replicated", "first_stage")
CACHED = "cached features"
WORKER = "--worker"
"""How a process of the benchmark starts its ranks."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare where the tower may run: how evenly ranks work, and how long a step takes."""

    stages: tuple[int, ...] = (2, 4)
    """Pipeline sizes, one rank a stage."""
    steps: Count = 12
    """Counted steps, after one uncounted one."""
    samples: Count = 16
    """Samples of a step, in micro-batches of 2, each with one image."""
    layers: Count = 16
    """Decoder layers."""
    hidden: Count = 256
    """Width of decoder and tower."""

    def __post_init__(self) -> None:
        for size in self.stages:
            if self.layers % size or self.samples % (2 * size):
                raise ValueError(f"--stages {size}: --layers and half of --samples must be multiples of it")


def settings(arguments: Arguments, data: Path, folder: Path) -> Config:
    """One rank; `calibrate` finds the width of the tower's MLP."""
    tiny, hidden, samples = RECIPES["tiny_instruct"](), arguments.hidden, arguments.samples
    model = {"num_layers": arguments.layers, "hidden_size": hidden, "ffn_hidden_size": 3 * hidden, "vocab_size": 1024}
    return replace(
        tiny,
        recipe="bench_pipeline",
        model=replace(tiny.model, **model, layer_spec="torch"),
        vision=replace(tiny.vision, image_size=96, hidden_size=hidden, num_layers=8, ffn_hidden_size=4 * hidden),
        data=replace(tiny.data, datasets=(str(data),)),
        train=replace(tiny.train, steps=arguments.steps + 1, global_batch_samples=samples, micro_batch_samples=2),
        run=RunConfig(dir=str(folder / "run")),
    )


# ---- on the ranks ------------------------------------------------------------------------------------------------------


def calibrate(config: Config) -> dict[str, Any]:
    """One rank: the width of the tower's MLP at which its forward pass costs as much CPU time as the decoder's passes."""
    from himix_megatron.model.towers import build_tower
    from himix_megatron.training import builder, train_step
    from himix_megatron.training.data_setup import prepare_inputs, step_reader

    start = prepare_inputs(config, 1)
    topology = init_distributed(config.parallel, seed=config.train.seed)
    run = builder.build_components(config, start, topology)
    reader = step_reader(config, start.plan, topology)
    batch = reader[next(start.plan.steps(start.length))]
    images, sizes = run.encoder.encode(batch.pixels, batch.blank, batch.images), batch.images.sizes

    def decoder() -> None:
        train_step.run_schedule(run, batch, images, forward_only=False)

    def tower(width: int) -> Callable[[], object]:
        built = build_tower(replace(config.vision, ffn_hidden_size=width), seed=0, dtype=torch.float32)
        return torch.no_grad()(lambda: built.features(batch.pixels, batch.blank, sizes))

    width = 4 * config.vision.hidden_size
    for attempts_left in range(4, -1, -1):
        pieces = {"decoder": decoder, "tower": tower(width), "wider tower": tower(2 * width)}
        taken = take_turns(pieces, repetitions=5, measure=cpu_seconds)
        decoder_seconds, tower_seconds, wider = map(statistics.median, taken.values())
        if abs(tower_seconds / decoder_seconds - 1) <= NEAR or not attempts_left:
            break
        # Its cost is nearly a straight line in the width.
        width = max(16, round((width + width * (decoder_seconds - tower_seconds) / (wider - tower_seconds)) / 16) * 16)
    return {"width": width, "decoder_seconds": decoder_seconds, "tower_seconds": tower_seconds}


def cpu_seconds(piece: Callable[[], object]) -> float:
    """CPU time of this process for a piece of work."""
    begun = time.process_time()
    piece()
    return time.process_time() - begun


def measure(config: Config, topology: Topology) -> dict[str, Any]:
    """Train. Returns: CPU and wall seconds of each rank's median step, and the losses."""
    from himix_megatron.data.loading.loader import step_loader
    from himix_megatron.resilience.loss_guard import UPDATE
    from himix_megatron.training import builder, train_step
    from himix_megatron.training.data_setup import prepare_inputs, step_reader

    start = prepare_inputs(config, topology.data_size)
    run = builder.build_components(config, start, topology)
    reader = step_reader(config, start.plan, topology, start.features)
    losses, clocks = [], []
    for batch, images in train_step.with_features(run, step_loader(reader, start.plan.steps(start.length), 0)):
        counts, _, _ = train_step.train_step(config, run, batch, images, lambda *_: UPDATE)
        losses.append(counts.loss)
        clocks.append((time.process_time(), time.perf_counter()))
    run.prefetcher.drain()
    # The first step warmed up. Medians: four ranks on two cores are disturbed now and then.
    own = tuple(statistics.median(after - before for before, after in pairwise(clock)) for clock in zip(*clocks, strict=True))
    ranks: list[Any] = [None] * topology.world_size
    torch.distributed.all_gather_object(ranks, own)
    return {"cpu": [cpu for cpu, _ in ranks], "wall": max(wall for _, wall in ranks), "losses": losses}


def work(folder: Path) -> None:
    """A rank of a run: reads its settings from a file, and writes what it measured to another."""
    torch.set_num_threads(1)
    config = read_config(folder / "config.json")
    if config.parallel.pipeline == 1:
        report = calibrate(config)
    else:
        topology = init_distributed(config.parallel, seed=config.train.seed)
        report = {name: measure(changed, topology) for name, changed in variants(config, folder)}
    if torch.distributed.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    shutdown_distributed()


def variants(config: Config, folder: Path) -> Iterator[tuple[str, Config]]:
    """The settings to compare."""
    for encoder_placement in PLACEMENTS:
        yield encoder_placement, replace(config, vision=replace(config.vision, encoder_placement=encoder_placement))
    yield CACHED, replace(config, data=replace(config.data, features=(str(folder / "features"),)))


# ---- around them -------------------------------------------------------------------------------------------------------


def torchrun(size: int, folder: Path) -> None:
    """Run `work` on this many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *launcher, "-m", "tools.bench.pipeline", WORKER, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "LOGLEVEL": "ERROR"})


def bench(
    arguments: Arguments, folder: Path, say: Callable[[str], None], start: Callable[[int, Path], None] = torchrun
) -> bool:
    """Measure and report. Returns: whether the lines were met."""
    from pipelines.encode import Settings, encode
    from pipelines.scenes import SceneSettings, ensure_scene_data

    def launch(config: Config) -> dict[str, Any]:
        (folder / "config.json").write_text(to_json(config))
        start(config.parallel.pipeline, folder)
        found: dict[str, Any] = json.loads((folder / "report.json").read_text())
        return found

    scenes = SceneSettings(num_train=arguments.samples * (arguments.steps + 1), num_heldout=8)
    config = settings(arguments, ensure_scene_data(folder / "scenes", scenes) / "instruct", folder)
    sized = launch(config)
    config = replace(config, vision=replace(config.vision, ffn_hidden_size=sized["width"]))
    encode(config, Settings(out=folder / "features", engine="local"))
    taken = {size: launch(replace(config, parallel=ParallelConfig(pipeline=size))) for size in arguments.stages}
    return report(arguments, sized, taken, say)


def report(arguments: Arguments, sized: dict[str, Any], taken: dict[int, Any], say: Callable[[str], None]) -> bool:
    """Ratios first. Returns: whether the lines were met."""
    met = True
    for size, found in taken.items():
        shared = found["replica_sharded"]
        ratio = max(shared["cpu"]) / min(shared["cpu"])
        spread = max(abs(a - b) for p in PLACEMENTS for a, b in zip(found[p]["losses"], shared["losses"], strict=True))
        met = met and ratio <= MOST and spread <= SAME_LOSS
        say(
            f"{size} stages: slowest over fastest rank {ratio:.3f} with the shared tower (at most {MOST:.2f}); losses of the "
            f"placements differ by {spread:.1e} (at most {SAME_LOSS:.0e}); online encoding over cached features: step time "
            f"{shared['wall'] / found[CACHED]['wall']:.2f}"
        )
    say(
        f"{arguments.layers} layers of width {arguments.hidden}, vocabulary 1024, {arguments.samples} samples a step, "
        f"{arguments.steps} steps, 1 thread a rank, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; tower forward over "
        f"decoder forward + backward {sized['tower_seconds'] / sized['decoder_seconds']:.2f} (CPU time)"
    )
    say(f"{'seconds a step':<34}{'slowest/fastest':>16}{'slowest CPU':>13}{'all CPU':>9}{'wall':>7}   CPU by rank")
    for size, found in taken.items():
        for name, values in found.items():
            cpu = values["cpu"]
            say(
                f"{f'{size} stages, {name}':<34}{max(cpu) / min(cpu):>16.3f}{max(cpu):>13.2f}{sum(cpu):>9.2f}"
                f"{values['wall']:>7.2f}   {' '.join(f'{one:.2f}' for one in cpu)}"
            )
    return met


def main() -> int:
    if sys.argv[1:2] == [WORKER]:
        work(Path(sys.argv[2]))
        return 0
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.pipeline")
    with tempfile.TemporaryDirectory() as folder:
        return 0 if bench(arguments, Path(folder), print) else 1


if __name__ == "__main__":
    run_main(main)
