"""A whole decoder through the training step: time, and model FLOP/s against the chip's peak (MFU), with and without the tower.

A part of `tools.bench_model`, made for one GPU (all layers, packed, bf16, gradients summed in fp32); the same program runs on
a CPU in the recipe's precision with small sizes. Measured is forward and backward through megatron-core's schedule, embedding
and head included, with CUDA events; where asked for, the optimizer's step, and the tower on the packs' images, beside it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from himix_megatron import parallel
from himix_megatron.config import Config
from himix_megatron.devices import device_of
from himix_megatron.flops import Work, step_flops, tower_flops
from pipelines.recipes import RECIPES
from tools.bench_model import Arguments
from tools.measure import Line, product, report, take_turns

WANTED_MFU = {"llama3_2_3b": 0.45, "vicuna_7b": 0.45}
"""Of the decoder alone, by family, on a GPU whose peak is known."""


def configuration(arguments: Arguments) -> Config:
    """The recipe on one rank, packed."""
    config = RECIPES[arguments.recipe]()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=arguments.layers or config.model.num_layers),
        data=dataclasses.replace(
            config.data, pack_text_tokens=arguments.pack_text_tokens, pack_images=arguments.pack_images,
            max_text_tokens=min(config.data.max_text_tokens, arguments.pack_text_tokens),
        ),
        train=dataclasses.replace(config.train, global_batch_samples=None, global_batch_packs=arguments.packs),
        parallel=dataclasses.replace(config.parallel, tensor=1, pipeline=1, virtual_pipeline=1, sequence=False, overlap="off"),
    )  # fmt: skip


def lengths_of(arguments: Arguments, seed: int) -> list[int]:
    """Text lengths that fill a pack: one for each image, log-normal around their share."""
    drawn = np.random.default_rng(seed).lognormal(0.0, 0.5, arguments.pack_images)
    lengths = np.maximum(1, np.floor(drawn / drawn.sum() * arguments.pack_text_tokens)).astype(int)
    return [int(length) for length in lengths]


def inputs_of(arguments: Arguments, config: Config, features: torch.Tensor) -> list[Any]:
    """A step's packs; the second half of every text is its answer."""
    from himix_megatron.step import StageInput

    device, count, inputs = features.device, arguments.pack_images, []
    for pack in range(arguments.packs):
        lengths = lengths_of(arguments, pack)
        ids = torch.randint(config.model.vocab_size, (1, arguments.pack_text_tokens), device=device)
        labels, end = torch.full_like(ids, -100), 0
        for length in lengths:
            labels[0, end + length // 2 : end + length - 1] = ids[0, end + length // 2 + 1 : end + length]
            end += length
        blank = torch.zeros(count, dtype=torch.bool, device=device)
        own = features[pack * count : (pack + 1) * count]
        inputs.append(StageInput(ids, own, blank, (1,) * count, labels=labels, packed_lengths=tuple(lengths)))
    return inputs


def training(arguments: Arguments) -> list[Line]:
    """Measure, print and return the lines."""
    from himix_megatron.adapter import params_dtype
    from himix_megatron.kernels import detect
    from himix_megatron.model.himix import build_stage, finalize_gradients
    from himix_megatron.model.vision import build_tower
    from himix_megatron.optim import build_optimizer
    from himix_megatron.step import run_losses

    config = configuration(arguments)
    torch.set_num_threads(arguments.threads)
    topology = parallel.start(config.parallel, seed=0)
    stages = build_stage(config, detect(), topology, torch.nn.Identity())
    stages[0].config.finalize_model_grads_func = finalize_gradients
    dtype, vision, images = params_dtype(config), config.vision, arguments.packs * arguments.pack_images
    features = torch.randn(images, vision.tokens_per_image, vision.hidden_size, dtype=dtype, device=topology.device)
    inputs = inputs_of(arguments, config, features)

    def decoder() -> None:
        stages[0].zero_grad_buffer()
        run_losses(stages, inputs, forward_only=False)

    steps: dict[str, Callable[[], object]] = {"decoder": decoder}
    if not torch.cuda.is_available():
        steps["product"] = product()
    if arguments.tower:
        steps["tower"] = tower_step(
            build_tower(dataclasses.replace(vision, path=None), seed=0, dtype=dtype), images, config, topology
        )
    if arguments.optimizer:
        optimizer = build_optimizer(config, stages)
        steps["optimizer"] = optimizer.step
    seconds = take_turns(steps, arguments.repetitions)
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    parallel.shutdown()
    lines = lines_of(arguments, config, inputs, seconds)
    kernels = "te" if detect().transformer_engine and config.model.attention != "torch" else "torch"
    title = f"training: {config.recipe}, {config.model.num_layers} layers, {config.train.precision}, {kernels}, parts "
    title += f"{' '.join(config.train.parts)}, {arguments.packs} packs of {arguments.pack_text_tokens} text tokens and "
    title += f"{arguments.pack_images} images, {device_name()}{memory}"
    report(title, lines, seconds)
    return lines


def tower_step(tower: Any, images: int, config: Config, topology: parallel.Topology) -> Callable[[], object]:
    """The frozen tower over a step's images, in batches of at most 64."""
    tower = tower.to(topology.device)
    size = config.vision.image_size
    pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=topology.device)
    blank = torch.zeros(images, dtype=torch.bool, device=topology.device)

    @torch.no_grad()
    def step() -> None:
        for first in range(0, images, 64):
            tower(pixels[first : first + 64], blank[first : first + 64])

    return step


def device_name() -> str:
    """The accelerator, or the CPU and its threads."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def peak_flops(arguments: Arguments, seconds: dict[str, list[float]]) -> tuple[float, str, bool]:
    """The machine's dense peak in FLOP/s, where that number is from, and whether lines may be held to it."""
    if arguments.peak_tflops is not None:
        return arguments.peak_tflops * 1e12, "as given", True
    if not torch.cuda.is_available():
        return 2 * 2048**3 / statistics.median(seconds["product"]), "the median 2048^3 product", False
    found = device_of(torch.cuda.get_device_name())
    if found is None:
        raise ValueError(f"no peak is known for {torch.cuda.get_device_name()}: give --peak-tflops")
    return found.bf16_flops, "NVIDIA's data sheet", True


def lines_of(arguments: Arguments, config: Config, inputs: list[Any], seconds: dict[str, list[float]]) -> list[Line]:
    """MFU of the decoder, and of the whole step."""
    peak, source, known = peak_flops(arguments, seconds)
    time = {name: statistics.median(taken) for name, taken in seconds.items()}
    texts = [length for given in inputs for length in given.packed_lengths]
    visions = [config.vision.tokens_per_image] * len(texts)
    answers = sum(int((given.labels >= 0).sum()) for given in inputs)
    needed = step_flops(config, Work.of(texts, visions, head_tokens=answers, causal=False)).language
    family = config.recipe.rsplit("_", 1)[0]
    wanted = WANTED_MFU.get(family) if known else None
    lines = [
        Line(
            f"decoder's MFU, forward and backward, peak {peak / 1e12:.4g} TFLOP/s ({source})",
            needed / time["decoder"] / peak,
            wanted,
        )
    ]
    if "tower" in time:
        with_tower = needed + tower_flops(config.vision) * len(texts)
        lines.append(Line("MFU with the tower", with_tower / (time["decoder"] + time["tower"]) / peak))
    if "optimizer" in time:
        lines.append(
            Line("optimizer's share of the step without the tower", time["optimizer"] / (time["decoder"] + time["optimizer"]))
        )
    lines.append(Line("real text tokens a second, decoder alone", sum(texts) / time["decoder"]))
    return lines
