"""However a replica shares its tower, every rank sees what one rank alone computes, and training goes the same way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from himix_megatron.config import Config, InjectionConfig, VisionConfig
from himix_megatron.data.loading.image_table import ImageTable, blank_pixels, image_share
from himix_megatron.model.feature_prefetch import FeaturePrefetcher
from himix_megatron.model.towers import build_tower
from himix_megatron.model.vision_encoder import ShardedVisionEncoder, feature_ranks
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, native, small_config, train

TOWER = VisionConfig(
    tower="tiny",
    image_size=16,
    patch_size=8,
    hidden_size=12,
    num_layers=2,
    num_attention_heads=3,
    ffn_hidden_size=40,
    feature_layer=-1,
)


NATIVE = replace(TOWER, tower="tiny_native", image_size=32)


def _pixels(num_images: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_images, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _images(num_images: int) -> ImageTable:
    return ImageTable.of(TOWER, [[TOWER.blank_size]] * num_images)


Ranks = tuple[int, ...]


def _encode(
    num_images: int, trainable: bool, dtype: torch.dtype, num_encoders: int | None, receivers: Ranks | None
) -> torch.Tensor:
    """What one rank of the replica gets; alone when no group exists."""
    world = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if world else (0, 1)
    place = (rank, min(num_encoders or size, size))
    images = _images(num_images)
    share = image_share(images, TOWER, *place)
    encoder = ShardedVisionEncoder(
        build_tower(TOWER, seed=3, dtype=torch.float32),
        torch.distributed.group.WORLD if world else None,
        trainable,
        dtype,
        place=place,
        receivers=receivers if world else None,
        max_images_per_forward=2,
    )
    return encoder.encode(_pixels(num_images)[share], torch.arange(num_images) % 3 == 1, images)


def _encode_all(num_encoders: int | None, receivers: Ranks | None = None) -> list[torch.Tensor]:
    given = [(images, False, torch.float32) for images in (7, 4, 1, 0)] + [(5, False, torch.bfloat16), (5, True, torch.float32)]
    return [_encode(*case, num_encoders, receivers) for case in given]


@pytest.mark.parametrize(("world_size", "num_encoders"), [(2, None), (3, None), (3, 2), (2, 1)])
def test_a_shared_tower_gives_every_rank_what_one_rank_alone_computes(world_size: int, num_encoders: int | None) -> None:
    alone = _encode_all(None)
    assert [len(features) for features in alone] == [28, 16, 4, 0, 20, 5]
    assert alone[-2].dtype == torch.bfloat16
    assert torch.equal(alone[-1], _pixels(5))
    for rank_features in run_ranks(_encode_all, world_size, num_encoders):
        for got, wanted in zip(rank_features, alone, strict=True):
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            assert torch.allclose(got.float(), wanted.float(), atol=1e-2 if got.dtype == torch.bfloat16 else 1e-6)


def _encode_for(cases: list[tuple[int | None, Ranks | None]]) -> list[list[torch.Tensor]]:
    return [_encode_all(*case) for case in cases]


def test_ranks_of_stages_without_vision_encode_and_receive_nothing() -> None:
    """Of two tensor ranks on each of two stages: all encode, or those of the first stage alone."""
    cases = [(encoders, receivers) for encoders in (None, 2) for receivers in (None, (0, 1), (2, 3), (1,))]
    for rank, found in enumerate(run_ranks(_encode_for, 4, cases)):
        for (encoders, receivers), of_case in zip(cases, found, strict=True):
            for got, wanted in zip(of_case, found[0 if encoders is None else 4], strict=True):
                assert got.dtype == wanted.dtype
                assert torch.equal(got, wanted if receivers is None or rank in receivers else wanted[:0])


def _encode_shapes(trainable: bool, receivers: Ranks | None = None) -> torch.Tensor:
    """What one rank gets of nine images of different sizes, one of them blank; alone when no group exists."""
    draw, world = np.random.default_rng(0), torch.distributed.is_initialized()
    images = ImageTable.of(NATIVE, [[NATIVE.input_size(*draw.integers(4, 90, 2).tolist()) for _ in range(9)]])
    assert len(set(images.tokens)) > 4
    rows = images.rows(pixels := blank_pixels(images, NATIVE))
    pixels.copy_(torch.from_numpy(draw.integers(0, 256, len(pixels), dtype=np.uint8)))
    place = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if world else (0, 1)
    share = torch.cat([part for k, part in enumerate(torch.split(pixels, rows)) if k in image_share(images, NATIVE, *place)])
    tower = build_tower(NATIVE, seed=3, dtype=torch.float32)
    group = torch.distributed.group.WORLD if world else None
    encoder = ShardedVisionEncoder(
        tower, group, trainable, torch.float32, place=place, receivers=receivers if world else None, max_images_per_forward=1
    )
    return encoder.encode(share, torch.arange(9) == 4, images)


@pytest.mark.parametrize("trainable", [False, True])
def test_images_of_different_sizes_come_back_in_their_order(trainable: bool) -> None:
    alone = _encode_shapes(trainable)
    for found in run_ranks(_encode_shapes, 3, trainable):
        assert found.dtype == alone.dtype
        assert torch.allclose(found.float(), alone.float(), atol=1e-6)
    for rank, found in enumerate(run_ranks(_encode_shapes, 3, trainable, (0, 2))):
        assert torch.allclose(found.float(), (alone[:0] if rank == 1 else alone).float(), atol=1e-6)


def test_the_ranks_of_stages_with_an_injecting_layer_receive() -> None:
    config = small_config(Path("unused"), Path("unused"), parts=("vision_kv",), tensor=2, pipeline=2)
    assert config.model.num_layers == 4

    def receiving(interleaved: int = 1, **choices: Any) -> Ranks:
        parallel = replace(config.parallel, virtual_pipeline=interleaved)
        return feature_ranks(replace(config, parallel=parallel, injection=InjectionConfig(**choices)))

    assert receiving() == receiving(every_layers=2) == receiving(layers=(1, 2)) == (0, 1, 2, 3)
    assert receiving(layers=(1,)) == (0, 1)
    assert receiving(layers=(2,)) == receiving(every_layers=4) == (2, 3)
    # Stage 0 has layers 0 and 2 here, stage 1 has 1 and 3.
    assert receiving(2, layers=(0, 2)) == (0, 1)
    assert receiving(2, every_layers=2) == (2, 3)


# ---- ahead of the training ---------------------------------------------------------------------------------------------


def _shifted(number: int) -> tuple[int, torch.Tensor]:
    if number == 3:
        raise OSError("the disk is gone")
    return number, torch.tensor(number + 10)


@pytest.mark.parametrize("enabled", [True, False])
def test_steps_come_in_order_and_an_error_at_its_own_step(enabled: bool) -> None:
    prefetcher = FeaturePrefetcher(torch.device("cpu"), enabled=enabled)
    steps = prefetcher.steps(range(3), _shifted)
    assert [(number, int(features)) for number, features in steps] == [(0, 10), (1, 11), (2, 12)]
    got: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        got.extend(number for number, _ in prefetcher.steps(range(5), _shifted))
    steps = prefetcher.steps(range(5), _shifted)
    assert [next(steps)[0] for _ in range(3)] == [0, 1, 2]  # the third is given out though the fourth has failed already
    prefetcher.drain()


def test_exactly_the_next_step_is_encoded_on_another_thread_while_one_trains() -> None:
    begun: list[tuple[int, int]] = []
    arrived = threading.Semaphore(0)

    def encode(number: int) -> tuple[int, torch.Tensor]:
        begun.append((number, threading.get_ident()))
        arrived.release()
        return number, torch.zeros(())

    prefetcher = FeaturePrefetcher(torch.device("cpu"))
    for number, _ in prefetcher.steps(range(4), encode):
        assert arrived.acquire(timeout=10)
        if number < 3:
            assert arrived.acquire(timeout=10)  # the next one's turn has come before this one is done
            arrived.release()
        prefetcher.drain()
        assert [n for n, _ in begun] == list(range(min(number + 2, 4)))
    assert threading.get_ident() not in {thread for _, thread in begun}


def test_a_step_nobody_takes_any_more_is_waited_for() -> None:
    done: list[int] = []

    def batches() -> Iterator[int]:
        yield from range(100)

    prefetcher = FeaturePrefetcher(torch.device("cpu"))
    for number, _ in prefetcher.steps(batches(), lambda n: (done.append(n) or n, torch.zeros(()))):
        if number == 2:
            break
    prefetcher.drain()
    assert done == [0, 1, 2, 3]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_wait_for_a_slow_read_is_measured_and_no_other_time(enabled: bool) -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.2)
            yield number

    prefetcher = FeaturePrefetcher(torch.device("cpu"), enabled=enabled)
    waited = []
    for _ in prefetcher.steps(batches(), lambda number: (number, torch.zeros(()))):
        waited.append(prefetcher.take_waited_seconds())
        time.sleep(0.3)
    assert waited[0] >= 0.19
    assert all(seconds < 0.15 if enabled else seconds >= 0.19 for seconds in waited[1:]), waited


@pytest.mark.requires_gpu
def test_a_side_stream_gives_the_same_features() -> None:
    device = torch.device("cuda")
    encoder = ShardedVisionEncoder(build_tower(TOWER, seed=3, dtype=torch.float32).to(device), None, False, torch.float32)

    def encode(number: int) -> tuple[int, torch.Tensor]:
        return number, encoder.encode(_pixels(40 + number), torch.zeros(40 + number, dtype=torch.bool), _images(40 + number))

    sums: dict[bool, list[float]] = {}
    for enabled in (True, False):
        steps = FeaturePrefetcher(device, enabled=enabled).steps(range(20), encode)
        sums[enabled] = [float((features @ features.mT).sum()) for _, features in steps]
    assert sums[True] == sums[False]


# ---- training ----------------------------------------------------------------------------------------------------------

PLACEMENTS: dict[str, dict[str, Any]] = {
    "replicated": {"encoder_placement": "replicated"},
    "first_stage": {"encoder_placement": "first_stage"},
    "not ahead": {"prefetch_features": False},
}


LAST_STAGE = InjectionConfig(layers=(2, 3), reduce="pool")
FIRST_STAGE = InjectionConfig(
    fusion="tokens", adapter="shared", keys_values="text", norm="input", key_norm="shared", position="rotary",
    visibility="earlier",
)  # fmt: skip
"""What makes only these take vision."""


def _train_each(config: Config, folder: Path) -> None:
    """A run in each placement, and the default one."""
    for name, changes in {"replica_sharded": {}, **PLACEMENTS}.items():
        train(replace(config, vision=replace(config.vision, **changes), run=replace(config.run, dir=str(folder / name))))


@pytest.mark.parametrize(
    ("world_size", "parts", "layout", "packed", "shape"),
    [
        (2, ("vision_kv",), {"pipeline": 2}, False, "fixed"),
        (2, ("vision_kv",), {"pipeline": 2, "injection": LAST_STAGE}, True, "native"),
        (2, ("tower", "vision_kv"), {"pipeline": 2, "injection": FIRST_STAGE}, False, "native"),
        (2, ("vision_kv",), {"pipeline": 2}, True, "fixed"),
        (4, ("language", "vision_kv"), {"tensor": 2, "pipeline": 2}, True, "fixed"),
        (2, ("tower", "vision_kv"), {"pipeline": 2}, False, "fixed"),
        (3, ("vision_kv",), {"pipeline": 3, "split": "balanced"}, True, "native"),
        (2, ("tower", "vision_kv"), {"pipeline": 2}, False, "native"),
    ],
)
def test_every_placement_trains_alike(
    world_size: int,
    parts: tuple[Any, ...],
    layout: dict[str, Any],
    packed: bool,
    shape: str,
    mixed_dataset: Path,
    shapes_dataset: Path,
    tmp_path: Path,
) -> None:
    data = mixed_dataset if shape == "fixed" else shapes_dataset
    steps = 4 if shape == "fixed" else 2
    choices = {"injection": layout["injection"]} if "injection" in layout else {}
    layout = {name: value for name, value in layout.items() if name != "injection"}
    config = small_config(data, tmp_path, parts=parts, text_only_vision="zero_image", steps=steps, **layout)
    config = replace(config if shape == "fixed" else native(config), **choices)
    if packed:
        config = replace(
            config,
            data=replace(config.data, pack_max_text_tokens=192, pack_max_vision_tokens=24 if shape == "fixed" else 72),
            train=replace(config.train, global_batch_packs=2),
        )
    config = replace(
        config,
        data=replace(config.data, validation_path=str(data)),
        log=replace(config.log, validation_interval_steps=2, validation_samples=16),
    )
    run_ranks(_train_each, world_size, config, tmp_path, start_gloo=False)
    wanted = history(tmp_path / "replica_sharded")
    for name in PLACEMENTS:
        found = history(tmp_path / name)
        for tag in ("train/loss", "validation/loss"):
            assert found[tag] == pytest.approx(wanted[tag], abs=1e-5), (name, tag)
    # The same sums in the same order: looking ahead changes no bit.
    assert history(tmp_path / "not ahead")["train/loss"] == wanted["train/loss"]


def _tower_gradients(config: Config) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and the tower's gradients of one step; the gradients as every rank has them before its optimizer."""
    from himix_megatron.distributed.topology import init_distributed
    from himix_megatron.model.himix_model import unwrap_model
    from himix_megatron.runtime import log
    from himix_megatron.training import builder, train_step
    from himix_megatron.training.data_setup import prepare_inputs, step_reader
    from himix_megatron.training.resume import expected_checkpoint, restore_or_initialize

    start = prepare_inputs(config, 1)
    topology = init_distributed(config.parallel, seed=config.train.seed)
    log.start(config.run_dir, topology.rank, topology.world_size)
    run = builder.build_components(config, start, topology)
    restore_or_initialize(config, start, expected_checkpoint(config, start.plan), run.checkpoints)
    reader = step_reader(config, start.plan, topology)
    batch, images = next(train_step.with_features(run, [reader[next(start.plan.steps(start.length))]]))
    for stage in run.model_chunks:
        stage.zero_grad_buffer()
    reported = train_step.run_schedule(run, batch, images, forward_only=False)
    counts, *_ = train_step.count(topology, batch, reported)
    gradients = {name: p.main_grad.clone() for name, p in unwrap_model(run.model_chunks[0]).tower.named_parameters()}
    return counts.loss, gradients


