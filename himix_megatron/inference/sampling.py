"""Logits in, the next token out: the most likely one, or one drawn by temperature and top-p.

A draw is a number in [0, 1) that the caller brings, one per text: equal numbers give equal tokens on every rank, and an answer
does not depend on what else is in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
"""Beyond them quotients are infinite, or all the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Logits are divided by it; 0: always the most likely token."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability are drawn from."""
    seed: int = 0
    """Of the draws; text number b of a call has its own, whatever else is asked with it."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            wanted = f"0 (the most likely token), or {MIN_TEMPERATURE} to {MAX_TEMPERATURE}"
            raise ValueError(f"temperature is {self.temperature}: wanted {wanted}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: wanted above 0, at most 1 (all tokens)")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}: wanted 0 to 2^64 - 1")

    def stream(self, text: int) -> np.random.Generator:
        """The draws of one text, in order."""
        return np.random.default_rng((self.seed, text))


def choose(logits_BW: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
    """int64[B], a token for each row of logits over the whole vocabulary W. `draws_B`: float64[B] in [0, 1)."""
    if sampling.temperature == 0:
        return logits_BW.argmax(-1)
    likely_BW, ids_BW = (logits_BW.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    # A token stays while those before it have not reached top_p: so at least the first one does.
    likely_BW = likely_BW.masked_fill(likely_BW.cumsum(-1) - likely_BW >= sampling.top_p, 0.0)
    reached_BW = likely_BW.cumsum(-1)
    place_B1 = torch.searchsorted(reached_BW, draws_B[:, None] * reached_BW[:, -1:], right=True)
    return ids_BW.gather(-1, place_B1)[:, 0]
