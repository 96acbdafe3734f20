"""Numbers in TensorBoard are true: recomputed from the sample ledger, worked by hand, or the same at every layout."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from himix_megatron.config import METHODS, Config, ParallelConfig
from himix_megatron.costs.flops import decoder_layers
from himix_megatron.data.loading.batch import MicroBatch
from himix_megatron.data.loading.image_table import ImageTable
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.model.loss import answer_loss
from himix_megatron.monitoring.metrics import RankSums, StepCounts, fill_points, pipeline_points, source_points
from himix_megatron.monitoring.pipeline_timers import ScheduleTimers
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, small_config, train

BEGIN, END = 20, 30
"""Reports between which nothing but steps happened in the watched run."""
Line = dict[str, Any]


def points(run: Path) -> dict[str, dict[int, ScalarEvent]]:
    """Points by tag and step."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {point.step: point for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def ledger(run: Path, first: int, last: int) -> list[Line]:
    """The samples of some steps, over all replicas."""
    files = sorted((run / "ledger").glob("rank-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if first <= line["step"] <= last]


def test_rates_agree_with_the_ledger(watched_run: Config, run_dir: Path) -> None:
    found, samples = points(run_dir), ledger(run_dir, BEGIN + 1, END)
    # The clock of the event file, not the one that the rates were made with.
    seconds = found["train/loss"][END].wall_time - found["train/loss"][BEGIN].wall_time
    vision_tokens = sum(line["vision_tokens"] for line in samples)
    expected = {
        "text_tokens": sum(line["text_tokens"] for line in samples),
        "answer_tokens": sum(line["answer_tokens"] for line in samples),
        "vision_tokens": vision_tokens,
        "images": vision_tokens / watched_run.vision.max_tokens_per_image,
        "samples": len(samples),
    }
    for name, number in expected.items():
        assert number > 0
        assert found[f"throughput/{name}_per_second"][END].value == pytest.approx(number / seconds, rel=0.01), name
        each = found[f"throughput/{name}_per_second_per_rank"][END].value
        assert each == pytest.approx(number / seconds / 2, rel=0.01), name


def test_flops_are_those_worked_out_by_hand(watched_run: Config, run_dir: Path) -> None:
    """All of the decoder trains: three times the forward pass, but for the vision projections, whose input is the tower's and
    gets its gradient too; so three times as well. Attention is causal within the text. The tower trains: its patch embedding
    alone has no gradient for its input."""
    found, samples = points(run_dir), ledger(run_dir, BEGIN + 1, END)
    model, vision = watched_run.model, watched_run.vision
    H, F, V, Vh = model.hidden_size, model.ffn_hidden_size, model.vocab_size, vision.hidden_size
    q, kv = (heads * model.channels_per_head for heads in (model.num_attention_heads, model.num_query_groups))
    layer = head = 0.0
    for line in samples:
        s, n = line["text_tokens"], line["vision_tokens"]
        layer += 2 * s * (H * (q + 2 * kv) + q * H + 3 * H * F) + 2 * n * Vh * 2 * kv + 4 * q * (s * (s + 1) / 2 + s * n)
        head += 2 * line["answer_tokens"] * H * V
    decoder = 3 * (model.num_layers * layer + head)
    n = vision.max_tokens_per_image
    patches = 2 * n * 3 * vision.patch_size**2 * Vh
    layers = vision.num_layers + 1 + vision.feature_layer
    image = layers * (2 * n * (4 * Vh**2 + 2 * Vh * vision.ffn_hidden_size) + 4 * n * n * Vh) + patches
    tower = (3 * image - patches) * sum(line["vision_tokens"] for line in samples) / n
    seconds = found["train/loss"][END].wall_time - found["train/loss"][BEGIN].wall_time

    def at(tag: str) -> float:
        return found[f"compute/{tag}"][END].value

    assert at("decoder_tflops_per_second_per_rank") == pytest.approx(decoder / seconds / 2 / 1e12, rel=0.01)
    assert at("model_tflops_per_second_per_rank") == pytest.approx((decoder + tower) / seconds / 2 / 1e12, rel=0.01)
    assert at("model_tflops_per_second") == pytest.approx((decoder + tower) / seconds / 1e12, rel=0.01)
    assert at("decoder_mfu") == pytest.approx(decoder / seconds / 2 / 1e12 / 0.05, rel=0.01)
    assert at("model_mfu") == pytest.approx((decoder + tower) / seconds / 2 / 1e12 / 0.05, rel=0.01)


def test_mfu_is_not_written_where_no_peak_is_known(mixed_dataset: Path, tmp_path: Path) -> None:
    run_ranks(train, 1, small_config(mixed_dataset, tmp_path, parts=("vision_kv",), steps=1), start_gloo=False)
    assert "compute/model_tflops_per_second" in history(tmp_path)
    assert not [tag for tag in history(tmp_path) if "mfu" in tag]


def test_packs_are_filled_as_the_ledger_says(watched_run: Config, run_dir: Path) -> None:
    found, samples = points(run_dir), ledger(run_dir, BEGIN + 1, END)
    packs = (END - BEGIN) * watched_run.global_batch
    text = sum(line["text_tokens"] for line in samples) / (packs * 256)
    vision = sum(line["vision_tokens"] for line in samples) / (packs * 216)
    assert found["data/text_packing_efficiency"][END].value == pytest.approx(text)
    assert found["data/vision_packing_efficiency"][END].value == pytest.approx(vision)
    assert found["data/vision_tokens_per_image"][END].value == watched_run.vision.max_tokens_per_image


@pytest.mark.parametrize(("graphs", "text", "vision"), [("off", 200, 66), ("on", 256, 4096)])
def test_padding_is_what_is_computed_for_nobody(watched_run: Config, graphs: Any, text: int, vision: int) -> None:
    train = replace(watched_run.train, trainable_parts=("language",), precision="bf16", recompute="none", cuda_graphs=graphs)
    vision_config = replace(watched_run.vision, tower="tiny_native")
    config = replace(watched_run, parallel=ParallelConfig(), train=train, vision=vision_config)
    row = torch.zeros(1, 200, dtype=torch.int64)
    images = ImageTable.of(config.vision, [[(48, 48)], [(24, 32), (48, 24)]])  # 36, 12 and 18 tokens
    pack = MicroBatch(row, row, torch.tensor([100, 50]), images, ("s/a", "s/b"), packed=True)
    sums, blank = RankSums(), torch.tensor([False, True, False])
    sums.add_batch(config, SimpleNamespace(micro_batches=(pack,), images=images, blank=blank))  # type: ignore[arg-type]
    found = fill_points(config, [sums, RankSums()], packs=1)["compute/padding_fraction"]
    assert found == pytest.approx(1 - (150 + 66) / (text + vision))
    assert (sums.work.images, sums.work.patches, sums.work.patch_pairs) == (2, 36 + 18, 36**2 + 18**2)


@pytest.mark.parametrize("method", ["himix", "latest_window", "tokens"])
def test_flops_are_those_of_the_method(watched_run: Config, method: str) -> None:
    """Images of 36, 12 and 18 tokens, the second sample's behind 20 and 50 of its 50 text tokens: merged, 9, 4 and 6."""
    train = replace(watched_run.train, trainable_parts=("language",), recompute="none")
    injection = replace(METHODS[method](watched_run.model), reduce="pool")
    vision = replace(watched_run.vision, tower="tiny_native")
    config = replace(watched_run, parallel=ParallelConfig(), train=train, vision=vision, injection=injection)
    row = torch.zeros(1, 200, dtype=torch.int64)
    images = ImageTable.of(config.vision, [[(48, 48)], [(24, 32), (48, 24)]], [[0], [20, 50]])
    pack = MicroBatch(row, row - 1, torch.tensor([100, 50]), images, ("s/a", "s/b"), packed=True)
    sums = RankSums()
    sums.add_batch(config, SimpleNamespace(micro_batches=(pack,), images=images, blank=torch.ones(3) > 0))  # type: ignore[arg-type]
    pairs = {
        "himix": 100 * 101 / 2 + 50 * 51 / 2 + 100 * 9 + 50 * 10,
        "latest_window": 100 * 101 / 2 * 2 + 50 * 51 / 2 + 30 * 31 / 2 + 100 * 9 + 30 * 4,
        "tokens": 109 * 110 / 2 + 60 * 61 / 2,
    }[method]
    layers = decoder_layers(config, sums.work)
    assert [sum(attention.pairs for attention in layer.attention) for layer in layers] == [pairs] * len(layers)
    found = fill_points(config, [sums], packs=1)
    assert found["data/vision_packing_efficiency"] == 66 / 216
    assert found["compute/padding_fraction"] == pytest.approx(0 if method == "tokens" else 1 - 169 / 219)


def test_losses_of_the_datasets_make_up_the_loss(watched_run: Config, run_dir: Path) -> None:
    found, samples = points(run_dir), ledger(run_dir, BEGIN + 1, END)
    total = tokens = 0.0
    for path in watched_run.data.datasets:
        fingerprint = ShardDataset(path).fingerprint[:16]
        own = sum(line["answer_tokens"] for line in samples if line["dataset"] == fingerprint)
        assert own > 0
        total += own * found[f"loss_by_dataset/{Path(path).name}"][END].value
        tokens += own
    assert total / tokens == pytest.approx(found["train/loss"][END].value, rel=1e-6)
    align, instruct = (found[f"loss_by_dataset/{name}"][END].value for name in ("align", "instruct"))
    assert align != pytest.approx(instruct, rel=0.01)  # captions are not questions


def test_a_dataset_that_was_not_met_has_no_loss() -> None:
    counts = StepCounts(1.0, 4, 9, 0, 0, 0, 0, sources=((4.0, 4.0), (0.0, 0.0)))
    assert source_points(["a", "b"], [counts]) == {"loss_by_dataset/a": 1.0}


def test_each_token_counts_for_its_own_dataset() -> None:
    labels, no_images = torch.tensor([[1, -100, 2, 3, -100, -100]]), ImageTable.of_features([[], []])
    losses = torch.tensor([[0.5, 0.0, 2.0, 4.0, 0.0, 0.0]])
    packed = MicroBatch(labels, labels, torch.tensor([2, 3]), no_images, ("s/a", "s/b"), (2, 0), packed=True)
    assert packed.token_sources().tolist() == [[2, 2, 0, 0, 0, 0]]
    total, tokens, report = answer_loss(labels, losses, token_sources=packed.token_sources(), num_sources=3)
    assert (total.item(), tokens.item()) == (6.5, 3)
    assert report.tolist() == [6.5, 3, 6.0, 2, 0, 0, 0.5, 1]
    rows = MicroBatch(labels.view(2, 3), labels.view(2, 3), torch.tensor([3, 1]), no_images, ("s/a", "s/b"), (2, 0))
    assert rows.token_sources().tolist() == [[2, 2, 2], [0, 0, 0]]
    assert rows.token_sources().is_contiguous()  # pinned memory takes each number once


# ---- the gradient's norm -----------------------------------------------------------------------------------------------


def first_norms(config: Config) -> dict[str, float]:
    """The norms of the first step's gradient by part, added up over ranks as they are, and mcore's own norm of all."""
    from himix_megatron.config import check_ranks
    from himix_megatron.distributed.launch import check_launch
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.monitoring import gradient_norms
    from himix_megatron.training import builder, optimizer, train_step
    from himix_megatron.training.data_setup import batches_from, prepare_inputs
    from himix_megatron.training.resume import expected_checkpoint, restore_or_initialize

    launch = check_launch(config)
    start = prepare_inputs(config, check_ranks(config, launch.world_size))
    topology = init_distributed(config.parallel, seed=config.train.seed, launch=launch)
    run = builder.build_components(config, start, topology)
    position = restore_or_initialize(config, start, expected_checkpoint(config, start.plan), run.checkpoints)
    batches = batches_from(config, start, topology, position, {})
    batch, images = next(train_step.with_features(run, batches))
    for stage in run.model_chunks:
        stage.zero_grad_buffer()
    run.optimizer.zero_grad()
    train_step.run_schedule(run, batch, images, forward_only=False)
    norm = optimizer.gradient_norm(run.optimizer)
    squares = torch.tensor(list(gradient_norms.squared_norms(run.model_chunks, run.optimizer, topology.data_rank).values()))
    torch.distributed.all_reduce(squares)
    run.prefetcher.drain()
    shutdown_distributed()
    return {"all": norm} | {
        part: math.sqrt(square) for part, square in zip(gradient_norms.PARTS, squares.tolist(), strict=True)
    }


@pytest.fixture(scope="module")
def start_folder(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that layouts start from alike."""
    folder = tmp_path_factory.mktemp("start")
    run_ranks(train, 1, small_config(mixed_dataset, folder, parts=("language", "vision_kv"), steps=1), start_gloo=False)
    return folder


@pytest.fixture(scope="module")
def one_rank_norms(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory, start_folder: Path) -> dict[str, float]:
    config = small_config(
        mixed_dataset, tmp_path_factory.mktemp("one"), parts=("language", "vision_kv", "tower"), initial=start_folder
    )
    return dict(run_ranks(first_norms, 1, config, start_gloo=False)[0])


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"distributed_optimizer": True}),
        (4, {"tensor": 2, "distributed_optimizer": True}),
    ],
    ids=["tensor 2", "pipeline 2 interleaved", "data 2, distributed", "tensor 2, data 2, distributed"],
)
def test_gradient_norms_of_the_parts_are_the_same_at_every_layout(
    mixed_dataset: Path,
    tmp_path: Path,
    start_folder: Path,
    one_rank_norms: dict[str, float],
    ranks: int,
    layout: dict[str, Any],
) -> None:
    config = small_config(mixed_dataset, tmp_path, parts=("language", "vision_kv", "tower"), initial=start_folder, **layout)
    for norms in run_ranks(first_norms, ranks, config, start_gloo=False):
        assert norms == pytest.approx(one_rank_norms, rel=1e-4)
    assert min(one_rank_norms.values()) > 0
    parts = [one_rank_norms[part] for part in ("language", "vision_kv", "tower")]
    assert math.hypot(*parts) == pytest.approx(one_rank_norms["all"], rel=1e-5)


def test_reported_norms_are_those_before_clipping(watched_run: Config, run_dir: Path) -> None:
    found = history(run_dir)
    assert max(found["train/grad_norm"]) > watched_run.optimizer.clip_norm
    for total, *parts in zip(*(found[f"train/grad_norm{part}"] for part in ("", "_text", "_vision_kv", "_tower")), strict=True):
        assert math.hypot(*parts) == pytest.approx(total, rel=1e-5)
    assert found["train/grad_norm"][0] != pytest.approx(1.0, rel=0.01)


# ---- stages ------------------------------------------------------------------------------------------------------------


def test_the_bubble_is_what_stages_wait_between_passes() -> None:
    clock = ScheduleTimers(torch.device("cpu"))
    times = iter([0.0, 1.0, 3.0, 5.0, 9.0, 10.0])
    clock._mark = lambda: next(times)  # type: ignore[method-assign, assignment]
    finalize = clock.ends_with(lambda: None)
    clock("forward-backward", log_level=1).start(barrier=True)
    for name in ("forward-compute", "backward-compute"):
        clock(name, log_level=2).start()
        clock("forward-recv").start()
        clock("forward-recv").stop()
        clock(name).stop()
    finalize()
    clock("forward-backward").stop()  # after the sum of gradients: the passes had ended
    assert clock.take() == (6.0, 10.0)
    assert clock.take() == (0.0, 0.0)

    topology: Any = type("Two", (), {"tensor_size": 1, "data_size": 1, "pipeline_size": 2})
    ranks = [RankSums(busy_seconds=6.0, schedule_seconds=10.0), RankSums(busy_seconds=8.0, schedule_seconds=9.0)]
    found = pipeline_points(topology, ranks, seconds=20.0, steps=2)
    assert found["pipeline/bubble_fraction"] == pytest.approx(0.3)
    assert (found["pipeline/stage_0_busy_seconds"], found["pipeline/stage_1_busy_fraction"]) == (3.0, 0.4)


def test_a_pipeline_of_two_reports_its_stages(run_dir: Path) -> None:
    found = history(run_dir)
    for busy0, busy1, bubble in zip(
        found["pipeline/stage_0_busy_fraction"],
        found["pipeline/stage_1_busy_fraction"],
        found["pipeline/bubble_fraction"],
        strict=True,
    ):
        assert 0 < busy0 < 1
        assert 0 < busy1 < 1
        assert 0 < bubble < 1


# ---- what it costs, what it says ---------------------------------------------------------------------------------------


def test_metrics_cost_less_than_a_hundredth_of_a_step(run_dir: Path) -> None:
    found = history(run_dir)
    shares = [own / step for own, step in zip(found["time/metrics_seconds"], found["time/step_seconds"], strict=True)]
    assert sorted(shares)[len(shares) // 2] < 0.01, shares


def test_goodput_causes_fill_the_time_of_the_run(run_dir: Path) -> None:
    found = points(run_dir)
    causes = {tag: at for tag, at in found.items() if tag.startswith("goodput/") and tag.endswith("_seconds")}
    assert len(causes) > 3

    def total(step: int) -> float:
        return math.fsum(at[step].value for at in causes.values())

    elapsed = next(iter(causes.values()))
    assert total(END) - total(1) == pytest.approx(elapsed[END].wall_time - elapsed[1].wall_time, rel=0.01)


def test_the_document_names_every_tag_and_no_other(watched_run: Config, run_dir: Path) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_]+/[A-Za-z_]+)` ", text, re.MULTILINE))
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = {tag.removesuffix("/text_summary") for kind in ("scalars", "images", "tensors") for tag in events.Tags()[kind]}
    tags -= {"custom_scalars__config__", "_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    names = "|".join(Path(path).name for path in watched_run.data.datasets)
    written = {re.sub(r"(stage|sample)_\d+", r"\1_N", re.sub(rf"/({names})$", "/NAME", tag)) for tag in tags}
    assert written == documented


def test_chosen_steps_leave_a_trace_of_each_stage(run_dir: Path) -> None:
    found = sorted(file.name for file in (run_dir / "profile").iterdir())
    assert found == ["step-00000035-rank-000.json.gz", "step-00000035-rank-001.json.gz"]


def test_a_continued_run_tells_its_steps_once(mixed_dataset: Path, tmp_path: Path) -> None:
    config = small_config(mixed_dataset, tmp_path, parts=("vision_kv",), steps=4)
    config = replace(config, log=replace(config.log, predictions_interval_steps=2))
    run_ranks(train, 1, replace(config, train=replace(config.train, steps=2)), start_gloo=False)
    run_ranks(train, 1, config, start_gloo=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [point.step for point in events.Images("pictures/sample_0")] == [2, 4]
    assert [folder.name for folder in (tmp_path / "tensorboard").iterdir() if folder.is_dir()] == []
