"""How fast a decoder trains on one GPU: MFU, beside concatenation, memory and time beside what the planner says.

Flows in: a Context; out: lines, OUT/machine.json (rates for `tools.plan --machine-file`) and OUT/profiles.txt. All runs in one
process, a model at a time; what one check measured, later ones use. Without a GPU the sizes are tiny and the layers torch's: no
claim.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from himix_megatron.config import Config
from himix_megatron.costs.flops import image_flops
from himix_megatron.costs.memory import FIXED_BYTES, FRAGMENTS, GIB, MicroBatch, RankMemory, rank_memory
from himix_megatron.distributed.fused_kernels import detect
from himix_megatron.distributed.megatron_config import attention_core, params_dtype
from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
from himix_megatron.model.himix_model import unwrap_model
from pipelines.recipes import RECIPES
from tools.bench.measure import Line, seconds_of
from tools.bench.training import WANTED_MFU, Decoder, Packs, device_name, packed
from tools.gpu_check import rates
from tools.gpu_check.correctness import Spec
from tools.gpu_check.profiles import profiled
from tools.gpu_check.reference import Heads
from tools.gpu_check.runner import Check, Context
from tools.gpu_check.tower import CHECKS as TOWER
from tools.gpu_check.tower import encoder_of
from tools.planner.cost import step_time
from tools.planner.layouts import job_of, layout_of
from tools.planner.machine import Machine, machine_of_file


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A recipe's decoder and the packs with which it is measured: text tokens and samples (314 tokens on average)
    of a pack, and packs of a step.

    Beside packs with the images inside the text (as many samples as fit into 80 GB) stand chats of about as many tokens through
    the decoder, and captions. `optimizer`: whether its step is measured too.
    """

    name: str
    text_tokens: int = 8192
    samples: int = 26
    packs: int = 2
    concatenated_samples: int = 26
    chat_samples: int = 80
    caption_samples: int = 320
    optimizer: bool = False


MODELS = {
    model.name: model
    for model in (
        Model(name="qwen2_0_5b", optimizer=True),
        Model(name="llama3_2_1b", optimizer=True),
        Model(name="llama3_2_3b", concatenated_samples=12, chat_samples=40, caption_samples=128, packs=3),
        Model(name="vicuna_7b", text_tokens=4096, samples=13, packs=3),
        Model(name="tinyllama_1_1b"),
    )
}
CAPTION_TOKENS = 64
LABELLED_TOKENS = 4096
"""Labelled tokens of a pack of 8,192, half of whose text is labelled."""
WANTED_GAIN = 0.85
"""Least share of the gain that the FLOPs promise."""
WANTED_FP8 = 1.15
"""Tokens/s in FP8 over bf16's."""
WITHIN = 0.10
"""Largest relative error of costs.memory."""
PREDICTED_WITHIN = 0.15
"""Largest relative error of the planner."""
STEP_SECONDS: dict[tuple[str, str], float] = {}
"""Seconds of the bf16 steps measured so far in this process, by model and spec."""


def on_gpu(wanted: float | None) -> float | None:
    """What is wanted, where a GPU is measured."""
    return wanted if torch.cuda.is_available() else None


# ---- a model and its packs ---------------------------------------------------------------------------------------------


def configuration(model: Model, context: Context, spec: Spec, fp8: str = "none") -> Config:
    """Language model and vision keys and values train, in bf16; without a GPU the tiny recipe in fp32."""
    gpu = torch.cuda.is_available()
    config = RECIPES["tiny_instruct" if context.tiny else f"{model.name}_instruct"]()
    text_tokens, samples, packs = sizes(model, context)
    config = packed(config, text_tokens=text_tokens, images=samples, packs=packs)
    graphs = "on" if gpu and fp8 == "none" else "off"
    train = replace(
        config.train,
        trainable_parts=("language", "vision_kv"),
        precision="bf16" if gpu else "fp32",
        fp8=fp8,
        cuda_graphs=graphs,
    )  # type: ignore[arg-type]
    own = replace(config.model, layer_spec=spec if gpu else "torch")
    return replace(config, recipe=f"{model.name}_instruct", model=own, train=train)


def sizes(model: Model, context: Context) -> tuple[int, int, int]:
    """Text tokens and samples of a pack, and packs of a step."""
    return (96, 3, 2) if context.tiny else (model.text_tokens, model.samples, model.packs)


