"""Cases of injection_points.py on real ranks, and how far they are from the float64 reference.

One start of ranks takes any number of cases: `run_ranks(run_cases, N, cases, parallel, start_gloo=False)[0]`. Weights and
images are a function of a case's seed, so that ranks and reference make the same ones. Where the tower trains, ranks are given
pixels, and the features' gradient is judged by that of the tower's weights; else they are given features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from himix_megatron.config import Config, ParallelConfig
from himix_megatron.data.loading.batch import StepBatch, collate
from himix_megatron.data.loading.image_table import ImageTable, blank_pixels
from himix_megatron.data.text.chat_template import EncodedText
from tests.support.injection_points import Case
from tests.support.injection_reference import IGNORED, Form, Sample, drawn_weights, outcome, predicting_rows, trains
from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    from himix_megatron.distributed.topology import Topology

LIMIT = 1e-5
"""Largest error, relative to the reference's own norm."""


@dataclass(frozen=True)
class Found:
    """What one way of computing a case gives; all on the CPU."""

    loss: float
    logits: tuple[Tensor, ...]
    """Of each sample float[n, vocabulary], as in `Outcome`."""
    gradients: dict[str, Tensor]
    """Of what trains, by the weight's name in checkpoints; the tower's begin with `tower.`."""
    scales: dict[str, float] = field(default_factory=dict)
    """As in `Outcome`; of the reference alone."""


# ---- what is given -----------------------------------------------------------------------------------------------------


def sizes_of(config: Config, sample: Sample) -> list[tuple[int, int]]:
    """(width, height) in pixels of a sample's images."""
    side = config.vision.patch_size
    return [(image.columns * side, image.rows * side) for image in sample.images]


def table_of(config: Config, samples: Sequence[Sample]) -> ImageTable:
    sizes = [sizes_of(config, sample) for sample in samples]
    return ImageTable.of(config.vision, sizes, [[image.place for image in sample.images] for sample in samples])


def pixels_of(case: Case) -> list[list[Tensor]]:
    """Of each sample's images uint8[3, height, width]."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(width: int, height: int) -> Tensor:
        return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)

    return [[draw(*size) for size in sizes_of(case.config, sample)] for sample in case.samples]


def features_of(case: Case) -> list[list[Tensor]]:
    """Of each sample's images float32[rows * columns, L * V]."""
    generator = torch.Generator().manual_seed(case.seed)
    width = case.config.vision.feature_width
    return [[torch.randn(i.rows * i.columns, width, generator=generator) for i in s.images] for s in case.samples]


def joined_pixels(config: Config, table: ImageTable, images: Sequence[Tensor]) -> Tensor:
    """Pixels of images as a tower takes them."""
    pixels = blank_pixels(table, config.vision)
    for place, image in zip(table.split(pixels), images, strict=True):
        place.copy_(image)
    return pixels


# ---- the reference -----------------------------------------------------------------------------------------------------


def reference(case: Case, form: Form | None = None) -> Found:
    """In float64. `form`: None: the general one."""
    weights = drawn_weights(case.config, case.seed)
    if not case.tower_trains:
        found = outcome(case.config, weights, case.samples, features_of(case), form)
        return Found(found.loss, found.logits, _trained(case, found.gradients), found.scales)
    tower, features = _tower_in_float64(case)
    found = outcome(case.config, weights, case.samples, features, form)
    flat = [image for own in features for image in own]
    if flat:
        torch.autograd.backward(flat, found.of_features)
    of_tower = {f"tower.{name}": p.grad for name, p in tower.named_parameters() if p.grad is not None}
    return Found(found.loss, found.logits, _trained(case, found.gradients | of_tower), found.scales)


def _trained(case: Case, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if trains(case.config, name)}


def features_in_float64(case: Case) -> list[list[Tensor]]:
    """Of each sample's images, what the tower makes of their pixels."""
    return _tower_in_float64(case)[1]


def _tower_in_float64(case: Case) -> tuple[torch.nn.Module, list[list[Tensor]]]:
    """The tower, and each image's features. Those of several hidden states come from towers that end at one, on its weights."""
    from dataclasses import replace

    from himix_megatron.model.towers import build_tower

    vision = case.config.vision
    tower = build_tower(vision, seed=case.config.train.seed, dtype=torch.float32).double()
    levels = []
    for level in vision.levels:
        alone = build_tower(replace(vision, feature_layers=(), feature_layer=level), seed=0, dtype=torch.float64)
        for name, _ in list(alone.named_parameters()):
            module, _, leaf = name.rpartition(".")
            setattr(alone.get_submodule(module), leaf, tower.get_parameter(name))
        levels.append(alone)
    features = []
    for sample, images in zip(case.samples, pixels_of(case), strict=True):
        own = []
        for image, size in zip(images, sizes_of(case.config, sample), strict=True):
            table = ImageTable.of(vision, [[size]])
            given = joined_pixels(case.config, table, [image]), torch.zeros(1, dtype=torch.bool), table.sizes
            own.append(torch.cat([level.features(*given) for level in levels], -1))
        features.append(own)
    return tower, features


