"""Position in, sample number out. The order of all epochs is arithmetic: any rank can ask for any position at any time.

Positions count samples since the start of training: position p is the (p mod n)-th of epoch p // n, for n samples. Each
epoch is a permutation drawn from (seed, epoch, dataset fingerprint). There is no state to save.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt


class Order:
    """The order in which a dataset of `size` samples is read."""

    def __init__(self, size: int, seed: int, fingerprint: str) -> None:
        if size < 1:
            raise ValueError("the dataset has no samples: its quarantine folder says why each row was left out")
        self.size, self.seed, self.fingerprint = size, seed, fingerprint

    def __getitem__(self, position: int) -> int:
        """The sample at a position. Costs one permutation when its epoch was not asked for lately."""
        epoch, index = divmod(position, self.size)
        return int(permutation(self.size, self.seed, epoch, self.fingerprint)[index])


@functools.lru_cache(maxsize=2)  # a step may reach into the next epoch
def permutation(size: int, seed: int, epoch: int, fingerprint: str) -> npt.NDArray[np.uint32]:
    """uint32[size]: the numbers 0 .. size - 1 in the order of one epoch.

    The order of Philox's raw words: numpy keeps those the same for ever, but not what its Generator makes of them
    (NEP 19), and a run must see the same order after an upgrade.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{fingerprint}".encode()).digest()
    key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.uint32)