def packs_of(model: Model, context: Context, config: Config) -> Packs:
    """Chats."""
    return Packs.of(*sizes(model, context), config.vision.max_tokens_per_image)


@contextmanager
def built(config: Config) -> Iterator[Decoder]:
    """The model on the device, alone; gone afterwards, whatever happened."""
    free()
    topology = init_distributed(config.parallel, seed=0)
    try:
        decoder = Decoder(config, topology)
        try:
            yield decoder
        finally:
            decoder.model_chunks.clear()
            decoder.graphs = None
    finally:
        shutdown_distributed()
        free()


def free() -> None:
    """Free unreferenced memory (megatron-core's wrappers refer to each other in cycles), and reset the peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measured(own: Decoder, packs: Packs, context: Context) -> float:
    """Median seconds of a step; the allocator's peak is its own."""
    free()
    return own.seconds(packs, repetitions=1 if context.tiny else 3, warm=1 if context.tiny else 2)


# ---- the decoder -------------------------------------------------------------------------------------------------------


def decoder(model: Model, spec: Spec, context: Context) -> Iterator[Line]:
    """MFU and tokens a second, memory, a profile; where asked for the optimizer."""
    config = configuration(model, context, spec)
    packs, name, before = packs_of(model, context, config), f"{model.name}, {spec}", allocated()
    with built(config) as own:
        seconds = STEP_SECONDS[model.name, spec] = measured(own, packs, context)
        mfu = packs.flops(config) / seconds / rates.peak_flops()
        shape = f"{len(packs.text_lengths)} packs of {packs.row_tokens} text tokens and {len(packs.text_lengths[0])} images"
        what = f"{name}: decoder's MFU, forward and backward, {shape}, {1e3 * seconds:.1f} ms"
        yield Line(what, mfu, on_gpu(WANTED_MFU.get(model.name) if spec == "te" else None))
        yield Line(f"{name}: real text tokens a second", packs.text_tokens / seconds)
        yield from memory_lines(name, config, packs, before, optimizer=False)
        if spec == "te":
            yield profile_line(name, own, packs, seconds, context)
        if spec == "te" and model.optimizer:
            yield from optimizer_lines(name, own, packs, seconds, before)


def allocated() -> int:
    """Bytes in tensors now."""
    free()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def expected_memory(config: Config, packs: Packs, *, optimizer: bool) -> RankMemory:
    """What costs.memory says of the model as measured: features as given, and an optimizer only where there is one."""
    images = [len(pack) for pack in packs.text_lengths]
    largest = MicroBatch(
        text_tokens=packs.row_tokens,
        vision_tokens=max(images) * packs.tokens_per_image,
        labelled_tokens=packs.work().head_tokens / len(images),
    )
    # All packs have one size here: no micro-batch runs beside the graphs' pool.
    config = replace(config, train=replace(config.train, cuda_graphs="off"))
    found = rank_memory(config, 0, data_size=1, micro_batch=largest, vision_tokens_per_step=0)
    size = 2 if config.train.precision == "bf16" else 4
    given = size * sum(images) * packs.tokens_per_image * config.vision.hidden_size
    found = replace(found, features=given, optimizer=found.optimizer if optimizer else 0.0, allowance=0.0)
    return replace(found, allowance=FIXED_BYTES + FRAGMENTS * found.total)


def memory_lines(name: str, config: Config, packs: Packs, before: int, *, optimizer: bool) -> Iterator[Line]:
    """The allocator's peak, and what the device says, beside memory.py. `before`: bytes in tensors before the model."""
    expected = expected_memory(config, packs, optimizer=optimizer)
    total = expected.total - expected.allowance
    if not torch.cuda.is_available():
        yield Line(f"{name}: GiB by himix_megatron.costs.memory", total / GIB)
        return
    peak = torch.cuda.max_memory_allocated() - before
    name = f"{name}, with the optimizer" if optimizer else name
    what = f"{name}: peak memory, {peak / GIB:.2f} GiB, is {peak / total:.3f} of memory.py's {total / GIB:.2f}; off by"
    yield Line(what, abs(peak / total - 1), WITHIN, at_most=True)
    available, size = torch.cuda.mem_get_info()
    used, promised = (size - available) / GIB, expected.total / GIB
    what = f"{name}: the device's {used:.2f} GiB in use over memory.py's, its allowance included ({promised:.2f})"
    yield Line(what, used / promised, 1.0, at_most=True)


