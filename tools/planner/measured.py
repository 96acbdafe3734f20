"""The planner beside layouts measured on a CPU: what the machine does, how long real steps take, how well the order agrees.

`measure` times a matrix product, memory traffic, gloo and a layer's least time, on two busy ranks; then a dozen layouts of a
small model through the real training step (megatron-core's schedules, gradient sums, optimizer; made-up inputs), on one, two
and four ranks of one thread each; and writes docs/planner_cpu.json. Flows out of `compared`: measured and predicted seconds of
each layout, and Kendall's tau of the two orders.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from himix_megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    VisionConfig,
)
from tools.planner.layouts import Sample, plan_of
from tools.planner.machine import CPU_FILE, Machine, cpu_machine

TEXT, LABELS, BATCH, STEPS = 96, 48, 8, 6
SAMPLE = Sample(text_tokens=TEXT, longest_text=TEXT, images=1.0, label_share=LABELS / TEXT)
LEAST_TAU = 0.7
"""Of the measured and the predicted order, for the benchmark to pass."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "one rank, full recompute": (1, {"recompute": "full"}),
    "data 2": (2, {}),
    "data 2, full recompute": (2, {"recompute": "full"}),
    "tensor 2": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2, 3 chunks a stage": (2, {"pipeline": 2, "virtual_pipeline": 3}),
    "pipeline 2, 2 micro-batches": (2, {"pipeline": 2, "micro_batch": 4}),
    "pipeline 2, 1 micro-batch": (2, {"pipeline": 2, "micro_batch": 8}),
    "data 4": (4, {}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "tensor 4": (4, {"tensor": 4, "sequence": True}),
    "pipeline 2, data 2, full recompute": (4, {"pipeline": 2, "recompute": "full"}),
}
"""Ranks and settings."""


