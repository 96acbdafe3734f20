"""Every rank computes the same plan; nothing is lost, doubled or reordered by ranks, workers or resuming."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from himix_megatron.data.images.decode import decode
from himix_megatron.data.loading.batch import mask_samples
from himix_megatron.data.loading.image_table import ImageTable, divide_images
from himix_megatron.data.loading.loader import ReadSpec, StepReader, step_loader
from himix_megatron.data.loading.plan import Datasets, SamplingPlan, TrainingLength
from himix_megatron.data.loading.token_counts import text_lengths
from himix_megatron.data.shards.reader import ShardDataset
from tests.support import ROOT
from tests.support.data_fixtures import VISION, data_config, mixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mixed(tmp_path_factory.mktemp("mixed"), 26).path


class Steps:
    """The steps of a run as one rank reads them, by number."""

    def __init__(
        self, folders, *, text_only_vision="zero_image", batch=8, micro=2, data=None, seed=1234, pad_multiple=1, **reads
    ):
        folders = folders if isinstance(folders, list) else [folders]
        config = data or data_config()
        datasets = Datasets([ShardDataset(folder) for folder in folders], config, VISION)
        self.plan = SamplingPlan(
            datasets, config, seed=seed, global_batch=batch, images_without=1 if text_only_vision == "zero_image" else 0
        )
        reads = ReadSpec(**reads)
        self.reader = StepReader(self.plan, vision_config=VISION, micro_batch=micro, reads=reads, pad_multiple=pad_multiple)

    def plans(self, first=0, last=1000):
        return itertools.islice(self.plan.steps(TrainingLength(last, None)), first, None)

    def __getitem__(self, step):
        return self.reader[next(self.plans(step))]


def keys(batch) -> list[str]:
    return [key for micro_batch in batch.micro_batches for key in micro_batch.keys]


def assert_equal(a, b):
    assert (a.step, a.bad_keys, a.bad_samples, a.num_cut) == (b.step, b.bad_keys, b.bad_samples, b.num_cut)
    assert torch.equal(a.pixels, b.pixels)
    assert torch.equal(a.blank, b.blank)
    for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
        assert (x.keys, x.images) == (y.keys, y.images)
        assert torch.equal(x.text_ids, y.text_ids)
        assert torch.equal(x.labels, y.labels)
        assert torch.equal(x.text_lengths, y.text_lengths)


def test_epochs_are_complete_over_steps(folder):
    """13 steps of 8 are 4 epochs of 26, batches across their borders included."""
    seen = [key for step in range(13) for key in keys(Steps(folder)[step])]
    for epoch in range(4):
        assert len(set(seen[epoch * 26 : (epoch + 1) * 26])) == 26


@pytest.mark.parametrize("data_size", [2, 4])
def test_data_ranks_share_out_the_same_global_batch(folder, data_size):
    """Micro-batch j of rank r is the (j * D + r)-th run of it."""
    for step in (0, 3, 40):
        whole = Steps(folder)[step].micro_batches
        for rank in range(data_size):
            mine = Steps(folder, data_rank=rank, data_size=data_size)[step].micro_batches
            assert [m.keys for m in mine] == [m.keys for m in whole[rank::data_size]]


def test_a_batch_that_does_not_divide_is_refused(folder):
    with pytest.raises(ValueError, match=r"8\) is not a multiple of 3 data-parallel ranks"):
        Steps(folder, data_size=3)


@pytest.mark.parametrize("replica_size", [2, 3, 8])
@pytest.mark.parametrize("text_only_vision", ["zero_image", "none"])
def test_a_replicas_ranks_decode_each_image_once(folder, replica_size, text_only_vision):
    whole = Steps(folder, text_only_vision=text_only_vision)[1]
    parts = [
        Steps(folder, text_only_vision=text_only_vision, image_rank=r, image_size=replica_size)[1] for r in range(replica_size)
    ]
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    for part in parts:
        assert torch.equal(part.blank, whole.blank)
        assert torch.equal(part.micro_batches[2].text_ids, whole.micro_batches[2].text_ids)


def test_images_stand_in_the_order_of_their_samples(folder):
    dataset = ShardDataset(folder)
    number = {dataset.key(i): i for i in range(len(dataset))}
    for text_only_vision, without in (("zero_image", 1), ("none", 0)):
        batch = Steps(folder, text_only_vision=text_only_vision)[0]
        images = iter(zip(batch.pixels, batch.blank, strict=True))
        for micro_batch in batch.micro_batches:
            for key, count in zip(micro_batch.keys, micro_batch.images.per_sample, strict=True):
                i = number[key]
                assert count == (dataset.num_images(i) or without)
                for k in range(count):
                    pixels, blank = next(images)
                    assert blank == (dataset.num_images(i) == 0)
                    if blank:
                        assert not pixels.any()
                    else:
                        assert pixels.tolist() == decode(dataset.image_bytes(i, k), VISION, "fast").tolist()
        assert next(images, None) is None


def test_labels_are_the_next_tokens_of_answers_only(folder):
    batch = Steps(folder, pad_multiple=8)[0]
    lengths = {m.text_ids.shape[1] for m in batch.micro_batches}
    assert len(lengths) == 1  # one S for the step
    assert lengths.pop() % 8 == 0
    for micro_batch in batch.micro_batches:
        for ids, labels, length, key in zip(
            micro_batch.text_ids, micro_batch.labels, micro_batch.text_lengths, micro_batch.keys, strict=True
        ):
            answered = labels[labels != -100].tolist()
            assert bytes(answered[:-1]).decode() == f"It is {int(key[-9:])}."
            assert answered[-1] == 259
            places = (labels != -100).nonzero().flatten()
            assert torch.equal(ids[places[:-1] + 1], labels[places[:-1]])
            assert places[-1] + 2 == length
            assert not ids[length:].any()
            assert (labels[length - 1 :] == -100).all()


def test_cut_texts_are_counted(folder):
    assert Steps(folder)[0].num_cut == 0
    batch = Steps(folder, data=data_config(max_text_tokens=20))[0]
    assert batch.num_cut == 8
    assert batch.micro_batches[0].text_ids.shape == (2, 20)


@pytest.mark.parametrize(("num_images", "ranks"), [(0, 1), (0, 3), (1, 4), (7, 2), (8, 3), (9, 4), (100, 7)])
def test_shares_cover_the_images_in_order(num_images, ranks):
    shares = divide_images(ImageTable.of(VISION, [[VISION.blank_size] * num_images]), VISION, ranks)
    assert [n for share in shares for n in share] == list(range(num_images))
    assert max(len(share) for share in shares) == -(-num_images // ranks)


@pytest.fixture
def damaged(tmp_path):
    """A dataset whose first image of sample 2 and whose text of sample 5 have a flipped bit."""
    dataset = mixed(tmp_path, 16)
    text_lengths(dataset, "bytes", "tiny")  # counted when it was whole
    tar = dataset.path / "shards" / "rows-000000.tar"
    data = bytearray(tar.read_bytes())
    image, text = dataset._image(2, 0)[1], dataset._sample(5)[1]
    for record in (image, text):
        data[record.offset + 20] ^= 1
    tar.write_bytes(data)
    return dataset.path


def test_a_bad_sample_keeps_its_slot_without_loss(damaged, caplog):
    batch, whole_keys = Steps(damaged, batch=16, micro=4)[0], None
    bad_image, bad_text = "rows-000000/000000002", "rows-000000/000000005"
    assert sorted(batch.bad_keys) == [bad_image, bad_text]
    assert all(f"{key} is left out of the loss" in caplog.text for key in (bad_image, bad_text))
    whole_keys = keys(batch)
    assert len(set(whole_keys)) == 16
    assert [whole_keys[slot] for slot in batch.bad_samples] == list(batch.bad_keys)
    for key, labels in zip(whole_keys, torch.cat([m.labels for m in batch.micro_batches]), strict=True):
        assert (labels == -100).all() == (key in batch.bad_keys)
    counts = [count for m in batch.micro_batches for count in m.images.per_sample]
    for key, start, count in zip(whole_keys, itertools.accumulate([0, *counts]), counts, strict=False):
        if key in batch.bad_keys:
            assert batch.blank[start : start + count].all()
            assert not batch.pixels[start : start + count].any()


def test_ranks_of_a_replica_can_agree_on_bad_images(damaged):
    """A damaged image is seen by one rank; the union, applied on each, gives what one rank alone would have."""
    alone = Steps(damaged, batch=16, micro=4)[0]
    parts = [Steps(damaged, batch=16, micro=4, image_rank=r, image_size=2)[0] for r in range(2)]
    assert sorted(len(part.bad_samples) for part in parts) == [1, 2]
    union = {slot for part in parts for slot in part.bad_samples}
    assert union == set(alone.bad_samples)
    for part in parts:
        agreed = mask_samples(part, union)
        for mine, wanted in zip(agreed.micro_batches, alone.micro_batches, strict=True):
            assert torch.equal(mine.labels, wanted.labels)


def test_a_missing_disk_is_not_a_bad_sample(tmp_path):
    opened = Steps(mixed(tmp_path, 16).path)
    (tmp_path / "shards" / "shards" / "rows-000000.tar").unlink()
    (tmp_path / "shards" / "shards" / "rows-000001.tar").unlink()
    opened.plan.datasets.parts[0]._tars.clear()
    with pytest.raises(FileNotFoundError, match="rows-00000"):
        opened[0]


def test_a_template_that_does_not_suit_is_refused_before_training(folder):
    with pytest.raises(ValueError, match=r"chatml needs <\|im_start\|>"):
        Steps(folder, data=data_config(template="chatml"))


def test_workers_and_resuming_change_nothing(folder):
    wanted = [Steps(folder)[step] for step in range(6)]
    for first, workers in ((0, 0), (0, 2), (4, 2)):
        read = list(step_loader(Steps(folder).reader, Steps(folder).plans(first, 6), workers))
        assert [batch.step for batch in read] == list(range(first, 6))
        for mine, other in zip(read, wanted[first:], strict=True):
            assert_equal(mine, other)


def test_reading_leaves_the_random_state_alone(folder):
    torch.manual_seed(3)
    wanted = torch.get_rng_state()
    for workers in (0, 1):
        next(step_loader(Steps(folder).reader, Steps(folder).plans(0, 2), workers))
        assert torch.equal(torch.get_rng_state(), wanted)


# A training process: gloo is up (with its threads) before workers start, as in every run.
TRAINING = """
import os, sys, time
import torch
from himix_megatron.data.loading.loader import step_loader
from tests.data.test_loader import Steps

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
    torch.distributed.all_reduce(torch.ones(1000))
    torch.randn(300, 300) @ torch.randn(300, 300)
    batches = step_loader(Steps(sys.argv[1]).reader, Steps(sys.argv[1]).plans(), 2)
    for _ in range(3):
        next(batches)
    print("READY", *[worker.pid for worker in batches._workers], flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_workers_start_after_gloo_and_die_with_their_parent(folder, tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(script), str(folder), str(tmp_path / "rendezvous")]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as training:
        try:
            ready, *workers = training.stdout.readline().split()
            assert ready == "READY"
            assert len(workers) == 2
            assert all(alive(int(worker)) for worker in workers)
        finally:
            training.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(alive(int(worker)) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(int(worker)) for worker in workers)
