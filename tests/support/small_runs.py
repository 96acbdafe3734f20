"""Small real runs for tests: a configuration that trains in seconds, and what a finished run left behind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from himix_megatron.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Part,
    RunConfig,
    TrainConfig,
    VisionConfig,
)


def small_config(
    data: Path,
    run: Path,
    *,
    parts: tuple[Part, ...],
    text_only_vision: Any = "none",
    initial: Path | None = None,
    precision: Any = "fp32",
    steps: int = 10,
    recompute: Any = "none",
    **layout: Any,
) -> Config:
    """4 decoder layers of width 64, a tower of 2; 10 steps of 8 samples, every step logged."""
    return Config(
        recipe="small",
        model=ModelConfig(
            family="qwen2",
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=260,
            text_only_vision=text_only_vision,
            layer_spec="torch",
        ),
        vision=VisionConfig(
            tower="tiny",
            image_size=16,
            patch_size=8,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            ffn_hidden_size=512,  # larger than a decoder layer: replicas of the tower are cut by a distributed optimizer
            feature_layer=-1,
        ),
        data=DataConfig(datasets=(str(data),), template="tiny", max_text_tokens=96, num_workers=0),
        train=TrainConfig(
            trainable_parts=parts,
            steps=steps,
            global_batch_samples=8,
            micro_batch_samples=2,
            precision=precision,
            recompute=recompute,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_fraction=0.0),
        parallel=ParallelConfig(timeout_seconds=60, **layout),
        checkpoint=CheckpointConfig(init_from=None if initial is None else str(initial)),
        log=LogConfig(interval_steps=1),
        run=RunConfig(dir=str(run)),
    )


def native(config: Config) -> Config:
    """The same with a tower that gets images in their own aspect, of 1 to 16 tokens."""
    return replace(config, vision=replace(config.vision, tower="tiny_native", image_size=32))


def train(config: Config) -> None:
    """Train on this rank; for `run_ranks(train, N, config, start_gloo=False)`."""
    from himix_megatron.distributed.topology import shutdown_distributed
    from himix_megatron.runtime import log
    from himix_megatron.training.loop import pretrain

    pretrain(config)
    shutdown_distributed()
    log.stop()
    # A second run in this process meets elsewhere: at the same port a quick rank would find the store of the first.
    if "MASTER_PORT" in os.environ:
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)


def history(run: Path) -> dict[str, list[float]]:
    """TensorBoard's points by tag, in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
