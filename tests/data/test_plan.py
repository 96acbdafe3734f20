"""The plan loses and repeats nothing, whatever is packed, mixed, left out or interrupted; and a place is four numbers."""

import dataclasses
import itertools
import json
import pickle
import time

import numpy as np
import pytest

from himix_megatron.data.loading.plan import START, WINDOW, DataPosition, Datasets, SamplingPlan, TrainingLength
from tests.support.data_fixtures import VISION, data_config, make, mixed, row

FOREVER = TrainingLength(10**9, None)


class Numbers(Datasets):
    """Datasets of so many samples, with lengths and images drawn here: a plan needs nothing else of them."""

    def __init__(self, *sizes: int, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.parts = [_Part(size, f"set {d}") for d, size in enumerate(sizes)]
        self.ends = np.cumsum(sizes)
        self.text_tokens = draw.integers(3, 60, sum(sizes)).astype(np.uint32)
        self.images = draw.choice([0, 1, 1, 1, 2], sum(sizes)).astype(np.uint32)
        self.vision = VISION


@dataclasses.dataclass
class _Part:
    size: int
    fingerprint: str
    is_remote: bool = False

    def shard_sizes(self) -> list[int]:
        return [min(1000, self.size - first) for first in range(0, self.size, 1000)]

    def __len__(self) -> int:
        return self.size


PACKED = {"pack_max_text_tokens": 200, "pack_max_vision_tokens": 24}


def plan_of(numbers, batch=8, without=0, **config):
    return SamplingPlan(numbers, data_config(**config), seed=1234, global_batch=batch, images_without=without)


def samples(steps):
    return [int(sample) for step in steps for pack in step.packs for sample in pack]


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["unpacked", "packed"])
@pytest.mark.parametrize("shuffle", ["samples", "shards"])
@pytest.mark.parametrize("sizes", [(9_000,), (700, 4_500)], ids=["one", "two datasets"])
def test_every_epoch_reads_each_sample_once(packing, shuffle, sizes):
    plan = plan_of(Numbers(*sizes), shuffle=shuffle, shuffle_shards=2, **packing)
    size = sum(sizes)
    read = samples(plan.steps(TrainingLength(None, 3 * size)))
    for epoch in range(3):
        assert len(set(read[epoch * size : (epoch + 1) * size])) == size


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["unpacked", "packed"])
def test_a_weighted_mixture_reads_each_dataset_epoch_by_epoch(packing):
    plan = plan_of(Numbers(300, 5_000), datasets=("a", "b"), weights=(1.0, 3.0), **packing)
    read = np.array(samples(itertools.islice(plan.steps(FOREVER), 3000)))
    # Packs reorder within a window only: whole windows hold whole stretches of each dataset's epochs.
    small = read[read < 300]
    for seen, expected in ((np.bincount(small, minlength=300), len(small) / 300),):
        assert seen.min() >= int(expected) - WINDOW // 300
    assert abs((read < 300).mean() - 0.25) < 0.02


@pytest.mark.parametrize("config", [{}, PACKED, {**PACKED, "datasets": ("a", "b"), "weights": (1.0, 2.0)}], ids=str)
def test_from_any_place_it_goes_on_as_if_never_stopped(config):
    datasets = Numbers(5_000, 700)
    whole = list(itertools.islice(plan_of(datasets, **config).steps(FOREVER), 1500))
    places = [(0, START)] + [(step.step + 1, step.after) for step in whole]
    for step, place in places[::97] + places[500:505]:
        place = DataPosition(**json.loads(json.dumps(dataclasses.asdict(place))))
        again = itertools.islice(plan_of(datasets, **config).steps(FOREVER, place, step), 5)
        for mine, other in zip(again, whole[step:], strict=False):
            assert mine.step == other.step
            assert mine.after == other.after
            assert [pack.tolist() for pack in mine.packs] == [pack.tolist() for pack in other.packs]


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["unpacked", "packed"])
def test_samples_behind_a_place_are_those_that_were_read(packing):
    plan = plan_of(Numbers(5_000), **packing)
    read = 0
    for step in itertools.islice(plan.steps(FOREVER), 2000):
        read += step.num_samples
        assert step.after.samples == read
    assert read > 5_000  # into the second epoch


@pytest.mark.parametrize("data_size", [1, 2, 4, 8])
@pytest.mark.parametrize("packing", [{}, PACKED], ids=["unpacked", "packed"])
def test_data_ranks_share_out_the_same_global_batch(data_size, packing):
    micro = 1 if packing else 2
    step = next(plan_of(Numbers(5_000), batch=16, **packing).steps(FOREVER))
    shares = [step.share(rank, data_size, micro) for rank in range(data_size)]
    # Micro-batch j of rank r is the (j * D + r)-th run of the batch.
    dealt = [pack.tolist() for j in range(len(shares[0])) for rank in range(data_size) for pack in shares[rank][j]]
    assert dealt == [pack.tolist() for pack in step.packs]


def test_packs_keep_both_budgets():
    datasets = Numbers(5_000)
    for without in (0, 1):
        plan = plan_of(datasets, without=without, **PACKED)
        for step in itertools.islice(plan.steps(FOREVER), 100):
            for pack in step.packs:
                assert datasets.text_tokens[pack].sum() <= 200
                assert np.maximum(datasets.images[pack], without).sum() <= 6


