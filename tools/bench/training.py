"""A whole decoder through the training step: time, and model FLOP/s against the chip's peak (MFU), with and without the tower.

A part of `tools.bench.decoder`, made for one GPU (all layers, packed, bf16, gradients summed in fp32); the same program runs on
a CPU in the recipe's precision with small sizes. Measured is forward and backward through megatron-core's schedule, embedding
and head included, with CUDA events; where asked for, the optimizer's step, and the tower on the packs' images, beside it.

`Packs` and `Decoder` are what `tools.gpu_check` measures with too: the same model with the images beside the text, or
concatenated, each image's tokens in front of its text.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from himix_megatron.config import Config
from himix_megatron.costs.flops import Work, image_flops, step_flops
from himix_megatron.costs.hardware import device_of
from himix_megatron.distributed.topology import Topology, init_distributed, shutdown_distributed
from pipelines.cli import load_recipe
from tools.bench.decoder_setup import Arguments
from tools.bench.measure import Line, product, report, seconds_of, take_turns

WANTED_MFU = {"qwen2_0_5b": 0.30, "llama3_2_1b": 0.40, "llama3_2_3b": 0.48, "vicuna_7b": 0.50}
"""Least MFU of the decoder alone, by family, at packs of 8,192 text tokens (7B: 4,096) on a GPU whose peak is known."""
SIGMA = 0.5
"""Sigma of the texts' log-normal lengths."""
ROW_MULTIPLE = 128
"""Concatenated rows are padded to a multiple of this: a row's length is what kernels are chosen by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packs:
    """The samples of a step, each with one image; the second half of each text is its answer."""

    text_lengths: tuple[tuple[int, ...], ...]
    """Text tokens of each sample, by pack."""
    row_tokens: int
    """Tokens of a pack's row, padding included."""
    tokens_per_image: int
    images: Literal["beside", "inside"] = "beside"
    """HiMix; or concatenation, where each image's tokens go through the layers in front of its text."""

    @staticmethod
    def of(text_tokens: int, samples: int, packs: int, tokens_per_image: int) -> Packs:
        """Packs of this many text tokens and samples each, with log-normal lengths."""
        lengths = tuple(lengths_of(text_tokens, samples, seed) for seed in range(packs))
        return Packs(text_lengths=lengths, row_tokens=text_tokens, tokens_per_image=tokens_per_image)

    def concatenated(self) -> Packs:
        """The same samples with the images inside the text."""
        longest = max(sum(pack) + len(pack) * self.tokens_per_image for pack in self.text_lengths)
        return dataclasses.replace(self, images="inside", row_tokens=-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE)

    @property
    def samples(self) -> int:
        """Samples of the step."""
        return sum(len(pack) for pack in self.text_lengths)

    @property
    def text_tokens(self) -> int:
        """Real text tokens of the step, without the images' places."""
        return sum(sum(pack) for pack in self.text_lengths)

    def work(self) -> Work:
        """What the step needs, attention causal."""
        texts = [length for pack in self.text_lengths for length in pack]
        count = Work.concatenated if self.images == "inside" else Work.of
        answers = sum(_answer(length)[1] - _answer(length)[0] for length in texts)
        return count(texts, [self.tokens_per_image] * len(texts), head_tokens=answers)

    def flops(self, config: Config) -> float:
        """Model FLOPs of the step, without the tower."""
        return step_flops(config, self.work()).language


def _answer(length: int) -> tuple[int, int]:
    """Places of a text that have a label: its second half, each the next token's."""
    return length // 2, max(length // 2, length - 1)


def lengths_of(text_tokens: int, samples: int, seed: int) -> tuple[int, ...]:
    """Text lengths that fill a pack, log-normal around their share."""
    drawn = np.random.default_rng(seed).lognormal(0.0, SIGMA, samples)
    lengths = np.maximum(1, np.floor(drawn / drawn.sum() * text_tokens)).astype(int)
    return tuple(int(length) for length in lengths)


