"""What a run did, to the bit, from what it left behind: the oracle of every test of resuming.

Flows in: a run folder written with `--log.ledger`, or a checkpoint; out: losses and gradient norms in hex, samples, tensors.
Steps that were done again after a failure must have come out the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Trace = dict[int, tuple[str, str]]
"""Loss and gradient norm of each step, in hex."""


def steps_of(run: Path) -> Trace:
    """The trace of a run. Raises: AssertionError if a step was done twice, and differently."""
    trace: Trace = {}
    for line in lines_of(run / "ledger" / "steps.jsonl"):
        found = (line["loss"], line["grad_norm"])
        assert trace.setdefault(line["step"], found) == found, f"step {line['step']} done again: {found}, {trace[line['step']]}"
    return dict(sorted(trace.items()))


def samples_of(run: Path) -> dict[int, list[str]]:
    """The samples of each step, whatever rank read them, without the repeats of steps that were done again."""
    samples: dict[int, set[str]] = {}
    for file in sorted((run / "ledger").glob("rank-*.jsonl")):
        for line in lines_of(file):
            samples.setdefault(line["step"], set()).add(json.dumps(line, sort_keys=True))
    return {step: sorted(found) for step, found in sorted(samples.items())}


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a ledger."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole: parameters and optimizer state by global name, whatever layout saved them."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(
        state, storage_reader=FileSystemReader(str(checkpoint)), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return {name: value for name, value in sorted(_leaves(state)) if isinstance(value, Tensor)}


def _leaves(state: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(state, dict):
        return [(prefix, state)]
    return [leaf for key, value in state.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def hash_of(checkpoint: Path) -> str:
    """Over the bits of all of a checkpoint's tensors, and the optimizer's step."""
    found = hashlib.sha256()
    for name, tensor in tensors_of(checkpoint).items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    common = torch.load(checkpoint / "common.pt", weights_only=True)
    found.update(repr(_leaves(common.get("optimizer", {}))).encode())
    return found.hexdigest()