def profile_line(name: str, own: Decoder, packs: Packs, seconds: float, context: Context) -> Line:
    """Appends the longest kernels to OUT/profiles.txt; how much of the step the GPU has nothing to do."""
    found = profiled(own.step_on(packs))
    with (context.out / "profiles.txt").open("a") as file:
        file.write(found.table(f"{name}, {device_name()}", seconds))
    what = f"{name}: share of the step in which no kernel runs ({found.launches} launches)"
    return Line(what, found.idle_share(seconds))


def optimizer_lines(name: str, own: Decoder, packs: Packs, seconds: float, before: int) -> Iterator[Line]:
    """Its step, its share, and memory with it."""
    step, optimize, taken = own.step_on(packs), own.optimizer_step(), []
    for _ in range(4):
        step()
        taken.append(seconds_of(optimize))
    own.graphs = None  # a graph that is replayed allocates nothing: its pool would be missing in the peak
    free()
    step()
    optimize()
    own_seconds = statistics.median(taken[1:])
    yield Line(f"{name}: optimizer's step in ms", 1e3 * own_seconds)
    yield Line(f"{name}: its share of decoder and optimizer", own_seconds / (own_seconds + seconds))
    yield from memory_lines(name, own.config, packs, before, optimizer=True)


def loss(model: Model, context: Context) -> Iterator[Line]:
    """Head and cross-entropy over labelled tokens, as the model's last stage runs them behind its layers."""
    config = configuration(model, context, "te")
    one_layer = replace(config.model, num_layers=1)
    config = replace(config, model=one_layer, train=replace(config.train, cuda_graphs="off"))
    tokens, device = 32 if context.tiny else LABELLED_TOKENS, "cpu" if context.tiny else "cuda"
    with built(config) as own:
        last = unwrap_model(own.model_chunks[0])
        last.labelled = torch.arange(tokens, device=device)
        labels = torch.randint(one_layer.vocab_size, (1, tokens), device=device)
        states = torch.randn(tokens, 1, one_layer.hidden_size, device=device, dtype=params_dtype(config), requires_grad=True)

        forward = rates.queued_seconds([lambda: last._postprocess(states, labels=labels)] * 4)
        both = rates.queued_seconds([lambda: last._postprocess(states, labels=labels).sum().backward()] * 4)
    what = f"{model.name}: ms of the loss over {tokens} labelled tokens, head of {one_layer.vocab_size} included"
    yield Line(f"{what}, forward", 1e3 * forward)
    yield Line(f"{what}, forward and backward", 1e3 * both)
    # The head's three products; what the cross-entropy adds is memory traffic.
    flops = 6.0 * tokens * one_layer.hidden_size * one_layer.vocab_size
    yield Line(f"{model.name}: the head's share of the peak in that time", flops / both / rates.peak_flops())


# ---- beside concatenation ----------------------------------------------------------------------------------------------


def concatenation(model: Model, context: Context) -> Iterator[Line]:
    """The same layers with the images inside the text: seconds a sample over HiMix's, beside what the FLOPs promise."""
    config, tower = configuration(model, context, "te"), tower_seconds(context)
    yield Line("the frozen tower's ms an image", 1e3 * tower)
    with built(config) as own:
        for name, beside, inside in pairs(model, context, config.vision.max_tokens_per_image):
            yield from gain_lines(f"{model.name}, {name} text tokens", own, beside, inside, tower, context)


