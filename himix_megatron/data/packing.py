"""Lengths in, packs out: which samples share one sequence, so that little of it is padding.

Packs have two budgets, text tokens and images: captions run out of images long before text, long chats the other way round.
A pure function of the lengths, so every rank finds the same packs.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

GOOD_ENOUGH = 1.005
"""Packs for each that the budgets need at least: so few are not tried to be bettered."""


def plan_packs(text_tokens: Numbers, images: Numbers, max_text_tokens: int, max_images: int) -> list[Numbers]:
    """Packs of samples, none over either budget; samples and packs in the order of their first sample.

    Two ways are tried, and the one with fewer packs is taken. Best fit is close to perfect where one budget binds alone, and
    wasteful where both nearly do: it puts long texts together, and leaves packs full of short ones that lack only images.
    Dealing out evenly is good there.

    Args: `text_tokens`, `images`: int[n], of each sample; none above its budget.
    Returns: for each pack the numbers of its samples, 0 .. n - 1.
    """
    if not len(text_tokens):
        return []
    sizes = np.stack((np.asarray(text_tokens, np.int64), np.asarray(images, np.int64)))
    budgets = np.array((max_text_tokens, max_images), np.int64)
    assert (sizes <= budgets[:, None]).all(), "a sample does not fit into an empty pack"
    packs = _best_fit(sizes, budgets)
    fewest = max(math.ceil(total / budget) for total, budget in zip(sizes.sum(1).tolist(), budgets.tolist(), strict=True))
    if len(packs) > GOOD_ENOUGH * fewest:
        tries = (_deal(sizes, budgets, count) for count in range(fewest, len(packs), max(1, fewest // 200)))
        packs = next((dealt for dealt in tries if dealt is not None), packs)
    return sorted((np.array(sorted(pack), np.int64) for pack in packs if pack), key=lambda pack: int(pack[0]))


def _best_fit(sizes: Numbers, budgets: Numbers) -> list[list[int]]:
    """Largest first, each into the pack that it leaves fullest; both by the budget that binds."""
    shares = sizes / budgets[:, None]
    binding = int(shares[1].sum() > shares[0].sum())
    room = np.empty((2, sizes.shape[1]), np.int64)
    packs: list[list[int]] = []
    for sample in np.lexsort((-shares[1 - binding], -shares[binding])).tolist():
        size = sizes[:, sample]
        free = room[:, : len(packs)]
        fits = np.flatnonzero((free[0] >= size[0]) & (free[1] >= size[1]))
        if len(fits):
            best = int(fits[np.argmin(free[binding][fits])])
        else:
            best = len(packs)
            packs.append([])
            room[:, best] = budgets
        packs[best].append(sample)
        room[:, best] -= size
    return packs


def _deal(sizes: Numbers, budgets: Numbers, count: int) -> list[list[int]] | None:
    """Largest first, each into the pack that is emptiest with it, of `count` packs; None: they do not hold all samples.

    In whole numbers (a load is tokens x images allowed, and images x tokens allowed), so that no machine rounds differently.
    """
    limit = int(budgets.prod())
    weights = sizes * budgets[::-1, None]
    loads = np.zeros((2, count), np.int64)
    packs: list[list[int]] = [[] for _ in range(count)]
    for sample in np.argsort(-weights.max(0), kind="stable").tolist():
        after = loads + weights[:, sample, None]
        fullest = after.max(0)
        # Of packs alike in their fuller budget the one with more room in the other.
        best = int(np.argmin(1024 * fullest + after.sum(0)))
        if fullest[best] > limit:
            return None
        loads[:, best] = after[:, best]
        packs[best].append(sample)
    return packs
