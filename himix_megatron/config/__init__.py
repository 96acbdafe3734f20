"""Every setting of a run as one frozen tree of dataclasses. Imports no torch, so it can be built and checked anywhere."""

from ..runtime.limits import Count, CountOrZero, Fraction, Limit, Positive, ZeroOrMore, check_known, check_limits
from .data import DataConfig
from .injection import METHODS, InjectionConfig
from .model import ModelConfig, VisionConfig
from .operations import CheckpointConfig, HealthConfig, LogConfig, RunConfig
from .run import Config, check_batch, check_layout, check_ranks
from .serialization import current_fields, differences, from_json, in_vision_tokens, read_config, to_json
from .training import OptimizerConfig, ParallelConfig, Part, TrainConfig

__all__ = [
    "CheckpointConfig", "Config", "DataConfig", "HealthConfig", "InjectionConfig", "LogConfig", "METHODS", "ModelConfig",
    "OptimizerConfig", "ParallelConfig", "Part", "RunConfig", "TrainConfig", "VisionConfig", "check_batch", "check_layout",
    "check_ranks",
    "Count", "CountOrZero", "Fraction", "Limit", "Positive", "ZeroOrMore", "check_known", "check_limits",
    "current_fields", "differences", "from_json", "in_vision_tokens", "read_config", "to_json",
]  # fmt: skip
