"""However vision enters the decoder, generation with a cache is generation without one, and both are what the equations say.

Weights are random, gates and what starts at 0 too. The float64 reference reads the texts that come out, and must find each of
their tokens the most likely one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from himix_megatron.config import METHODS, ParallelConfig
from tests.support.injection_points import Case, point_case, preset_case
from tests.support.injection_ranks import features_in_float64, fill, pixels_of
from tests.support.injection_reference import IGNORED, Pieces, Sample, drawn_weights, general
from tests.support.ranks import run_ranks

MAX_NEW = 6
SEED, NUM_POINTS = 13, 6
LAYOUTS: dict[str, dict[str, int]] = {"one rank": {}, "tensor 2": {"tensor": 2}, "pipeline 2": {"pipeline": 2}}


def cases() -> list[Case]:
    """Each published method, with images of one size or of many, and some random points."""
    presets = [preset_case(method, packed=number % 2 == 0) for number, method in enumerate(METHODS)]
    found = [*presets, *(point_case(SEED, number) for number in range(NUM_POINTS))]
    # Answering leaves the tower as it is.
    return [
        replace(case, config=replace(case.config, train=replace(case.config.train, trainable_parts=("language", "vision_kv"))))
        for case in found
    ]


def answers(given: Sequence[Case], parallel: ParallelConfig) -> list[tuple[list[list[int]], list[list[int]]]]:
    """On this rank: of each case the continuations of its samples, with the cache and without."""
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.inference.generator import Answerer, Prompt

    topology = init_distributed(parallel, seed=1)
    found = []
    for case in given:
        answerer = Answerer(case.at(parallel), detect(), topology)
        fill(answerer.model_chunks, case, topology)
        prompts = [
            Prompt(torch.tensor(sample.ids).numpy(), tuple(i.numpy() for i in images), tuple(i.place for i in sample.images))
            for sample, images in zip(case.samples, pixels_of(case), strict=True)
        ]
        both: list[Any] = [answerer.answer(prompts, (), MAX_NEW, cached=cached) for cached in (True, False)]
        found.append((both[0], both[1]))
    shutdown_distributed()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_answers_are_recomputed_ones(layout: str) -> None:
    given, parallel = cases(), ParallelConfig(timeout_seconds=60, **LAYOUTS[layout])
    results = run_ranks(answers, parallel.tensor * parallel.pipeline, given, parallel, start_gloo=False)
    for case, (cached, recomputed) in zip(given, results[0], strict=True):
        assert cached == recomputed, (case.name, case.config.injection)
        assert len({tuple(answer) for answer in cached}) > 1, "prompts are told apart"
        check(case, cached)
    assert all(result == results[0] for result in results)


@torch.no_grad()
def check(case: Case, found: Sequence[Sequence[int]]) -> None:
    """Each token of an answer is the most likely one, by the equations, after what comes before it."""
    weights = {name: weight.double() for name, weight in drawn_weights(case.config, case.seed).items()}
    for sample, features, answer in zip(case.samples, features_in_float64(case), found, strict=True):
        ids = (*sample.ids, *answer)
        logits = general(Pieces(case.config, weights), Sample(ids, (IGNORED,) * len(ids), sample.images), features)
        assert logits[len(sample.ids) - 1 : -1].argmax(-1).tolist() == answer, (case.name, case.config.injection)
