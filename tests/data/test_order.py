"""Every epoch reads every sample once, in an order of its own, the same for ever."""

import time

import numpy as np
import pytest

from himix_megatron.data.order import Order, permutation


def test_an_epoch_is_each_sample_once():
    order = Order(101, seed=1, fingerprint="f")
    for epoch in range(3):
        assert sorted(order[p] for p in range(epoch * 101, (epoch + 1) * 101)) == list(range(101))


def test_seed_epoch_and_dataset_change_the_order():
    base = permutation(1000, 1, 0, "f").tolist()
    assert base == permutation(1000, 1, 0, "f").tolist()
    for other in (permutation(1000, 2, 0, "f"), permutation(1000, 1, 1, "f"), permutation(1000, 1, 0, "g")):
        assert other.tolist() != base


def test_the_order_is_the_same_on_every_machine_and_version():
    """Written down once: a change here would change the data order of every run that is resumed."""
    assert permutation(12, 1234, 0, "f").tolist() == [8, 6, 10, 4, 0, 3, 5, 7, 2, 9, 11, 1]
    assert permutation(12, 1234, 7, "f").tolist() == [10, 1, 5, 0, 11, 6, 7, 3, 2, 8, 4, 9]


def test_the_order_looks_random():
    """Neighbours in the source are not neighbours in the order, and no place keeps its samples."""
    order = permutation(20_000, 1, 0, "f").astype(np.int64)
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 expected
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03


def test_a_far_position_costs_no_more_than_a_near_one():
    order = Order(100_000, 1, "f")
    start = time.perf_counter()
    order[10**13]
    assert time.perf_counter() - start < 1.0


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        Order(0, 1, "f")
