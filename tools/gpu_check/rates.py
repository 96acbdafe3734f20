"""What this GPU does with the parts of a decoder layer: products, attention, memory traffic. Out: a machine for `tools.plan`.

Nothing here runs a model. Shapes are those of the recipes' decoders; each product is measured in the three forms of training
(forward, gradient of the input, gradient of the weight), each on operands of its own, as many as no cache holds.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from himix_megatron.config import Config
from himix_megatron.costs.hardware import device_of
from himix_megatron.costs.memory import padded_vocab
from himix_megatron.distributed.fused_kernels import detect
from himix_megatron.distributed.megatron_config import TRITON_HEAD_DIMS
from himix_megatron.model.cpu_ops import SwiGLU
from himix_megatron.model.layer import TransformerEngineSwiGLU
from tools.bench.measure import seconds_of
from tools.bench.training import Packs, device_name
from tools.gpu_check.correctness import core_of, layout_of
from tools.gpu_check.reference import Batch, Heads
from tools.planner.machine import Machine, machine_named

CACHE_BYTES = 128 << 20
"""Operands of one shape are spread over as much: more than a second-level cache holds."""
MOST_AHEAD_SECONDS = 0.02
CYCLES_PER_SECOND = 2e9
"""The highest clock rate of a GPU."""


def peak_flops() -> float:
    """Dense bf16 of the device here; without a GPU infinite. Raises: ValueError for a device that is not known."""
    if not torch.cuda.is_available():
        return math.inf
    found = device_of(torch.cuda.get_device_name())
    if found is None:
        raise ValueError(f"no peak is known for {torch.cuda.get_device_name()}")
    return found.bf16_flops


def queued_seconds(calls: Sequence[Callable[[], object]], repetitions: int = 5) -> float:
    """Median seconds of one of these calls while they are queued one after the other; the first round is not counted."""
    taken, host = [], 0.0

    def queue() -> None:
        nonlocal host
        begun = time.perf_counter()
        for call in calls:
            call()
        host = time.perf_counter() - begun

    for number in range(repetitions + 1):
        if torch.cuda.is_available():
            # The GPU waits until all is queued: else calls of a few small kernels would take as long as a slow host takes.
            torch.cuda._sleep(int(min(2 * host, MOST_AHEAD_SECONDS) * CYCLES_PER_SECOND))
        seconds = seconds_of(queue)
        if number:
            taken.append(seconds / len(calls))
    return statistics.median(taken)


# ---- products ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Product:
    """[rows, inner] x [inner, columns] in one of the forms in which a linear layer has it."""

    rows: int
    inner: int
    columns: int
    form: str
    """forward: x W^T; input: dy W; weight: dy^T x."""

    @property
    def flops(self) -> float:
        """2 for each multiply-add."""
        return 2.0 * self.rows * self.inner * self.columns

    def seconds(self, device: torch.device, dtype: torch.dtype) -> float:
        """Seconds of one product."""
        elements = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        copies = min(8, max(2, math.ceil(CACHE_BYTES / (elements * dtype.itemsize)))) if device.type == "cuda" else 1
        left = (self.inner, self.rows) if self.form == "weight" else (self.rows, self.inner)
        right = (self.columns, self.inner) if self.form == "forward" else (self.inner, self.columns)
        pairs = [[torch.empty(shape, device=device, dtype=dtype).normal_() for shape in (left, right)] for _ in range(copies)]
        of_form: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "forward": lambda x, weight: x @ weight.t(),
            "input": lambda dy, weight: dy @ weight,
            "weight": lambda dy, x: dy.t() @ x,
        }
        multiply = of_form[self.form]
        return queued_seconds([lambda a=a, b=b: multiply(a, b) for a, b in pairs] * 2)


def products_of(config: Config, text_tokens: int, vision_tokens: int) -> Iterator[Product]:
    """Those of a layer and of the head over labelled tokens, as a step of the decoder has them."""
    model, vision = config.model, config.vision
    query, key_value = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    hidden, inner = model.hidden_size, model.ffn_hidden_size
    linears = [(hidden, query + 2 * key_value), (query, hidden), (hidden, 2 * inner), (inner, hidden)]
    labelled = text_tokens // 2
    for rows, taken, given in [*((text_tokens, *sizes) for sizes in linears), (labelled, hidden, padded_vocab(config))]:
        yield Product(rows, taken, given, "forward")
        yield Product(rows, given, taken, "input")
        yield Product(taken, rows, given, "weight")
    yield Product(vision_tokens, vision.hidden_size, 2 * key_value, "forward")
    yield Product(vision.hidden_size, vision_tokens, 2 * key_value, "weight")


# ---- attention ---------------------------------------------------------------------------------------------------------


def attention_seconds(heads: Heads, packs: Packs, device: torch.device) -> dict[str, tuple[float, float]]:
    """Seconds forward and backward over the first pack, by core; putting keys together counts where a core wants it."""
    dtype, texts = torch.bfloat16 if device.type == "cuda" else torch.float32, packs.text_lengths[0]
    layout = layout_of(Batch("", texts, (1,) * len(texts), packed=True), device, packs.tokens_per_image)
    shapes = [(sum(texts), 1, number, heads.dim) for number in (heads.query, heads.groups, heads.groups)]
    shapes.append((len(texts) * packs.tokens_per_image, heads.groups, 2, heads.dim))
    given = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    grad = torch.randn(sum(texts), 1, heads.query * heads.dim, device=device, dtype=dtype)
    kernels, found, cores = detect(), {}, ["flash"]
    if device.type == "cuda":
        cores += ["te"] * kernels.transformer_engine + ["triton"] * (kernels.triton and heads.dim in TRITON_HEAD_DIMS)
    for name in cores:
        attend = core_of(name, heads, "bf16", device)
        run = [lambda attend=attend: attend(*given, layout)] * 4
        forward = queued_seconds(run)
        both = queued_seconds([lambda one=one: torch.autograd.grad(one(), given, grad) for one in run])
        found[name] = (forward, max(both - forward, 1e-9))
    return found


def attention_row(heads: Heads, packs: Packs, seconds: tuple[float, float]) -> tuple[float, float, float, float, float]:
    """A row of `Machine.attention`."""
    texts = packs.text_lengths[0]
    pairs = sum(length * packs.tokens_per_image + length * (length + 1) / 2 for length in texts)
    length = sum(length * (length + 1) for length in texts) / sum(texts) - 1  # as the cost model finds it
    flops = 4.0 * heads.query * heads.dim * pairs
    return heads.query, heads.dim, max(1.0, length), flops / seconds[0], 2.5 * flops / seconds[1]


# ---- memory ------------------------------------------------------------------------------------------------------------


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a large copy, read and written."""
    source = torch.zeros((1 << 28) if device.type == "cuda" else (1 << 22), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / queued_seconds([lambda: target.copy_(source)] * 3)


def passing_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s, as the cost model counts them, of a norm, a residual and an activation, forward and backward."""
    rows, hidden, inner = (32768, 3072, 8192) if device.type == "cuda" else (64, 96, 256)
    x, y = (torch.randn(rows, 1, hidden, device=device, dtype=dtype) for _ in range(2))
    halves = torch.randn(rows, 1, 2 * inner, device=device, dtype=dtype, requires_grad=True)
    if device.type == "cuda" and detect().transformer_engine:
        from transformer_engine.pytorch import RMSNorm

        norm, activate = RMSNorm(hidden, dtype=dtype, device=device), TransformerEngineSwiGLU(None)
    else:
        norm, activate = torch.nn.RMSNorm(hidden, device=device, dtype=dtype), SwiGLU(None)
    given, grad, of_half = x.clone().requires_grad_(), torch.randn_like(x), torch.randn_like(halves[..., :inner])

    def normed() -> None:
        given.grad = None
        norm(given).backward(grad)

    def activated() -> None:
        halves.grad = None
        activate(halves).backward(of_half)

    seconds = queued_seconds([normed] * 4) + queued_seconds([activated] * 4)
    seconds += 2 * queued_seconds([lambda: x + y] * 4)  # one forward; one where the residual's gradients meet
    # Three times the forward's: 2 H of a norm, 3 H of a residual, 3 F of an activation.
    return 3 * dtype.itemsize * rows * (5 * hidden + 3 * inner) / seconds


# ---- together ----------------------------------------------------------------------------------------------------------


def measured_machine(
    products: Mapping[Product, float], attention: Sequence[tuple[float, ...]], rates: Mapping[str, float]
) -> Machine:
    """The GPU here: its data sheet, and over it what was measured: seconds of products, rows of `attention_row`, bytes/s of a
    `copy` and of `passing`, and `layer_seconds`, a layer's least time in one direction."""
    known = device_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    base = machine_named(known.name if known else "h100-80gb", None)
    large = max((product.flops / seconds for product, seconds in products.items()), default=base.product_flops)
    return replace(
        base,
        name=f"{device_name()}, measured",
        product_flops=large,
        attention_forward=statistics.median(row[3] for row in attention) / large,
        attention_backward=statistics.median(row[4] for row in attention) / large,
        memory_bytes_per_second=rates["copy"],
        passing_bytes_per_second=rates["passing"],
        layer_seconds=rates["layer_seconds"],
        products=tuple((item.rows, item.inner, item.columns, item.flops / seconds) for item, seconds in products.items()),
        attention=tuple(attention),  # type: ignore[arg-type]
    )


def write_machine(file: Path, machine: Machine, conditions: str) -> None:
    """As `tools.plan --machine-file` reads it."""

    def short(value: object) -> object:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        return [short(item) for item in value] if isinstance(value, tuple) else value

    values = {name: short(value) for name, value in asdict(machine).items()}
    file.write_text(json.dumps({"conditions": conditions, "machine": values}, indent=1) + "\n")
