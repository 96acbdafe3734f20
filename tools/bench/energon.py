"""Let megatron-energon read a shard dataset: its own metadata beside the shards, which stay as they are.

    python -m tools.bench.energon DIR

Written by megatron-energon itself (pip install megatron-energon): DIR/.nv-meta with the index of samples, the split (all shards
are `train`) and a dataset.yaml, and one NAME.tar.idx beside each tar. Our own reader and `python -m tools.inspect_shards DIR
--verify` do not mind; to take the export back, delete these files.

In energon the dataset is a CrudeWebdataset: a sample is a dict of `json` (our id and conversations), `0.jpg`, `1.png` ... and
a Cooker in your TaskEncoder makes of it what the task needs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from himix_megatron.data.shards.reader import ShardDataset
from pipelines.cli import parse_settings, run_main
from pipelines.flags import Word

META = ".nv-meta"
CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
NOTHING = "(?!)"
"""A regular expression that no name matches."""


@dataclass(frozen=True)
class Arguments:
    """Write megatron-energon's metadata for a shard dataset."""

    dir: Annotated[Path, Word("DIR")]
    """The dataset: the folder with manifest.json."""
    num_workers: int | None = None
    """Processes that read the tars; None: one a core."""


def export(folder: Path, num_workers: int | None = None) -> int:
    """Write the metadata, over an earlier one.

    Returns: the samples in it. Raises: ValueError when megatron-energon is not installed, or counts other samples than we do.
    """
    energon = _energon()
    # A shard without samples (all its rows were bad) is more than energon can take.
    receipts = [receipt for receipt in ShardDataset(folder).manifest.shards if receipt.num_samples]
    shards = {f"shards/{receipt.name}.tar": receipt.num_samples for receipt in receipts}
    with contextlib.redirect_stdout(io.StringIO()):  # it tells every file it writes
        energon.BaseWebdatasetFactory.prepare_dataset(
            folder.absolute(),
            list(shards),
            split_parts_patterns=[("train", ".*"), ("val", NOTHING), ("test", NOTHING)],
            workers=num_workers or os.cpu_count() or 1,
        )
    counted = json.loads((folder / META / ".info.json").read_text(encoding="utf-8"))["shard_counts"]
    for name, num_samples in shards.items():
        if counted.get(name) != num_samples:
            raise ValueError(
                f"{folder / name}: megatron-energon found {counted.get(name, 0)} samples, not {num_samples}: "
                f"see python -m tools.inspect_shards {folder} --verify"
            )
    (folder / META / "dataset.yaml").write_text(CRUDE, encoding="utf-8")
    return sum(shards.values())


def _energon() -> Any:
    try:
        from megatron import energon
    except ImportError as error:
        if (error.name or "").startswith("megatron"):
            raise ValueError("megatron-energon is not installed: pip install megatron-energon") from None
        raise
    return energon


def main() -> None:
    """The command line."""
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.energon", __doc__)
    if arguments.num_workers is not None and arguments.num_workers < 1:
        raise ValueError(f"--num-workers is {arguments.num_workers}: wanted 1 or more")
    num_samples = export(arguments.dir, arguments.num_workers)
    print(f"{arguments.dir / META}: megatron-energon reads {num_samples} samples as CrudeWebdataset")


if __name__ == "__main__":
    run_main(main)
