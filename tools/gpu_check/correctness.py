"""Whether attention and whole decoder layers give the right numbers on this device.

Everything is held against float64 on the CPU (`reference`). A check goes through many cases and gives the worst figure with its
case; a case that raises does not hide the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from unittest import mock

import torch
from torch import Tensor

from himix_megatron.distributed import cpu_backend

cpu_backend.activate_if_needed()

from himix_megatron.config import Config, TrainConfig  # noqa: E402
from himix_megatron.data.loading.image_table import ImageTable  # noqa: E402
from himix_megatron.distributed.fused_kernels import Kernels, detect  # noqa: E402
from himix_megatron.distributed.megatron_config import transformer_config  # noqa: E402
from himix_megatron.distributed.topology import (  # noqa: E402
    Topology,
    init_distributed,
    shutdown_distributed,
)
from himix_megatron.model.attention.packed_layout import PackedLayout, make_layout  # noqa: E402
from himix_megatron.model.himix_model import HiMixModel  # noqa: E402
from himix_megatron.model.layer_spec import CORES  # noqa: E402
from pipelines.recipes import RECIPES  # noqa: E402
from tests.model.test_training_attention import outcome, spelled_out  # noqa: E402
from tools.bench.measure import Line  # noqa: E402
from tools.gpu_check import processes  # noqa: E402
from tools.gpu_check.reference import (  # noqa: E402
    BF16_LIMIT,
    FP8_LEAST,
    FP8_LIMIT,
    FP32_LIMIT,
    Batch,
    Given,
    Heads,
    batches,
    distance,
    drawn,
    outcome_of,
    random_batch,
    stored_name,
    weight,
)
from tools.gpu_check.runner import Check, Context  # noqa: E402

Spec = Literal["te", "torch"]
Core = Literal["te", "torch", "flash", "triton"]
"""An attention core by its spec's name or by `model.attention_core`'s; torch and flash are the same one."""
Precision = Literal["fp32", "bf16"]

MOST_TEXT = 90
IMAGE_TOKENS = 49
HEADS = (Heads(14, 2, 64), Heads(32, 8, 64), Heads(24, 8, 128), Heads(32, 32, 128))
"""Qwen2-0.5B's, Llama-3.2-1B's, Llama-3.2-3B's and Vicuna-7B's."""
TINY_HEADS = (Heads(4, 2, 16), Heads(4, 4, 32))
CORE_ROUNDINGS, CPU_CORE_ROUNDINGS, LAYER_ROUNDINGS = 2.0, 4.0, 3.0
"""How many times as far from float64 bf16 may be as float64 on inputs rounded to bf16. An attention core rounds once between
its two products and once at the end, the CPU's also where it merges images and text; a layer also between its other products.
"""


@dataclass
class Worst:
    """The worst figure of many cases, and which it was; what raised."""

    figures: dict[str, tuple[float, str]] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def note(self, figure: str, value: float, case: str) -> None:
        """A value that is no number is worse than any."""
        before = self.figures.get(figure, (-math.inf, ""))[0]
        if math.isnan(value) or value > before:
            self.figures[figure] = (value, case)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One of the cases; an error in it is kept until the others have run."""
        try:
            yield
        except Exception as error:  # the other cases say whether it is this one alone
            error.add_note(f"case: {name}")
            self.errors.append(error)

    def compare(self, figure: str, own: Tensor, right: Tensor, rounded: Tensor, scale: float, case: str) -> None:
        """A result against the right one, and against what rounding the inputs alone does (`rounded`) where that is any."""
        error, of_rounding = distance(own, right, scale), distance(rounded, right, scale)
        self.note(figure, error, case)
        if of_rounding > 1e-6:
            self.note(TIMES, error / of_rounding, case)

    def lines(self, limits: dict[str, float]) -> Iterator[Line]:
        """A line a figure. Raises: ExceptionGroup if a case raised."""
        for figure, (value, case) in self.figures.items():
            yield Line(f"{figure} (worst: {case})", value, limits.get(figure), at_most=True)
        if self.errors:
            raise ExceptionGroup(f"{len(self.errors)} cases raised", self.errors)