@pytest.fixture(scope="module")
def begun(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings of a run that starts from stored weights: layouts draw fresh ones differently."""
    folder = tmp_path_factory.mktemp("begun")
    config = small_config(mixed_dataset, folder, parts=("tower", "vision_kv", "language"), steps=1)
    run_ranks(train, 1, config, start_gloo=False)
    return replace(config, checkpoint=replace(config.checkpoint, init_from=str(folder)))


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["tensor 2", "pipeline 2", "data 2"])
def test_a_trainable_towers_gradients_equal_those_of_one_rank(layout: dict[str, Any], begun: Config, tmp_path: Path) -> None:
    def settings(name: str, **layout: Any) -> Config:
        return replace(begun, parallel=replace(begun.parallel, **layout), run=replace(begun.run, dir=str(tmp_path / name)))

    ((loss, wanted),) = run_ranks(_tower_gradients, 1, settings("one"), start_gloo=False)
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert norm > 1e-3
    for found_loss, found in run_ranks(_tower_gradients, 2, settings("two", **layout), start_gloo=False):
        assert found_loss == pytest.approx(loss, abs=1e-5)
        difference = torch.stack([(found[name] - gradient).norm() for name, gradient in wanted.items()]).norm()
        assert difference <= 1e-4 * norm