def pairs(model: Model, context: Context, tokens_per_image: int) -> Iterator[tuple[str, Packs, Packs]]:
    """Chats and captions: HiMix's packs, and concatenated ones of samples like theirs, as many as fit."""
    kinds = ((32, 3), (8, 3)) if context.tiny else ((314, model.chat_samples), (CAPTION_TOKENS, model.caption_samples))
    for mean, count in kinds:
        # As many tokens go through the decoder on both sides, or as many as the head's share of memory allows.
        inside = min(count, model.concatenated_samples * (314 + tokens_per_image) // (mean + tokens_per_image))
        beside, own = (Packs.of(mean * number, number, 1, tokens_per_image) for number in (count, inside))
        yield str(mean), beside, own.concatenated()


def gain_lines(name: str, own: Decoder, beside: Packs, inside: Packs, tower: float, context: Context) -> Iterator[Line]:
    """The gain of the decoder alone and of the whole step."""
    times, flops, vision = [], [], own.config.vision
    for packs in (beside, inside):
        times.append(measured(own, packs, context) / packs.samples)
        flops.append(packs.flops(own.config) / packs.samples)
    for what, seconds, operations in (
        ("decoder", 0.0, 0.0),
        ("whole step", tower, image_flops(vision, vision.max_patches_per_image)),
    ):
        gain = (times[1] + seconds) / (times[0] + seconds)
        honest = (flops[1] + operations) / (flops[0] + operations)
        each = f"{1e3 * (times[0] + seconds):.2f} and {1e3 * (times[1] + seconds):.2f} ms a sample"
        yield Line(f"{name}, {what}: concatenation's time over HiMix's ({each}; by FLOPs {honest:.2f})", gain)
        yield Line(f"{name}, {what}: that gain over the FLOPs' one", gain / honest, on_gpu(WANTED_GAIN))
    mfu = [operations / seconds / rates.peak_flops() for operations, seconds in zip(flops, times, strict=True)]
    yield Line(f"{name}: the concatenating decoder's own MFU (HiMix's {mfu[0]:.3f})", mfu[1])


@functools.cache
def tower_seconds(context: Context) -> float:
    """The frozen tower's forward pass on one image, of 64 at once."""
    _, images, encode = encoder_of(context)
    return rates.queued_seconds([lambda: encode(True)] * 2, repetitions=3) / images


def fp8(model: Model, context: Context) -> Iterator[Line]:
    """The same step in FP8, beside bf16's, which is measured now if it was not."""
    config = configuration(model, context, "te")
    packs = packs_of(model, context, config)
    if (model.name, "te") not in STEP_SECONDS:
        with built(config) as own:
            STEP_SECONDS[model.name, "te"] = measured(own, packs, context)
    kind = "tensorwise" if torch.cuda.is_available() else "none"
    name, before = f"{model.name}, te, FP8 {kind}", allocated()
    with built(configuration(model, context, "te", kind)) as own:
        seconds = measured(own, packs, context)
        gain = STEP_SECONDS[model.name, "te"] / seconds
        yield Line(f"{name}: tokens a second over bf16's ({1e3 * seconds:.1f} ms)", gain, on_gpu(WANTED_FP8))
        yield Line(f"{name}: real text tokens a second", packs.text_tokens / seconds)
        if torch.cuda.is_available():
            yield Line(f"{name}: peak memory in GiB", (torch.cuda.max_memory_allocated() - before) / GIB)
            yield profile_line(name, own, packs, seconds, context)


# ---- the planner -------------------------------------------------------------------------------------------------------


def machine(context: Context) -> Iterator[Line]:
    """The GPU's rates into OUT/machine.json; what the planner makes of them beside the measured steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    shapes: dict[rates.Product, None] = {}
    attention: list[tuple[float, ...]] = []
    for model in MODELS.values():
        config = configuration(model, context, "te")
        text_tokens, images, _ = sizes(model, context)
        vision_tokens = images * config.vision.max_tokens_per_image
        shapes |= dict.fromkeys(rates.products_of(config, text_tokens, vision_tokens))
        heads = Heads(config.model.num_attention_heads, config.model.num_query_groups, config.model.channels_per_head)
        packs = [packs_of(model, context, config)]
        if not context.tiny and model.name in ("qwen2_0_5b", "llama3_2_3b"):  # captions: their attention has another shape
            packs.append(Packs.of(CAPTION_TOKENS * 128, 128, 1, config.vision.max_tokens_per_image))
        for own in packs:
            found = rates.attention_seconds(heads, own, device)
            rows = {core: rates.attention_row(heads, own, seconds) for core, seconds in found.items()}
            attention.append(rows[attention_core(config, detect())])
            for core, (forward, backward) in found.items():
                rate = (rows[core][3] * forward + rows[core][4] * backward) / (forward + backward) / 1e12
                what = f"attention of {model.name}, {len(own.text_lengths[0])} samples, {core}: TFLOP/s"
                yield Line(f"{what}, {1e3 * forward:.2f} and {1e3 * backward:.2f} ms forward and backward", rate)
            free()
    if not context.tiny:
        shapes[rates.Product(8192, 8192, 8192, "forward")] = None
    products = {product: product.seconds(device, dtype) for product in shapes}
    ordered = sorted(products, key=lambda product: product.flops / products[product])
    for what, product in (("slowest", ordered[0]), ("median", ordered[len(ordered) // 2]), ("fastest", ordered[-1])):
        shape = f"{product.rows} x {product.inner} x {product.columns}, {product.form}"
        yield Line(f"{what} product, {shape}: TFLOP/s", product.flops / products[product] / 1e12)
    measured_rates = {"copy": rates.copy_rate(device), "passing": rates.passing_rate(device, dtype)}
    found_machine = rates.measured_machine(products, attention, {**measured_rates, "layer_seconds": host_seconds(context) / 2})
    yield Line("memory: copy, TB/s", found_machine.memory_bytes_per_second / 1e12)
    yield Line("memory: norms, residuals and activations, TB/s as the planner counts", found_machine.passing / 1e12)
    yield Line("host: ms a layer and micro-batch, forward and backward, kernel by kernel", 2e3 * found_machine.layer_seconds)
    file = context.out / "machine.json"
    rates.write_machine(file, found_machine, f"{device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    free()
    yield from planner_lines(machine_of_file(file), context)


def planner_lines(own: Machine, context: Context) -> Iterator[Line]:
    """Predicted over measured, of the models measured in this process."""
    for model in MODELS.values():
        if seconds := STEP_SECONDS.get((model.name, "te")):
            config = configuration(model, context, "te")
            predicted = predicted_seconds(config, packs_of(model, context, config), own)
            ratio = predicted / seconds
            what = f"{model.name}: the planner's {1e3 * predicted:.1f} ms are {ratio:.3f} of {1e3 * seconds:.1f}; off by"
            yield Line(what, abs(ratio - 1), on_gpu(PREDICTED_WITHIN), at_most=True)


def predicted_seconds(config: Config, packs: Packs, machine: Machine) -> float:
    """The planner's seconds of a step of these packs, without optimizer and tower."""
    if config.train.cuda_graphs == "on":
        machine = replace(machine, layer_seconds=0.0)  # the host launches one graph for all layers
    count = len(packs.text_lengths)
    return step_time(machine, layout_of(config, 1), job_of(config, packs.work() * (1 / count), count, 0.0)).compute


def host_seconds(context: Context) -> float:
    """Host time of a layer, forward and backward, kernel by kernel: what layers add to a step that computes almost nothing."""
    layers, taken = (1, 2) if context.tiny else (2, 8), []
    for number in layers:
        config = configuration(MODELS["qwen2_0_5b"], context, "te")
        small = replace(config.model, num_layers=number, vocab_size=128)
        with built(replace(config, model=small, train=replace(config.train, cuda_graphs="off"))) as own:
            taken.append(own.seconds(Packs.of(26 * 16, 26, 1, 32), repetitions=1 if context.tiny else 8, warm=4))
    return max(1e-9, (taken[1] - taken[0]) / (layers[1] - layers[0]))


CHECKS: tuple[Check, ...] = (
    Check("decoder_0.5b", "performance", 13, partial(decoder, MODELS["qwen2_0_5b"], "te")),
    Check("loss_0.5b", "performance", 5, partial(loss, MODELS["qwen2_0_5b"])),
    Check("decoder_3b", "performance", 13, partial(decoder, MODELS["llama3_2_3b"], "te")),
    Check("decoder_1b", "performance", 10, partial(decoder, MODELS["llama3_2_1b"], "te")),
    Check("decoder_7b", "performance", 17, partial(decoder, MODELS["vicuna_7b"], "te")),
    Check("concatenation_0.5b", "performance", 16, partial(concatenation, MODELS["qwen2_0_5b"])),
    Check("concatenation_3b", "performance", 13, partial(concatenation, MODELS["llama3_2_3b"])),
    Check("fp8_3b", "performance", 16, partial(fp8, MODELS["llama3_2_3b"])),
    Check("decoder_tinyllama", "performance", 9, partial(decoder, MODELS["tinyllama_1_1b"], "te")),
    Check("machine", "performance", 25, machine),
    *TOWER,
    Check("torch_0.5b", "performance", 7, partial(decoder, MODELS["qwen2_0_5b"], "torch")),
    Check("torch_1b", "performance", 8, partial(decoder, MODELS["llama3_2_1b"], "torch")),
    Check("torch_3b", "performance", 11, partial(decoder, MODELS["llama3_2_3b"], "torch")),
    Check("torch_7b", "performance", 15, partial(decoder, MODELS["vicuna_7b"], "torch")),
)
