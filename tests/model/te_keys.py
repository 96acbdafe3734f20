"""What a checkpoint under the layer spec `te` holds, recorded where Transformer Engine is installed, for machines without it.

    python -m tests.model.te_keys        writes tests/data/reference/te_keys.json anew

It needs no GPU: the modules are built, and none of them runs.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support import ROOT

RECORD = ROOT / "tests" / "data" / "reference" / "te_keys.json"
PACKAGES = ("transformer-engine", "megatron-core", "torch")


def as_with_gpu(attention: str) -> AbstractContextManager[Any]:
    """Within it the layers of a backend can be built: Transformer Engine's refuse to be where torch sees no GPU."""
    import torch

    return patch("torch.cuda.is_available", return_value=attention == "te" or torch.cuda.is_available())


def described(attention: str) -> dict[str, str | None]:
    """Each key of a small model's sharded state with its offset, and its global shape; None: an extra state. On one rank."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from himix_megatron.checkpoint.distributed_optimizer import sharding_metadata
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model
    from himix_megatron.model.towers import build_tower
    from tests.support.small_runs import small_config

    config = small_config(Path("unused"), Path("unused"), parts=("language", "vision_kv"))
    config = replace(config, model=replace(config.model, layer_spec=attention))
    topology = init_distributed(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    kernels = detect()
    with as_with_gpu(attention):
        model_chunks = build_model_chunks(config, kernels, topology, tower)
    state = unwrap_model(model_chunks[0]).sharded_state_dict(metadata=sharding_metadata()).values()
    shutdown_distributed()
    found: dict[str, str | None] = {}
    for value in state:
        parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            extra = isinstance(part, ShardedObject)
            offset = "" if extra else str(list(part.global_offset))
            found[f"{part.key}{offset}"] = None if extra else str(list(part.global_shape))
    return found


def main() -> None:
    from tests.support.ranks import run_ranks

    (found,) = run_ranks(described, 1, "te", start_gloo=False)
    versions = {package: metadata.version(package) for package in PACKAGES}
    record = {"command": "python -m tests.model.te_keys", "versions": versions, "keys": dict(sorted(found.items()))}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(found)} keys, {sum(shape is None for shape in found.values())} of them extra states: {RECORD}")


if __name__ == "__main__":
    main()
