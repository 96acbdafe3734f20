"""Damage done to checkpoints, and what a start says about it."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import torch

from himix_megatron.checkpoint.manifest import complete_checkpoints
from himix_megatron.config import Config

Damage = tuple[str, int, int]
"""A file, relative to the run; a byte in it; the bit to flip there, -1 to cut the file off before it."""


def damages(run: Path, flips: int, cuts: int, seed: int) -> list[Damage]:
    """As many for each file of the newest checkpoint, at random places; the tower's too."""
    drawn, newest = random.Random(seed), complete_checkpoints(run)[-1]
    files = [path for path in [*newest.iterdir(), *(run / "towers").iterdir()] if path.stat().st_size]
    assert len(files) >= 7  # two ranks' tensors, .metadata, common.pt, metadata.json, himix.json, manifest.json, the tower
    found = []
    for number in range(flips + cuts):
        path = files[number % len(files)]
        bit = drawn.randrange(8) if number < flips else -1
        found.append((str(path.relative_to(run)), drawn.randrange(path.stat().st_size), bit))
    return found


def damaged(run: Path, damage: Damage) -> Callable[[], None]:
    """Do the damage. Returns: what undoes it."""
    path, (_, place, bit) = run / damage[0], damage
    whole = path.read_bytes()
    path.write_bytes(whole[:place] if bit < 0 else whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    return lambda: (path.write_bytes(whole), None)[1]


def starts(config: Config, found: list[Damage]) -> list[tuple[str, str]]:
    """For each damage: the checkpoint that a start settles on, and what it says; by a rank of a world."""
    from himix_megatron.distributed.control_group import ControlGroup
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.training.data_setup import prepare_inputs
    from himix_megatron.training.resume import expected_checkpoint, select_checkpoint

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("himix_megatron").addHandler(handler)
    init_distributed(config.parallel, seed=1)
    ranks = ControlGroup(60)
    results = []
    for damage in found:
        rank = int(os.environ["RANK"])
        undo = damaged(config.run_dir, damage) if rank == 0 else lambda: None
        torch.distributed.barrier()
        said.clear()
        try:
            plan = prepare_inputs(config, 1).plan
            expected_checkpoint(config, plan)
            checkpoint = select_checkpoint(config, plan, ranks)
            results.append((checkpoint.folder.name if checkpoint else "", " ".join(said)))
        except ValueError as error:
            results.append(("refused", str(error)))
        torch.distributed.barrier()
        if rank == 0:
            aside = config.run_dir / "checkpoints" / "damaged-step-00000002"
            if aside.is_dir():
                aside.rename(aside.with_name("step-00000002"))
            undo()
        torch.distributed.barrier()
    shutdown_distributed()
    return results


def check(found: list[Damage], results: list[tuple[str, str]]) -> None:
    for (file, place, bit), (taken, said) in zip(found, results, strict=True):
        assert file in said, (file, place, bit, taken, said)
        # Both checkpoints refer to the tower: without it there is nothing to fall back to.
        assert taken == ("refused" if file.startswith("towers") else "step-00000001"), (file, place, bit, said)
