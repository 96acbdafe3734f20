"""Every epoch reads each sample once, at any shuffle and mixture, and any position costs the same."""

import time

import numpy as np
import pytest

from himix_megatron.data.loading.shuffle import PATTERN, Mixture, ShuffledOrder


@pytest.mark.parametrize("shards_at_once", [None, 1, 3, 100])
def test_an_epoch_is_each_sample_once(shards_at_once):
    order = ShuffledOrder([7, 0, 12, 3, 9, 1], 1, "f", shards_at_once)
    epochs = [order.take(epoch * 32, (epoch + 1) * 32) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(32)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_positions_are_the_same_however_they_are_asked_for():
    order = ShuffledOrder([50, 50], 1, "f")
    whole = order.take(0, 500)
    asked = np.random.default_rng(0).integers(0, 499, 60)
    assert all(
        order.take(first, first + 1 + first % 7).tolist() == whole[first : first + 1 + first % 7].tolist() for first in asked
    )
    assert order.take(13, 13).tolist() == []


@pytest.mark.parametrize(("seed", "fingerprint"), [(2, "f"), (1, "g")])
def test_seed_and_dataset_decide_the_order(seed, fingerprint):
    assert ShuffledOrder([100], 1, "f").take(0, 100).tolist() != ShuffledOrder([100], seed, fingerprint).take(0, 100).tolist()


def test_the_order_is_the_same_for_ever():
    """Written down once: a change here would change the data order of every run that is resumed."""
    assert ShuffledOrder([12], 1234, "f").take(0, 12).tolist() == [8, 6, 10, 4, 0, 3, 5, 7, 2, 9, 11, 1]
    assert ShuffledOrder([12], 1234, "f").take(84, 96).tolist() == [10, 1, 5, 0, 11, 6, 7, 3, 2, 8, 4, 9]


def test_the_order_looks_random():
    """Neighbours in the source are not neighbours in the order, and no place keeps its samples."""
    order = ShuffledOrder([20_000], 1, "f").take(0, 20_000)
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 expected
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03


def test_shuffled_shards_are_read_a_few_at_a_time():
    sizes = [100] * 40
    order = ShuffledOrder(sizes, 1, "f", shards_at_once=4)
    shards = order.take(0, 4000) // 100
    for group in range(10):
        own = shards[group * 400 : (group + 1) * 400]
        assert len(set(own)) == 4
        assert (np.diff(own) != 0).mean() > 0.6  # mixed, not one after the other
    assert order.take(0, 4000).tolist() != sorted(order.take(0, 4000))


def test_a_mixture_keeps_its_shares_everywhere():
    sizes, weights = [1000, 50, 333], [3.0, 1.0, 0.5]
    mixture = Mixture([ShuffledOrder([size], 1, f"set {d}") for d, size in enumerate(sizes)], weights)
    taken = mixture.take(0, 20_000)
    datasets = np.searchsorted([1000, 1050], taken, side="right")
    for d, weight in enumerate(weights):
        share = weight / sum(weights)
        counts = np.cumsum(datasets == d)
        # Never further from its share than its own place in the pattern allows.
        assert np.abs(counts - share * np.arange(1, 20_001)).max() < 2


def test_each_dataset_of_a_mixture_goes_through_its_own_epochs():
    sizes = [700, 50, 333]
    firsts = [0, 700, 750]
    mixture = Mixture([ShuffledOrder([size], 1, f"set {d}") for d, size in enumerate(sizes)], [2, 1, 1])
    # In pieces, over borders of the pattern too.
    taken = np.concatenate([mixture.take(first, first + 997) for first in range(0, 200 * 997, 997)])
    for d, size in enumerate(sizes):
        own = taken[(taken >= firsts[d]) & (taken < firsts[d] + size)] - firsts[d]
        for epoch in range(len(own) // size):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size
    assert len(taken) > 3 * PATTERN


def test_a_share_too_small_to_deal_out_is_refused():
    orders = [ShuffledOrder([10], 1, "a"), ShuffledOrder([10], 1, "b")]
    with pytest.raises(ValueError, match=r"data.weights: 1e-07 is less than 1/65536"):
        Mixture(orders, [1.0, 1e-7])


def test_a_far_position_costs_no_more_than_a_near_one():
    order = ShuffledOrder([1_000_000], 1, "f")

    def cost(position: int) -> float:
        started = time.perf_counter()
        order.take(position, position + 100)
        return time.perf_counter() - started

    near = min(cost(epoch * 1_000_000) for epoch in range(0, 6, 2))
    far = min(cost((10_000 + epoch) * 1_000_000 + 999_000) for epoch in range(0, 6, 2))
    assert far < 3 * near


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        ShuffledOrder([0], 1, "f")
