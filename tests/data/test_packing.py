"""Packs hold every sample once, keep both budgets, and waste little of the one that binds."""

import numpy as np
import pytest

from himix_megatron.data.loading.packing import plan_packs


def lengths(mean: float, sigma: float, count: int, longest: int, seed: int = 0) -> np.ndarray:
    """Log-normal text lengths with this mean, as LLaVA's sets have."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return drawn.clip(8, longest).astype(np.int64)


def images(count: int, seed: int = 0) -> np.ndarray:
    """Mostly one; some without, a few with three."""
    return np.random.default_rng(seed).choice([0, 1, 3], count, p=[0.06, 0.92, 0.02])


@pytest.mark.parametrize(("text_budget", "image_budget"), [(64, 5), (2048, 46), (4096, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_every_sample_is_in_one_pack_and_no_pack_over_budget(text_budget, image_budget, seed):
    text, pictures = lengths(40, 0.8, 700, 64, seed), images(700, seed)
    packs = plan_packs(text, pictures, text_budget, image_budget)
    assert sorted(np.concatenate(packs)) == list(range(700))
    assert max(text[pack].sum() for pack in packs) <= text_budget
    assert max(pictures[pack].sum() for pack in packs) <= image_budget
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)
    assert all((np.diff(pack) > 0).all() for pack in packs)


@pytest.mark.parametrize(
    ("mean", "sigma", "text_budget", "image_budget"),
    [
        (44, 0.5, 2048, 46),
        (44, 0.5, 4096, 46),
        (44, 0.9, 4096, 92),
        (314, 0.9, 2048, 46),
        (314, 0.6, 4096, 16),
        (314, 0.9, 4096, 46),
    ],
    ids=[
        "captions, both bind",
        "captions, images bind",
        "captions, larger packs",
        "chats",
        "chats, both bind",
        "chats, larger packs",
    ],
)
def test_packs_fill_the_budget_that_binds(mean, sigma, text_budget, image_budget):
    text, pictures = lengths(mean, sigma, 8192, 2048), images(8192)
    packs = plan_packs(text, pictures, text_budget, image_budget)
    fill = max(text.sum() / text_budget, pictures.sum() / image_budget) / len(packs)
    assert fill >= 0.98, fill


def test_samples_as_large_as_a_pack_are_alone():
    packs = plan_packs(np.array([64, 64, 3, 61]), np.array([1, 0, 1, 1]), 64, 2)
    assert [pack.tolist() for pack in packs] == [[0], [1], [2, 3]]


def test_no_samples_are_no_packs():
    assert plan_packs(np.array([], np.int64), np.array([], np.int64), 64, 2) == []
