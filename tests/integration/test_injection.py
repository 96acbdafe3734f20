"""Every way of vision into the decoder is what its equations say, however the model is cut: logits, loss and all gradients.

The library computes in fp32, the reference in float64 (tests/support/injection_reference.py). One start of ranks for each
layout serves all published methods, as rows and as packs. `make campaign-injection` tries more random points.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from himix_megatron.config import METHODS, ParallelConfig
from tests.support.injection_points import Case, point_case, preset_case
from tests.support.injection_ranks import LIMIT, Found, reference, run_cases, tried, worst
from tests.support.injection_reference import PRESETS, Sample
from tests.support.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "pipeline 2": {"pipeline": 2},
    "pipeline 2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}
SEED, NUM_POINTS = 13, 8
"""Points with every fusion and position, every part frozen once, and one to three hidden states of the tower."""


@pytest.fixture(scope="module")
def presets() -> list[tuple[Case, Found]]:
    """Of each method rows and packs, by its own equations; and rows with the language model frozen."""
    kinds: list[dict[str, Any]] = [{"packed": False}, {"packed": True}, {"packed": False, "parts": ("vision_kv",)}]
    cases = [(method, preset_case(method, **kind)) for method in METHODS for kind in kinds]
    return [(case, reference(case, PRESETS[method])) for method, case in cases]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_methods_are_their_equations(layout: str, presets: list[tuple[Case, Found]]) -> None:
    parallel = ParallelConfig(timeout_seconds=60, **LAYOUTS[layout])
    ranks = parallel.tensor * parallel.pipeline
    found = run_ranks(run_cases, ranks, [case for case, _ in presets], parallel, start_gloo=False)[0]
    results = {case.name: worst(own, wanted) for (case, wanted), own in zip(presets, found, strict=True)}
    print(layout, *(f"{name}: {error:.1e} ({where})" for name, (error, where) in results.items()), sep="\n  ")
    assert max(results.values())[0] <= LIMIT


def test_a_micro_batch_may_hold_no_image_that_is_seen() -> None:
    """Recomputed too, and on two data ranks, which add up gradients while the backward pass still runs."""
    cases = []
    for method in METHODS:
        case = preset_case(method, packed=False)
        config = replace(case.config, train=replace(case.config.train, recompute="selective"))
        for kind, changed in (("no image", without_images), ("images behind the text", images_behind)):
            micro_batches = (case.micro_batches[0], tuple(map(changed, case.micro_batches[1])))
            cases.append(replace(case, name=f"{method}, {kind}", config=config, micro_batches=micro_batches))
    parallel = ParallelConfig(overlap="on", timeout_seconds=60)
    found = run_ranks(run_cases, 2, cases, parallel, start_gloo=False)[0]
    results = {case.name: worst(own, reference(case)) for case, own in zip(cases, found, strict=True)}
    assert max(results.values())[0] <= LIMIT, results


def without_images(sample: Sample) -> Sample:
    return replace(sample, images=())


def images_behind(sample: Sample) -> Sample:
    return replace(sample, images=tuple(replace(image, place=len(sample.ids)) for image in sample.images))


def test_random_points_are_their_equations_on_tensor_and_pipeline_ranks() -> None:
    cases = [point_case(SEED, number) for number in range(NUM_POINTS)]
    results = dict(zip(cases, tried(cases), strict=True))
    print(
        *(f"{case.name}: {error:.1e} ({where}) {case.config.injection}" for case, (error, where) in results.items()), sep="\n"
    )
    assert max(results.values())[0] <= LIMIT