def step_batch(packs: Packs, vocab_size: int) -> Any:
    """A step's texts, made up, as the loader would hand them to training. Images inside the text are random ids without a
    label."""
    from himix_megatron.data.loading.batch import NO_LOSS, MicroBatch, StepBatch
    from himix_megatron.data.loading.image_table import ImageTable
    from himix_megatron.data.loading.plan import START

    micro_batches, inside = [], packs.tokens_per_image if packs.images == "inside" else 0
    for lengths in packs.text_lengths:
        ids = torch.randint(vocab_size, (1, packs.row_tokens))
        labels, begin = torch.full_like(ids, NO_LOSS), 0
        for length in lengths:
            first, last = (begin + inside + place for place in _answer(length))
            labels[0, first:last] = ids[0, first + 1 : last + 1]
            begin += inside + length
        own = torch.tensor(lengths) + inside
        images = ImageTable.of_features([[] if inside else [packs.tokens_per_image]] * len(lengths))
        micro_batches.append(MicroBatch(ids, labels, own, images, ("made up",) * len(lengths), packed=True))
    count = 0 if inside else packs.samples
    return StepBatch(
        step=0, micro_batches=tuple(micro_batches), blank=torch.zeros(count, dtype=torch.bool), pixels=torch.empty(0),
        bad_keys=(), after=START, is_last=False, num_samples=packs.samples,
    )  # fmt: skip


def inputs_of(packs: Packs, config: Config, device: torch.device) -> list[Any]:
    """A step's micro-batches, one a pack, with made-up features, put on the device as training does."""
    from himix_megatron.distributed.megatron_config import params_dtype
    from himix_megatron.model.stage_input import stage_inputs

    batch = step_batch(packs, config.model.vocab_size)
    shape = (sum(batch.images.tokens), config.vision.feature_width)
    return stage_inputs(batch, torch.randn(shape, dtype=params_dtype(config), device=device), config, device)


class Decoder:
    """A model with random weights on this process's device, and its training step through megatron-core's schedule."""

    def __init__(self, config: Config, topology: Topology):
        from himix_megatron.distributed.fused_kernels import detect
        from himix_megatron.model.himix_model import build_model_chunks, finalize_gradients
        from himix_megatron.model.micro_batch_graphs import MicroBatchGraphs

        self.config, self.device = config, topology.device
        self.model_chunks = build_model_chunks(config, detect(), topology, torch.nn.Identity())
        self.model_chunks[0].config.finalize_model_grads_func = finalize_gradients
        self.graphs = MicroBatchGraphs(config, self.model_chunks[0]) if config.train.cuda_graphs == "on" else None

    def step_on(self, packs: Packs) -> Callable[[], None]:
        """Forward and backward of a step, gradients zeroed before and finished after; no optimizer."""
        from himix_megatron.model.schedule import run_losses

        inputs = inputs_of(packs, self.config, self.device)

        def step() -> None:
            self.model_chunks[0].zero_grad_buffer()
            run_losses(self.model_chunks, inputs, forward_only=False, graphs=self.graphs)

        return step

    def seconds(self, packs: Packs, repetitions: int = 5, warm: int = 3) -> float:
        """Median seconds of a step. `warm`: steps before that are not counted."""
        step = self.step_on(packs)
        for _ in range(warm):
            step()
        return statistics.median(seconds_of(step) for _ in range(repetitions))

    def optimizer_step(self) -> Callable[[], object]:
        """The optimizer's step over the gradients as they are; its states exist from now on."""
        from himix_megatron.training.optimizer import build_optimizer

        step: Callable[[], object] = build_optimizer(self.config, self.model_chunks).step
        return step