# ---- the ranks ---------------------------------------------------------------------------------------------------------


def run_cases(cases: Sequence[Case], parallel: ParallelConfig) -> list[Found] | None:
    """On this rank: every case in this layout. Returns: what was found, on rank 0."""
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed

    topology = init_distributed(parallel, seed=1)
    found = []
    for case in cases:
        try:
            found.append(_run(case, parallel, topology))
        except BaseException as error:
            error.add_note(f"case: {case.name}, {case.config.injection}")
            raise
    rank = topology.rank
    shutdown_distributed()
    return None if rank else found


def _run(case: Case, parallel: ParallelConfig, topology: Topology) -> Found:
    from dataclasses import replace

    from himix_megatron.conversion.sharding import gather
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.megatron_config import overlaps
    from himix_megatron.inference.generator import whole_vocabulary
    from himix_megatron.model.himix_model import build_model_chunks, finalize_gradients
    from himix_megatron.model.schedule import run_logits, run_losses
    from himix_megatron.model.towers import build_tower

    config = case.at(parallel)
    tower: Any = torch.nn.Identity()
    if case.tower_trains:
        tower = build_tower(config.vision, seed=config.train.seed, dtype=torch.float32)
    model_chunks = build_model_chunks(config, detect(), topology, tower)
    fill(model_chunks, case, topology)
    for model_chunk in model_chunks:
        model_chunk.zero_grad_buffer()
    mcore_config = model_chunks[0].config
    mcore_config.finalize_model_grads_func = finalize_gradients
    if overlaps(config):  # as training/builder.py
        syncs = [model_chunk.no_sync for model_chunk in model_chunks]
        mcore_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    inputs = given_to_stage(case, config, topology.pipeline_rank)
    without_labels = [replace(given, labels=None, labelled=None) for given in inputs]
    logits = run_logits(model_chunks, without_labels, lambda _, logits: logits)
    reported = run_losses(model_chunks, inputs, forward_only=False)
    results: list[Any] = [None]
    if topology.is_last_stage:
        whole = [whole_vocabulary(own.contiguous(), topology, config.model.vocab_size) for own in logits]
        total, number = torch.stack(reported)[:, :2].sum(0).tolist()
        results = [(_by_sample(case, whole), total / number)]
    torch.distributed.broadcast_object_list(results, src=topology.world_size - 1)
    by_sample, loss = results[0]
    _check_replicas(model_chunks, topology)
    gradients = gather(model_chunks, _main_gradient, topology, config.model.vocab_size)
    if config.model.tie_embeddings:
        gradients.pop("output_layer.weight", None)  # the last stage's copy of the embedding
    return Found(loss, by_sample, _trained(case, {_on_disk(name): gradient for name, gradient in gradients.items()}))


def _main_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """Zeros for what is frozen."""
    found: Tensor = parameter.main_grad.clone() if parameter.requires_grad else torch.zeros_like(parameter)
    assert parameter.requires_grad or (parameter.grad is None and not hasattr(parameter, "main_grad"))
    return found


def fill(model_chunks: list[Any], case: Case, topology: Topology) -> None:
    """Give them the case's weights; a tower keeps its own."""
    from himix_megatron.conversion.sharding import global_parameters, scatter

    weights = {_in_memory(name): tensor for name, tensor in drawn_weights(case.config, case.seed).items()}
    of_tower = {name: parameter for name, parameter in global_parameters(model_chunks) if name.startswith("tower.")}
    scatter(model_chunks, weights | of_tower, topology)


