"""Every setting of a run as one frozen tree of dataclasses. Imports no torch, so it can be built and checked anywhere."""

from .run import (
    CheckpointConfig,
    Config,
    DataConfig,
    HealthConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Part,
    RankError,
    RunConfig,
    StartError,
    TrainConfig,
    VisionConfig,
    check_layout,
    check_ranks,
    current_fields,
    current_name,
    differences,
    field_names,
    from_json,
    to_json,
)

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "HealthConfig", "LogConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig",
    "Part", "RankError", "RunConfig", "StartError", "TrainConfig", "VisionConfig", "check_layout", "check_ranks",
    "current_fields", "current_name", "differences", "field_names", "from_json", "to_json",
]  # fmt: skip