def packed(config: Config, *, text_tokens: int, images: int, packs: int) -> Config:
    """The configuration on one rank, with packs of so many text tokens and largest images, and features instead of a tower."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, pack_max_text_tokens=text_tokens, pack_max_vision_tokens=images * config.vision.max_tokens_per_image,
            datasets=("made up",), features=("made up",), max_text_tokens=min(config.data.max_text_tokens, text_tokens),
        ),
        train=dataclasses.replace(config.train, global_batch_samples=None, global_batch_packs=packs),
        parallel=dataclasses.replace(config.parallel, tensor=1, pipeline=1, virtual_pipeline=1, sequence=False, overlap="off"),
    )  # fmt: skip


def configuration(arguments: Arguments) -> Config:
    """The recipe on one rank, packed."""
    config = load_recipe(arguments.recipe)()
    layers = arguments.layers or config.model.num_layers
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_layers=layers, layer_spec=arguments.layer_spec),
        train=dataclasses.replace(config.train, fp8=arguments.fp8, recompute=arguments.recompute),
    )
    config = packed(config, text_tokens=arguments.pack_max_text_tokens, images=arguments.images_per_pack, packs=arguments.packs)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, cuda_graphs=arguments.cuda_graphs))


def training(arguments: Arguments) -> list[Line]:
    """Measure, print and return the lines."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.megatron_config import check_fp8, check_graphs, chosen_layer_spec, params_dtype
    from himix_megatron.model.towers import build_tower

    config, kernels = configuration(arguments), detect()
    check_fp8(config, kernels)
    check_graphs(config, kernels)
    torch.set_num_threads(arguments.threads)
    topology = init_distributed(config.parallel, seed=0)
    decoder, vision = Decoder(config, topology), config.vision
    packs = Packs.of(arguments.pack_max_text_tokens, arguments.images_per_pack, arguments.packs, vision.max_tokens_per_image)
    steps: dict[str, Callable[[], object]] = {"decoder": decoder.step_on(packs)}
    if not torch.cuda.is_available():
        steps["product"] = product()
    if arguments.tower:
        tower = build_tower(dataclasses.replace(vision, path=None), seed=0, dtype=params_dtype(config))
        steps["tower"] = tower_step(tower, packs.samples, config, topology.device)
    if arguments.optimizer:
        steps["optimizer"] = decoder.optimizer_step()
    seconds = take_turns(steps, arguments.repetitions)
    memory = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    shutdown_distributed()
    lines = lines_of(arguments, config, packs, seconds)
    title = f"training: {config.recipe}, {config.model.num_layers} layers, {config.train.precision}, fp8 {config.train.fp8}, "
    title += (
        f"{chosen_layer_spec(config.model, kernels)}, recompute {config.train.recompute}, graphs {config.train.cuda_graphs}, "
    )
    title += f"parts {' '.join(config.train.trainable_parts)}, "
    title += f"{arguments.packs} packs of {arguments.pack_max_text_tokens} text tokens "
    title += f"and {arguments.images_per_pack} images, {device_name()}{memory}"
    report(title, lines, seconds)
    return lines


def tower_step(tower: Any, images: int, config: Config, device: torch.device) -> Callable[[], object]:
    """The frozen tower on so many of its largest images, in batches as training encodes them."""
    from himix_megatron.data.loading.image_table import ImageTable, blank_pixels
    from himix_megatron.distributed.megatron_config import params_dtype
    from himix_megatron.model.vision_encoder import ShardedVisionEncoder

    vision = config.vision
    table = ImageTable.of(vision, [[vision.blank_size]] * images)
    pixels, blank = blank_pixels(table, vision).to(device), torch.zeros(images, dtype=torch.bool, device=device)
    encoder = ShardedVisionEncoder(tower.to(device).requires_grad_(False), None, False, params_dtype(config))
    return lambda: encoder.encode(pixels, blank, table)


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


def lines_of(arguments: Arguments, config: Config, packs: Packs, seconds: dict[str, list[float]]) -> list[Line]:
    """MFU of the decoder, and of the whole step."""
    peak, source, known = peak_flops(arguments, seconds)
    time = {name: statistics.median(taken) for name, taken in seconds.items()}
    needed = packs.flops(config)
    # What is wanted is wanted of a whole model in bf16 whose packs are as large as they should be.
    as_wanted = arguments.layers is None and arguments.pack_max_text_tokens >= 4096 and config.train.fp8 == "none"
    wanted = WANTED_MFU.get(config.recipe.rsplit("_", 1)[0]) if known and as_wanted else None
    what = f"decoder's MFU, forward and backward, peak {peak / 1e12:.4g} TFLOP/s ({source})"
    lines = [Line(what, needed / time["decoder"] / peak, wanted)]
    if "tower" in time:
        with_tower = needed + image_flops(config.vision, config.vision.max_patches_per_image) * packs.samples
        lines.append(Line("MFU with the tower", with_tower / (time["decoder"] + time["tower"]) / peak))
    if "optimizer" in time:
        share = time["optimizer"] / (time["decoder"] + time["optimizer"])
        lines.append(Line("optimizer's share of the step without the tower", share))
    lines.append(Line("real text tokens a second, decoder alone", packs.text_tokens / time["decoder"]))
    return lines