def test_a_run_ends_with_the_step_that_reaches_its_samples():
    plan = plan_of(Numbers(1_000), batch=64)
    steps = list(plan.steps(TrainingLength(None, 2_500)))
    assert [step.is_last for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-2].after.samples < 2_500 <= steps[-1].after.samples
    assert len(steps) == plan.expected_steps(TrainingLength(None, 2_500)) == 40
    assert list(plan.steps(TrainingLength(None, 2_500), steps[-1].after, 40)) == []


def test_expected_steps_of_packs_are_close():
    plan = plan_of(Numbers(20_000), **PACKED)
    end = TrainingLength(None, 40_000)
    assert plan.expected_steps(end) == pytest.approx(len(list(plan.steps(end))), rel=0.02)


def test_long_samples_are_cut_or_left_out_as_asked():
    datasets = Numbers(1_000)
    cut = plan_of(datasets, max_text_tokens=30)
    assert cut.text_tokens.max() == 30
    assert cut.left_out == {}
    dropped = plan_of(datasets, max_text_tokens=30, overlong="drop", batch=10)
    longer = int((datasets.text_tokens > 30).sum())
    assert dropped.left_out == {"too_long": longer}
    steps = list(dropped.steps(TrainingLength(None, 1_000)))
    read = samples(steps)[: 1_000 - longer]
    assert len(set(read)) == 1_000 - longer
    assert datasets.text_tokens[read].max() <= 30
    assert steps[-1].after.samples >= 1_000  # those left out count as behind it


def test_a_sample_with_more_images_than_a_pack_is_left_out_and_counted():
    datasets = Numbers(1_000)
    plan = plan_of(datasets, pack_max_text_tokens=200, pack_max_vision_tokens=7)
    assert plan.left_out == {"too_many_vision_tokens": int((datasets.images > 1).sum())}


def test_texts_without_a_place_in_the_template_are_refused_when_many_and_left_out_when_few():
    datasets = Numbers(1_000)
    datasets.text_tokens[[3, 500]] = 0
    assert plan_of(datasets).left_out == {"no_place_in_template": 2}
    assert not {3, 500} & set(samples(plan_of(datasets).steps(TrainingLength(None, 2_000))))
    datasets.text_tokens[:11] = 0
    with pytest.raises(ValueError, match=r"data.template tiny has no place for 12 of 1000 samples"):
        plan_of(datasets)


def test_nothing_left_to_read_is_refused():
    with pytest.raises(ValueError, match=r"of 1000 samples none can be read: no_place_in_template: 0, too_long: 1000"):
        plan_of(Numbers(1_000), max_text_tokens=1, overlong="drop")


def test_what_fixes_the_order_is_named_and_small(tmp_path):
    """The state that a checkpoint holds, for forty datasets."""
    plan = plan_of(Numbers(*[100] * 40), datasets=("p",) * 40, weights=(1.0,) * 40, **PACKED)
    state = {"place": dataclasses.asdict(START), "data": plan.fingerprint_fields()}
    assert len(json.dumps(state)) < 4096
    named = {"data.datasets", "data.weights", "data.template", "data.tokenizer", "train.seed", "data.pack_max_vision_tokens"}
    assert named <= plan.fingerprint_fields().keys()


def test_resuming_costs_the_same_at_any_step():
    """Time to the first batch of a packed run over ten million samples, near the start and nine epochs later."""
    datasets = Numbers(10_000_000)
    costs = {}
    for epoch in (0, 9):
        started = time.perf_counter()
        next(plan_of(datasets, **PACKED).steps(FOREVER, DataPosition(epoch * 10_000_000 + 8_192, epoch, 2), 10**6 * epoch))
        costs[epoch] = time.perf_counter() - started
    assert costs[9] < 2 * costs[0] + 0.5, costs


def test_workers_are_not_sent_what_packs_are_planned_from(tmp_path):
    datasets = Datasets([mixed(tmp_path, 12)], data_config(), VISION)
    before = len(pickle.dumps(datasets))
    assert datasets.vision_tokens.tolist() == [4 * number for number in datasets.images.tolist()]
    assert len(pickle.dumps(datasets)) == before


def test_a_real_dataset_gives_its_own_counts(tmp_path):
    dataset = mixed(tmp_path / "a", 24)
    other = make(tmp_path / "b", *_texts_only(tmp_path))
    both = Datasets([dataset, other], data_config(), VISION)
    assert len(both) == 30
    assert both.images.tolist() == [dataset.num_images(i) for i in range(24)] + [0] * 6
    assert both.key(25) == other.key(1)
    assert [both.source(i) for i in (0, 23, 24, 29)] == [0, 0, 1, 1]


def test_places_of_images_are_found_by_the_sample_in_every_dataset_and_in_a_worker(tmp_path):
    dataset, other = make(tmp_path / "texts", *_texts_only(tmp_path)), mixed(tmp_path / "a", 24)
    both = Datasets([dataset, other], data_config(), VISION)
    wanted = [()] * 6 + [(2,) * other.num_images(i) for i in range(24)]
    for datasets in (both, pickle.loads(pickle.dumps(both))):
        assert [datasets.image_places(i) for i in range(30)] == wanted


def _texts_only(folder):
    annotations, images = folder / "texts.json", folder / "none"
    images.mkdir()
    annotations.write_text(json.dumps([row(i, None) for i in range(6)]))
    return annotations, images
