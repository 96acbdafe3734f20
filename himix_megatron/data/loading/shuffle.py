"""Positions in, sample numbers out. The order of all epochs is arithmetic: any rank can ask for any positions at any time.

Positions count samples since the start of training. Without weights an epoch is a permutation of all samples of all datasets.
With weights the positions are dealt out to the datasets in a fixed pattern, and each dataset goes through permutations of its
own. Permutations are drawn from (seed, epoch, dataset fingerprint). There is no state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]

PATTERN = 1 << 16
"""Positions after which the pattern of a mixture repeats: a dataset's share is exact to 1 / 65,536."""


class ShuffledOrder:
    """The order in which `sum(shard_sizes)` samples are read, epoch after epoch.

    `shards_at_once`: None shuffles all samples. A number shuffles the shards, and the samples within each group of so many
    shards: what is read at any time lies in few files.
    Raises: ValueError for no samples.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, fingerprint: str, shards_at_once: int | None = None) -> None:
        self.size, self._shard_sizes = sum(shard_sizes), np.array(shard_sizes, np.int64)
        if self.size < 1:
            raise ValueError("the dataset has no samples: its quarantine folder says why each row was left out")
        self.seed, self.fingerprint, self.shards_at_once = seed, fingerprint, shards_at_once
        self._epochs: dict[int, npt.NDArray[np.uint32]] = {}

    def take(self, first: int, end: int) -> Numbers:
        """int64[end - first]: the samples at positions first <= p < end. An epoch not asked for lately costs a permutation."""
        parts = []
        while first < end:
            epoch, start = divmod(first, self.size)
            stop = min(self.size, start + end - first)
            parts.append(self._epoch(epoch)[start:stop].astype(np.int64))
            first += stop - start
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _epoch(self, epoch: int) -> npt.NDArray[np.uint32]:
        if epoch not in self._epochs:
            if len(self._epochs) == 2:  # a step may reach into the next epoch
                del self._epochs[min(self._epochs, key=lambda known: abs(known - epoch + 0.5))]
            self._epochs[epoch] = self._permutation(epoch)
        return self._epochs[epoch]

    def _permutation(self, epoch: int) -> npt.NDArray[np.uint32]:
        if self.shards_at_once is None:
            return permutation(self.size, self.seed, epoch, self.fingerprint)
        shards = permutation(len(self._shard_sizes), self.seed, epoch, f"{self.fingerprint}/shards")
        starts = np.cumsum(self._shard_sizes) - self._shard_sizes
        words = random_words(self.size, self.seed, epoch, self.fingerprint)
        order, done = np.empty(self.size, np.uint32), 0
        for first in range(0, len(shards), self.shards_at_once):
            group = shards[first : first + self.shards_at_once]
            samples = np.concatenate([np.arange(starts[s], starts[s] + self._shard_sizes[s]) for s in group])
            end = done + len(samples)
            order[done:end] = samples[np.argsort(words[done:end], kind="stable")]
            done = end
        return order


class Mixture:
    """Several datasets dealt out by weight. Sample numbers count through the datasets, one after the other.

    `weights`: their shares in any unit. Raises: ValueError for a share too small to be dealt out.
    """

    def __init__(self, orders: Sequence[ShuffledOrder], weights: Sequence[float]) -> None:
        self._orders = list(orders)
        self.size = sum(order.size for order in orders)
        self._firsts = np.cumsum([0, *(order.size for order in orders)])[:-1]
        self._shares = _apportion(weights, PATTERN)
        if not all(self._shares):
            small = self._shares.index(0)
            raise ValueError(
                f"data.weights: {weights[small]} is less than 1/{PATTERN} of {sum(weights)}, too little to be dealt out"
            )
        # Dataset d's k-th place of n lies at (k + 1/2) / n of the pattern: as even as it can be.
        places = [((2 * k + 1) / (2 * n), d) for d, n in enumerate(self._shares) for k in range(n)]
        self._pattern = np.array([d for _, d in sorted(places)], np.int64)
        self._earlier = np.empty(PATTERN, np.int64)
        for d, n in enumerate(self._shares):
            self._earlier[self._pattern == d] = np.arange(n)

    def take(self, first: int, end: int) -> Numbers:
        """int64[end - first]: the samples at positions first <= p < end."""
        rounds, places = np.divmod(np.arange(first, end), PATTERN)
        datasets, taken = self._pattern[places], np.empty(end - first, np.int64)
        for d, order in enumerate(self._orders):
            mine = datasets == d
            if mine.any():
                numbers = rounds[mine] * self._shares[d] + self._earlier[places[mine]]
                # Positions rise, so a dataset's own are a run.
                taken[mine] = self._firsts[d] + order.take(int(numbers[0]), int(numbers[-1]) + 1)
        return taken


def permutation(size: int, seed: int, epoch: int, fingerprint: str) -> npt.NDArray[np.uint32]:
    """uint32[size]: the numbers 0 .. size - 1 in the order of one epoch."""
    return np.argsort(random_words(size, seed, epoch, fingerprint), kind="stable").astype(np.uint32)


def random_words(size: int, seed: int, epoch: int, fingerprint: str) -> npt.NDArray[np.uint64]:
    """uint64[size] of Philox's raw words: numpy keeps those the same for ever, but not what its Generator makes of them
    (NEP 19), and a run must see the same order after an upgrade."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{fingerprint}".encode()).digest()
    key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
    return np.random.Philox(key=key).random_raw(size)


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that sum to `total` (largest remainders)."""
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    shares = [int(share) for share in exact]
    rest = sorted(range(len(exact)), key=lambda d: shares[d] - exact[d])
    for d in rest[: total - sum(shares)]:
        shares[d] += 1
    return shares