def device_of(context: Context) -> torch.device:
    """Where the checks run."""
    return torch.device("cpu" if context.tiny else "cuda")


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of inputs and parameters."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def usable(context: Context, spec: Core) -> Iterator[Line]:
    """Without a GPU nothing of Transformer Engine or Triton can run; with one it has to."""
    found = {"te": detect().transformer_engine, "triton": detect().triton}
    if spec in found and not context.tiny:
        yield Line(f"{spec} can be used", found[spec], 1)


def config_of(heads: Heads, spec: Spec, precision: Precision, fp8: str = "none", *, bias: bool = False) -> Config:
    """One decoder layer with these heads."""
    recipe = RECIPES["tiny_instruct"]()
    sizes = {"num_layers": 1, "hidden_size": 512, "ffn_hidden_size": 1024} if heads.dim >= 64 else {"num_layers": 1}
    model = dataclasses.replace(
        recipe.model,
        **sizes,
        num_attention_heads=heads.query,
        num_query_groups=heads.groups,
        head_dim=heads.dim,
        layer_spec=spec,
        family="qwen2" if bias else "llama",
    )
    train: TrainConfig = dataclasses.replace(recipe.train, precision=precision, fp8=fp8)
    return dataclasses.replace(recipe, model=model, train=train)


def kernels() -> Kernels:
    """What is usable here, without adding gradients into sums that only a whole training run has."""
    return dataclasses.replace(detect(), accumulation_fusion=False)


