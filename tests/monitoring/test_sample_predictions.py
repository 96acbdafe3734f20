"""Samples answered during training: as the saved model answers them, without changing the training."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from himix_megatron.config import Config
from himix_megatron.monitoring.sample_predictions import WIDTH, Answered, SamplePredictions
from himix_megatron.training.data_setup import make_stream
from pipelines.cli import parse
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, small_config, train

PARTS = ("language", "vision_kv", "tower")


def looking(config: Config, every: int) -> Config:
    return replace(config, log=replace(config.log, predictions_interval_steps=every))


def told(run: Path) -> list[list[str]]:
    """The cells of the last table of answers: sample, key, question, expected, given."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("pictures/answers/text_summary")[-1].tensor_proto.string_val
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.decode().splitlines()[2:]]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"parts": PARTS, "tensor": 2, "sequence": True}),
        (2, {"parts": PARTS, "pipeline": 2, "virtual_pipeline": 2}),
        (2, {"parts": ("vision_kv",), "distributed_optimizer": True, "overlap": "on", "precision": "bf16"}),
    ],
    ids=["tensor 2 + sequence", "pipeline 2 interleaved", "data 2, distributed, overlapping, bf16"],
)
def test_looking_changes_no_loss(mixed_dataset: Path, tmp_path: Path, ranks: int, options: dict[str, Any]) -> None:
    for name, every in (("without", 0), ("with", 1)):
        config = looking(small_config(mixed_dataset, tmp_path / name, steps=3, **options), every)
        run_ranks(train, ranks, config, start_gloo=False)
    assert history(tmp_path / "with")["train/loss"] == history(tmp_path / "without")["train/loss"]
    assert len(told(tmp_path / "with")) == 4


def saved_answers(config: Config) -> list[list[str]]:
    """What the run's saved model says to the same samples, on this rank alone."""
    from himix_megatron.checkpoint.manifest import find_checkpoint
    from himix_megatron.data.text import chat_template
    from himix_megatron.data.text.tokenizer import load_tokenizer
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.inference.generator import Answerer
    from himix_megatron.monitoring.sample_predictions import MAX_NEW_TOKENS, choose
    from himix_megatron.training.data_setup import make_plan

    topology = init_distributed(config.parallel, seed=1)
    answerer = Answerer(replace(config, train=replace(config.train, trainable_parts=("vision_kv",))), detect(), topology)
    answerer.load(find_checkpoint(str(config.run_dir)))
    tokenizer = load_tokenizer("bytes")
    asked = list(choose(config, make_plan(config, config.data)))
    stops = chat_template.end_of_turn(tokenizer, config.data.template)
    given = answerer.answer([one.prompt for one in asked], stops, MAX_NEW_TOKENS)
    shutdown_distributed()
    return [[one.key, " ".join(tokenizer.decode(ids).split())] for one, ids in zip(asked, given, strict=True)]


def test_answers_are_those_of_the_saved_model(mixed_dataset: Path, tmp_path: Path) -> None:
    config = looking(small_config(mixed_dataset, tmp_path, parts=PARTS, steps=12, tensor=2, sequence=True), 100)
    run_ranks(train, 2, config, start_gloo=False)
    rows = told(tmp_path)
    alone = replace(small_config(mixed_dataset, tmp_path, parts=PARTS), log=config.log)
    assert run_ranks(saved_answers, 1, alone, start_gloo=False)[0] == [[row[1], row[4].replace("\\|", "|")] for row in rows]
    assert {row[2] for row in rows} == {"Which colour?"}
    assert any(row[4] for row in rows)


def test_a_drawn_sample_holds_its_images_and_texts() -> None:
    red, blue = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
    red[0], blue[2] = 255, 255
    short = Answered("s/a", "Which?", "red", "blue", (red, blue)).drawn()
    assert short.shape[1:] == (WIDTH, 3)
    assert {(255, 0, 0), (0, 0, 255)} <= {tuple(pixel) for pixel in short.reshape(-1, 3).tolist()}
    long = Answered("s/b", "word " * 500, "x" * 500, "", ()).drawn()
    assert WIDTH / 4 < long.shape[0] < WIDTH  # cut to a few lines each, also without a space to break at


def test_images_of_different_sizes_are_drawn_side_by_side() -> None:
    flat, tall, narrow = (np.full((3, height, width), 90, np.uint8) for width, height in ((448, 434), (434, 448), (14, 9996)))
    assert Answered("s/a", "Which?", "red", "blue", (flat, tall)).drawn().shape[1] == WIDTH
    high = Answered("s/b", "Which?", "red", "blue", (narrow,)).drawn()
    assert high.shape[0] < 2 * WIDTH
    assert (high == 90).any()


def test_a_stream_shows_no_predictions_and_says_why(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(1024))
    config = parse(["tiny_align", "--data.webdataset-urls", str(tmp_path / "a.tar"), "--train.steps", "9"])
    nothing: Any = None
    with caplog.at_level("INFO", logger="himix_megatron.monitoring"):
        shown = SamplePredictions(config, make_stream(config, 1), nothing, nothing, [], nothing)
    assert config.log.predictions_interval_steps
    assert shown.maybe_predict(2, last=True) == []
    assert "a stream has no samples to choose from (--data.validation-path has)" in caplog.text