def settings(recompute: Any = "none", micro_batch: int = 2, **layout: Any) -> Config:
    """6 layers of width 512, 144 vision tokens a sample, all but the tower trains."""
    return Config(
        recipe="measured",
        model=ModelConfig(
            family="qwen2", num_layers=6, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4,
            vocab_size=4096, layer_spec="torch",
        ),
        vision=VisionConfig(
            tower="tiny", image_size=96, patch_size=8, hidden_size=384, num_layers=2, num_attention_heads=4,
            ffn_hidden_size=768,
        ),
        data=DataConfig(features=("made up",), datasets=("made up",), template="tiny", max_text_tokens=TEXT),
        train=TrainConfig(
            trainable_parts=("language", "vision_kv"),
            global_batch_samples=BATCH, micro_batch_samples=micro_batch, precision="fp32",
            recompute=recompute,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        parallel=ParallelConfig(timeout_seconds=120, **layout),
    )  # fmt: skip


# ---- on the ranks ------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], repetitions: int) -> float:
    """The fastest of some, each on its slowest rank, all beginning together: what disturbs a machine only slows it."""
    import torch

    taken = []
    for _ in range(repetitions + 1):
        torch.distributed.barrier()
        begun = time.perf_counter()
        work()
        longest = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
        taken.append(float(longest))
    return min(taken[1:])


def measure_machine(topology: Any, cores: int) -> Machine:
    """Rates of one of two busy ranks."""
    import torch

    product = product_rate()
    numbers, others = torch.randn(4 << 20), torch.randn(4 << 20)
    traffic = 3 * numbers.nbytes / seconds_of(lambda: numbers.add_(others), 9)
    latency, rate = message_rate()
    attention_forward, attention_backward = attention_rates()
    return Machine(
        name="cpu",
        peak_flops=product,
        product_flops=product,
        attention_forward=attention_forward / product,
        attention_backward=attention_backward / product,
        memory_bytes_per_second=traffic,
        link_bytes_per_second=rate,
        network_bytes_per_second=rate,
        latency_seconds=latency,
        layer_seconds=least_layer_seconds(topology),
        node_size=1 << 20,
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        cores=cores,
    )


def product_rate() -> float:
    """FLOP/s of matrix products of the model's sizes, on weights that no cache holds, on every rank at once."""
    import torch

    left, weights = torch.randn(192, 512), [torch.randn(512, 2816) for _ in range(24)]
    return 2 * 192 * 512 * 2816 * len(weights) / seconds_of(lambda: [left @ weight for weight in weights], 9)


def message_rate() -> tuple[float, float]:
    """Seconds of a short collective, and bytes/s of long ones: gathers and scatters, as tensor parallelism has them."""
    import torch
    import torch.distributed as dist

    ranks, taken = dist.get_world_size(), []
    sizes = (64 * ranks, 1 << 20)
    for size in sizes:
        whole, share = torch.randn(size), torch.empty(size // ranks)

        def there_and_back(whole: torch.Tensor = whole, share: torch.Tensor = share) -> None:
            for _ in range(5):
                dist.reduce_scatter_tensor(share, whole)
                dist.all_gather_into_tensor(whole, share)

        taken.append(seconds_of(there_and_back, 9) / 5)
    return taken[0] / 2, 2 * 4 * sizes[1] * (ranks - 1) / ranks / max(taken[1] - taken[0], 1e-6)


def attention_rates() -> tuple[float, float]:
    """FLOP/s of torch's attention on a sample's text over its vision, forward, and backward as the cost model counts it."""
    import torch

    query, key, value = (torch.randn(2, 8, length, 64, requires_grad=True) for length in (TEXT, 240, 240))
    flops = 4.0 * 2 * 8 * TEXT * 240 * 64
    mix = torch.nn.functional.scaled_dot_product_attention

    def both() -> None:
        for _ in range(10):
            mix(query, key, value).sum().backward()

    with torch.no_grad():
        forward = seconds_of(lambda: [mix(query, key, value) for _ in range(10)], 9) / 10
    return flops / forward, 2.5 * flops / max(seconds_of(both, 9) / 10 - forward, 1e-9)


def least_layer_seconds(topology: Any) -> float:
    """Of a pass in one direction, where there is next to nothing to compute: layers of width 32, less the rest of the model."""
    from himix_megatron.model.schedule import run_losses

    taken: list[float] = []
    for layers in (2, 8):
        config = settings(micro_batch=BATCH // 2)
        small = replace(
            config.model,
            num_layers=layers,
            hidden_size=32,
            ffn_hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=128,
        )
        stages, _, inputs = built(replace(config, model=small), topology, length=8)
        taken.append(seconds_of(partial(run_losses, stages, inputs[:1], forward_only=False), 9))
    return (taken[1] - taken[0]) / 12


def built(config: Config, topology: Any, length: int = TEXT) -> tuple[Any, Any, list[Any]]:
    """Model chunks, optimizer and the inputs of this rank's micro-batches."""
    import torch

    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.model.himix_model import build_stage, finalize_gradients
    from himix_megatron.model.stage_input import StageInput
    from himix_megatron.training.optimizer import build_optimizer

    stages = build_stage(config, detect(), topology, torch.nn.Identity())
    optimizer = build_optimizer(config, stages)
    stages[0].config.finalize_model_grads_func = finalize_gradients
    inputs, samples = [], config.micro_batch
    for _ in range(config.global_batch // (topology.data_size * samples)):
        ids = torch.randint(config.model.vocab_size, (samples, length))
        labels = torch.full_like(ids, -100)
        labels[:, length // 2 :] = ids[:, length // 2 :]
        features = torch.randn(samples, config.vision.tokens_per_image, config.vision.hidden_size)
        blank = torch.zeros(samples, dtype=torch.bool)
        inputs.append(StageInput(ids, features, blank, (1,) * samples, labels=labels))
    return stages, optimizer, inputs


def measure_layout(config: Config) -> float:
    """Seconds of a training step."""
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.schedule import run_losses

    stages, optimizer, inputs = built(config, init_distributed(config.parallel, seed=0))

    def step() -> None:
        for stage in stages:
            stage.zero_grad_buffer()
        optimizer.zero_grad()
        run_losses(stages, inputs, forward_only=False)
        optimizer.step()

    taken = seconds_of(step, STEPS)
    shutdown_distributed()
    return taken


def work(folder: Path) -> None:
    """A rank: its tasks are in a file; rank 0 writes what was found."""
    import torch

    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed

    torch.set_num_threads(1)
    task = json.loads((folder / "task.json").read_text())
    found: dict[str, Any] = {}
    for name, port in task["ports"].items():
        os.environ["MASTER_PORT"] = str(port)
        if name == "machine":
            topology = init_distributed(ParallelConfig(), seed=0)
            found[name] = asdict(measure_machine(topology, task["cores"]))
            shutdown_distributed()
        elif name == "alone":
            init_distributed(ParallelConfig(), seed=0)
            found[name] = product_rate()
            shutdown_distributed()
        else:
            found[name] = measure_layout(settings(**LAYOUTS[name][1]))
    if os.environ["RANK"] == "0":
        (folder / "found.json").write_text(json.dumps(found))


# ---- around them -------------------------------------------------------------------------------------------------------


def launch(size: int, names: list[str], folder: Path, cores: int) -> dict[str, Any]:
    """Run `work` on so many ranks. Raises: RuntimeError where a rank fails."""
    (folder / "task.json").write_text(json.dumps({"ports": {name: _free_port() for name in names}, "cores": cores}))
    ranks = []
    for rank in range(size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": 0}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}}
        command = [sys.executable, "-m", "tools.planner.measured", str(folder)]
        ranks.append(subprocess.Popen(command, env=env))
    try:
        codes = [rank.wait(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        raise RuntimeError(f"ranks left with {codes}")
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def measure(say: Callable[[str], None], file: Path = CPU_FILE) -> bool:
    """Measure the machine and all layouts, and write the file. Returns: whether they are ordered as predicted."""
    import tempfile

    import torch

    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (2, 1, 4):
            names = [
                *{1: ["alone"], 2: ["machine"]}.get(size, []),
                *(name for name, (ranks, _) in LAYOUTS.items() if ranks == size),
            ]
            found |= launch(size, names, Path(folder), cores)
            for name in names:
                if name in LAYOUTS:
                    say(f"{name}: {found[name]:.3f} s a step")
    conditions = f"torch {torch.__version__}, Python {platform.python_version()}, {cores} cores, load {load:.1f} at the start"
    found["machine"]["alone"] = max(1.0, found["alone"] / found["machine"]["product_flops"])
    machine = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.pop("machine").items()}
    seconds = {name: round(found[name], 4) for name in LAYOUTS}
    file.write_text(json.dumps({"conditions": conditions, "machine": machine, "seconds": seconds}, indent=2) + "\n")
    say(f"written: {file}")
    for line in compared(file):
        say(line)
    return tau_of(file) >= LEAST_TAU


def predicted(machine: Machine) -> dict[str, float]:
    """Seconds of a step of each layout, by the planner's model."""
    found = {}
    for name, (ranks, options) in LAYOUTS.items():
        config = settings(**options)
        data_size = ranks // (config.parallel.tensor * config.parallel.pipeline)
        found[name] = plan_of(config, machine, data_size, SAMPLE).seconds
    return found


def kendall(left: list[float], right: list[float]) -> float:
    """Kendall's tau: pairs in the same order less those in the other, of all pairs (those equal in one count for neither)."""
    pairs = list(itertools.combinations(zip(left, right, strict=True), 2))
    signs = [((a - c) * (b - d) > 0) - ((a - c) * (b - d) < 0) for (a, b), (c, d) in pairs]
    return sum(signs) / len(pairs)


def tau_of(file: Path = CPU_FILE) -> float:
    """How well the measured order is the predicted one."""
    measured: dict[str, float] = json.loads(file.read_text())["seconds"]
    expected = predicted(cpu_machine(file))
    return kendall(list(measured.values()), [expected[name] for name in measured])


def compared(file: Path = CPU_FILE) -> Iterator[str]:
    """Measured and predicted, fastest first as measured."""
    machine = cpu_machine(file)
    recorded = json.loads(file.read_text())
    measured, expected = recorded["seconds"], predicted(machine)
    rates = f"{machine.product_flops / 1e9:.1f} GFLOP/s a core, gloo {machine.link_bytes_per_second / 1e9:.2f} GB/s"
    yield f"{recorded['conditions']}; {rates}"
    yield f"{'layout':<38}{'ranks':>6}{'measured':>11}{'predicted':>11}{'ratio':>7}"
    for name in sorted(measured, key=measured.__getitem__):
        own, said = measured[name], expected[name]
        yield f"{name:<38}{LAYOUTS[name][0]:>6}{own:>9.3f} s{said:>9.3f} s{said / own:>7.2f}"
    yield f"Kendall's tau of {len(measured)} layouts: {tau_of(file):.2f} (wanted: {LEAST_TAU} or more)"


if __name__ == "__main__":
    work(Path(sys.argv[1]))