def fused_attention_only(precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """In bf16 a shape that Transformer Engine's fused kernels refuse is an error, not a matrix of all scores.

    No model can be built within it: megatron-core insists on values of its own.
    """
    return mock.patch.dict(os.environ, {"NVTE_UNFUSED_ATTN": "0"} if precision == "bf16" else {})


# ---- attention cores -----------------------------------------------------------------------------------------------


def core_of(spec: Core, heads: Heads, precision: Precision, device: torch.device) -> Any:
    """An attention core as the layer specs build it."""
    config = transformer_config(config_of(heads, "te" if spec == "te" else "torch", precision), kernels())
    return CORES.get(spec, CORES["flash"])(config, layer_number=1).to(device)


def layout_of(batch: Batch, device: torch.device, tokens: int) -> PackedLayout:
    """As the model lays a micro-batch out; cores use no angles."""
    ids = torch.zeros(batch.rows, dtype=torch.long, device=device)
    lengths = batch.text if batch.packed else None
    return make_layout(ids, lengths, images_of(batch, tokens), lambda number: torch.zeros(number, 1, 1, 2, device=device))


def images_of(batch: Batch, tokens: int) -> ImageTable:
    """The batch's images, with features of so many tokens each."""
    return ImageTable.of_features([[tokens] * count for count in batch.images])


def core_inputs(batch: Batch, heads: Heads, tokens: int) -> list[Tensor]:
    """float64 query, key, value, vision's keys and values, and the outcome's gradient."""
    columns, num_text = batch.rows
    shapes = [(num_text, columns, number, heads.dim) for number in (heads.query, heads.groups, heads.groups)]
    shapes += [(sum(batch.images) * tokens, heads.groups, 2, heads.dim), (num_text, columns, heads.query * heads.dim)]
    return [drawn(f"{batch.name} {heads} {number}", shape) for number, shape in enumerate(shapes)]


def given(inputs: list[Tensor], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Leaves for `outcome`."""
    cast = [tensor.to(device, dtype, copy=True) for tensor in inputs]
    return [*(tensor.requires_grad_() for tensor in cast[:4]), cast[4]]


NAMES = ("values", "gradient of the query", "gradient of the key", "gradient of the value", "gradient of the vision")


def core(context: Context, spec: Core, precision: Precision) -> Iterator[Line]:
    """Values and all gradients of training's attention."""
    yield from usable(context, spec)
    if spec != "torch" and context.tiny:
        return
    device, worst = device_of(context), Worst()
    with fused_attention_only(precision):
        for heads in TINY_HEADS if context.tiny else HEADS:
            attend = core_of(spec, heads, precision, device)
            cases = [*batches(MOST_TEXT), Batch("many vision tokens", (64, 40), (15, 30), packed=True)]
            if context.tiny:
                cases = cases[2:6]
            elif spec == "triton":
                # Each head shape is compiled anew, and again for rows, a single sample or 16 n tokens: tests/model tries those.
                cases = [cases[0], cases[7]]
            for batch in cases:
                with worst.case(f"{heads}, {batch.name}"):
                    compare_core(worst, attend, batch, heads, precision, device)
    limit = BF16_LIMIT if precision == "bf16" else FP32_LIMIT
    roundings = CPU_CORE_ROUNDINGS if context.tiny else CORE_ROUNDINGS
    yield from worst.lines({"values": limit, "gradients": limit, TIMES: roundings})


TIMES = "times the error of rounded inputs"
Found = TypeVar("Found")
_KNOWN: dict[Any, Any] = {}


def known(key: Any, compute: Callable[[], Found]) -> Found:
    """What several specs are held against, computed once: float64 takes a CPU longer than all the rest."""
    if key not in _KNOWN:
        _KNOWN[key] = compute()
    found: Found = _KNOWN[key]
    return found


def compare_core(worst: Worst, attend: Any, batch: Batch, heads: Heads, precision: Precision, device: torch.device) -> None:
    """One case."""
    inputs, cpu_device = core_inputs(batch, heads, IMAGE_TOKENS), torch.device("cpu")

    def exactly(dtype: torch.dtype) -> list[Tensor]:
        layout, rounded = layout_of(batch, cpu_device, IMAGE_TOKENS), [tensor.to(dtype) for tensor in inputs]
        return known((batch, heads, dtype), lambda: outcome(spelled_out, layout, given(rounded, torch.float64, cpu_device)))

    found = outcome(attend, layout_of(batch, device, IMAGE_TOKENS), given(inputs, dtype_of(precision), device))
    exact, near = exactly(torch.float64), exactly(torch.bfloat16 if precision == "bf16" else torch.float64)
    scale = float(inputs[4].norm())
    for name, own, right, rounded in zip(NAMES, found, exact, near, strict=True):
        figure = "values" if name == "values" else "gradients"
        worst.compare(figure, own, right, rounded, scale, f"{name}, {heads}, {batch.name}")


def continued(context: Context, precision: Precision) -> Iterator[Line]:
    """Generation's attention, torch's for all cores: prompts and single tokens, with holes among earlier keys and without."""
    device, worst = device_of(context), Worst()
    with torch.no_grad():
        for heads in TINY_HEADS if context.tiny else HEADS:
            attend = core_of("torch", heads, precision, device)
            for num_text in (1, 5, 33):
                for earlier in ((49, 49, 49), (98, 0, 49, 17), (0, 0), (7,)):
                    if num_text == 1 and not any(earlier):
                        continue  # a single token comes after its prompt
                    with worst.case(f"{heads}, {num_text} tokens after {earlier}"):
                        worst.note(
                            "values",
                            continued_error(attend, heads, num_text, earlier, precision, device),
                            f"{heads}, {num_text} tokens after {earlier}",
                        )
    yield from worst.lines({"values": BF16_LIMIT if precision == "bf16" else FP32_LIMIT})


def continued_error(
    attend: Any, heads: Heads, num_text: int, earlier: tuple[int, ...], precision: Precision, device: torch.device
) -> float:
    """The error for `num_text` tokens per sample after these numbers of earlier keys; holes lie anywhere among the slots."""
    most, number = max(earlier), len(earlier)
    name = f"continued {heads} {num_text} {earlier}"
    query = drawn(f"{name} query", (num_text, number, heads.query, heads.dim))
    key, value = (drawn(f"{name} {kind}", (most + num_text, number, heads.groups, heads.dim)) for kind in ("key", "value"))
    places = torch.stack([drawn(f"{name} {sample}", (most,)).argsort().argsort() for sample in range(number)])
    padding = places >= torch.tensor(earlier)[:, None]
    kept = [torch.stack((key[:most, b][~padding[b]], value[:most, b][~padding[b]]), 2) for b in range(number)]
    batch = Batch(name, (num_text,) * number, earlier, packed=False)
    exact = spelled_out(query, key[most:], value[most:], torch.cat(kept), layout_of(batch, torch.device("cpu"), 1))
    holes = padding.to(device) if padding.any() else None
    mask = attend.mixture_mask(num_text, most, holes, device)
    cast = (tensor.to(device, dtype_of(precision)) for tensor in (query, key, value))
    found = attend.decode(*cast, mask).double().cpu()
    return distance(found, exact, float(exact.norm()))


# ---- whole layers --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank(config: Config) -> Iterator[Topology]:
    """This process as the only rank, as long as it lasts."""
    topology = init_distributed(config.parallel, seed=1)
    try:
        yield topology
    finally:
        shutdown_distributed()


def layer_model(config: Config, topology: Topology) -> tuple[HiMixModel, dict[str, Tensor]]:
    """A model of one layer, and its weights in float64 by stored name."""
    model = HiMixModel(config, kernels(), topology, chunk=None, tower=None).to(topology.device)
    for layer in model.decoder.layers:
        layer.vision = dataclasses.replace(
            layer.vision, is_frozen=False
        )  # what a trainable tower asks for: the features' gradient
    weights = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weights[stored_name(name)] = weight(stored_name(name), parameter.shape)
            parameter.copy_(weights[stored_name(name)])
    return model, weights


def model_outcome(
    model: HiMixModel, batch: Batch, inputs: Given, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """What the model gives for it, as `outcome_of`."""

    def as_rows(flat: Tensor, fill: int) -> Tensor:
        padded = torch.nn.functional.pad(flat, (0, batch.padding if batch.packed else 0), value=fill)
        return padded.view(batch.rows).to(device)

    caught: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda _, __, output: caught.append(output))
    features = inputs.features.to(device, dtype, copy=True).requires_grad_()
    images = images_of(batch, inputs.tokens_per_image)
    blank = torch.zeros(len(images), dtype=torch.bool, device=device)
    labels = as_rows(inputs.labels.where(inputs.by > 0, -100), -100)
    packed = batch.text if batch.packed else None
    losses = model(as_rows(inputs.ids, 0), features, blank, images, labels, packed_lengths=packed)
    hook.remove()
    model.zero_grad(set_to_none=True)
    (losses.float() * as_rows(inputs.by.float(), 0)).sum().backward()
    found = {stored_name(name): parameter.grad for name, parameter in model.named_parameters()}
    found |= {"states": caught[0].transpose(0, 1), "losses": losses, "features": features.grad}
    given = {name: tensor.detach().double().cpu() for name, tensor in found.items() if tensor is not None}
    flat = {name: given[name].flatten(0, 1)[: sum(batch.text)] for name in ("states", "losses")}
    return given | flat | {"losses": flat["losses"][inputs.by > 0]}


def layer(context: Context, spec: Spec, precision: Precision, fp8: str = "none") -> Iterator[Line]:
    """States, losses and all gradients of a layer between embedding and head; of `train.fp8` the states are judged."""
    yield from usable(context, spec)
    if spec == "te" and context.tiny:
        return
    worst, quantised = Worst(), fp8 != "none"
    heads = TINY_HEADS if context.tiny else HEADS[::2] if quantised else HEADS
    cases = [random_batch(0, MOST_TEXT), random_batch(3, MOST_TEXT), *batches(MOST_TEXT)[5:]]
    cases = [random_batch(seed, MOST_TEXT, multiple=16) for seed in range(3)] if quantised else cases
    with one_rank(config_of(heads[0], spec, precision)) as topology:
        for number, own in enumerate(heads):
            config = config_of(own, spec, precision, fp8, bias=number % 2 == 0)
            model, weights = layer_model(config, topology)
            for batch in cases[1:4] if context.tiny else cases:
                with worst.case(f"{own}, {batch.name}"), fused_attention_only(precision):
                    compare_layer(worst, config, model, weights, batch, topology.device)
    limit = BF16_LIMIT if precision == "bf16" else FP32_LIMIT
    limits = dict.fromkeys(("states", "losses", "gradients"), limit) | {TIMES: LAYER_ROUNDINGS}
    if quantised and (found := worst.figures.get("states")):
        yield Line("states' largest error: less, and nothing ran in FP8", found[0], FP8_LEAST)
    yield from worst.lines({"states": FP8_LIMIT} if quantised else limits)


def compare_layer(
    worst: Worst, config: Config, model: HiMixModel, weights: dict[str, Tensor], batch: Batch, device: torch.device
) -> None:
    """One case."""
    inputs, dtype = Given.of(batch, IMAGE_TOKENS, config.vision.hidden_size), dtype_of(config.train.precision)
    bias = config.model.has_qkv_bias

    def exactly(cast: torch.dtype) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            own = {name: tensor.to(cast).double() for name, tensor in weights.items()}
            return outcome_of(config.model, own, batch, dataclasses.replace(inputs, features=inputs.features.to(cast).double()))

        return known((config.model.num_attention_heads, config.model.channels_per_head, bias, batch, cast), compute)

    exact = exactly(torch.float64)
    near = exactly(dtype) if dtype == torch.bfloat16 else exact
    found = model_outcome(model, batch, inputs, dtype, device)
    for name, right in exact.items():
        figure, own = name if name in ("states", "losses") else "gradients", found.get(name, torch.zeros_like(right))
        case = f"{name.removeprefix('decoder.layers.0.')}, {config.model.num_attention_heads} heads, {batch.name}"
        worst.compare(figure, own, right, near[name], float(inputs.by.norm()), case)


# ---- the tests that want a GPU -------------------------------------------------------------------------------------


def gpu_tests(context: Context) -> Iterator[Line]:
    """The test suite's own: only files that have one, so that nothing else needs to import here."""
    tests = (processes.ROOT / "tests").rglob("test_*.py")
    files = sorted(file for file in tests if "mark.requires_gpu" in file.read_text(encoding="utf-8"))
    said = processes.python(context, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "requires_gpu", *files)
    for outcome_of_tests in ("passed", "skipped"):
        found = re.search(rf"(\d+) {outcome_of_tests}", said)
        least = 1 if outcome_of_tests == "passed" and not context.tiny else None
        yield Line(f"tests that {outcome_of_tests}", int(found[1]) if found else 0, least)


def _each(check: str, run: Any, **seconds: float) -> Iterable[Check]:
    """A check of specs in precisions, named `spec_precision`."""
    for name, estimate in seconds.items():
        spec, precision = name.split("_")
        one = functools.partial(run, spec=spec, precision=precision)
        yield Check(f"{check}-{spec}-{precision}", "correctness", estimate, one)


CHECKS: tuple[Check, ...] = (
    Check("gpu-tests", "correctness", 90, gpu_tests, beside=True),
    *_each("layer", layer, te_bf16=10, torch_bf16=5),
    *_each("core", core, te_bf16=9, torch_bf16=5, triton_bf16=25),
    *(
        Check(f"layer-fp8-{kind}", "correctness", 5, functools.partial(layer, spec="te", precision="bf16", fp8=kind))
        for kind in typing.get_args(typing.get_type_hints(TrainConfig)["fp8"])
        if kind != "none"
    ),
    *_each("layer", layer, te_fp32=6, torch_fp32=4),
    *_each("core", core, te_fp32=6, torch_fp32=4),
    Check("continued-bf16", "correctness", 4, functools.partial(continued, precision="bf16")),
    Check("continued-fp32", "correctness", 4, functools.partial(continued, precision="fp32")),
)