def given_to_stage(case: Case, config: Config, stage: int) -> list[Any]:
    """A StageInput for each micro-batch, as training makes them: a stage that takes no vision is given none."""
    from himix_megatron.costs.flops import vision_chunks
    from himix_megatron.data.loading.plan import START
    from himix_megatron.distributed.megatron_config import text_multiple
    from himix_megatron.model.stage_input import stage_inputs

    longest = max(sum(_lengths(m)) if case.packed else max(_lengths(m)) for m in case.micro_batches) + 1
    longest += -longest % text_multiple(config)
    micro_batches = []
    for samples in case.micro_batches:
        texts = [
            EncodedText(
                np.array(sample.ids),
                np.array([False, *[label != IGNORED for label in sample.labels[:-1]]]),
                False,
                np.array([image.place for image in sample.images]),
            )
            for sample in samples
        ]
        names = ["" for _ in samples]
        table = table_of(config, samples)
        micro_batches.append(collate(texts, _lengths(samples), table, names, [0] * len(names), longest, packed=case.packed))
    table = table_of(config, case.samples)
    images: Tensor
    if case.tower_trains:
        images = joined_pixels(config, table, [image for own in pixels_of(case) for image in own])
    else:
        images = torch.cat([torch.zeros(0, config.vision.feature_width), *[i for own in features_of(case) for i in own]])
        if not any(vision_chunks(config)[stage :: config.parallel.pipeline]):
            images = images[:0]
    batch = StepBatch(
        1, tuple(micro_batches), torch.zeros(len(table), dtype=torch.bool), images, (), START, True, len(case.samples)
    )
    return stage_inputs(batch, images, config, torch.device("cpu"))


def _lengths(samples: Sequence[Sample]) -> list[int]:
    return [len(sample.ids) for sample in samples]


def _by_sample(case: Case, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What predicts the token that follows each text token, from float[B, S, vocabulary] of each micro-batch."""
    found: list[Tensor] = []
    for samples, whole in zip(case.micro_batches, logits, strict=True):
        wanted = [predicting_rows(case.config, sample) for sample in samples]
        if case.packed:
            starts = accumulate((own[-1] + 1 for own in wanted), initial=0)
            found += [whole[0, [start + row for row in own]] for start, own in zip(starts, wanted, strict=False)]
        else:
            found += [row[own] for row, own in zip(whole, wanted, strict=True)]
    return tuple(own.cpu().clone() for own in found)


def _check_replicas(model_chunks: list[Any], topology: Topology) -> None:
    """Where several ranks or chunks hold the same parameter, whole, they must have the same gradient.

    Raises: AssertionError naming the parameter.
    """
    from himix_megatron.conversion.sharding import global_parameters

    own = [
        (name, _main_gradient(parameter))
        for name, parameter in global_parameters(model_chunks)
        if not getattr(parameter, "tensor_model_parallel", False)
    ]
    everyone: list[Any] = [None] * topology.replica_size
    torch.distributed.all_gather_object(everyone, own, group=topology.replica)
    first: dict[str, Tensor] = {}
    for rank, gradients in enumerate(everyone):
        for name, gradient in gradients:
            wanted = first.setdefault(name, gradient)
            assert (gradient - wanted).norm() <= 1e-6 * wanted.norm(), f"{name} has another gradient on replica rank {rank}"


def _in_memory(name: str) -> str:
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.") if "vision_block" not in name else name


def _on_disk(name: str) -> str:
    if "vision_block" in name:
        return name
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


# ---- how far apart -----------------------------------------------------------------------------------------------------


def errors(found: Found, wanted: Found) -> dict[str, float]:
    """||found - wanted|| / ||wanted|| of the loss, each sample's logits and each gradient.

    A gate's gradient is one number, whose terms may nearly cancel: it is judged by their norm where that is larger.
    """
    assert found.gradients.keys() == wanted.gradients.keys(), found.gradients.keys() ^ wanted.gradients.keys()
    of_logits = {f"logits {n}": _error(a, b) for n, (a, b) in enumerate(zip(found.logits, wanted.logits, strict=True))}
    of_gradients = {
        name: _error(found.gradients[name], gradient, wanted.scales.get(name, 0.0))
        for name, gradient in wanted.gradients.items()
    }
    return {"loss": abs(found.loss - wanted.loss) / abs(wanted.loss)} | of_logits | of_gradients


def _error(found: Tensor, wanted: Tensor, scale: float = 0.0) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.double() - wanted).norm()) / max(float(wanted.norm()), scale, 1e-30)


def worst(found: Found, wanted: Found) -> tuple[float, str]:
    """The largest error and where it is."""
    by_name = errors(found, wanted)
    name = max(by_name, key=by_name.__getitem__)
    return by_name[name], name


POINTS = ParallelConfig(tensor=2, pipeline=2, timeout_seconds=60)
"""Where random points are tried."""


def tried(cases: Sequence[Case]) -> list[tuple[float, str]]:
    """The worst of each case at POINTS; one start of ranks for all."""
    wanted = [reference(case) for case in cases]
    found = run_ranks(run_cases, POINTS.tensor * POINTS.pipeline, cases, POINTS, timeout_seconds=600, start_gloo=False)[0]
    return [worst(own, exact) for own, exact in zip(found, wanted, strict=True)]
