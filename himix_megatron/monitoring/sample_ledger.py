"""The sample ledger (--log.ledger): which sample was in which step, and each step's loss and gradient norm to the bit.

Flows in: each step's batch, loss and gradient norm; out: RUN/ledger/rank-000.jsonl, one line a sample, by the first rank of
each replica, and RUN/ledger/steps.jsonl, one line a step, by rank 0. It allows to check rates, lost and repeated samples, and
whether two runs are equal, independently of the rest of the code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ..data.loading.batch import StepBatch
from ..distributed.topology import Topology
from ..runtime.durable_files import open_append
from ..runtime.untrusted_files import folder_below, open_lock


class Ledger:
    """Appends lines. A resumed run appends to the same file, so a repeated step is there twice."""

    def __init__(self, run_dir: Path, topology: Topology, *, enabled: bool, sources: Sequence[str]):
        """`sources`: the names that `MicroBatch.sources` numbers."""
        self._sources = sources
        self._file: IO[str] | None = None
        self._steps: IO[str] | None = None
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        folder = folder_below(run_dir, "ledger")
        if topology.replica_rank == 0:
            self._file = open_for_append(folder / f"rank-{topology.rank:03d}.jsonl")
        if topology.rank == 0:
            self._steps = open_for_append(folder / "steps.jsonl")

    def record(self, step: int, batch: StepBatch, loss: float, grad_norm: float) -> None:
        """Write the samples of a step that is done, and its loss and gradient norm in hexadecimal, which keeps every bit."""
        if self._steps is not None:
            self._steps.write(json.dumps({"step": step, "loss": loss.hex(), "grad_norm": grad_norm.hex()}) + "\n")
            self._steps.flush()
        if self._file is None:
            return
        bad, image = set(batch.bad_keys), 0
        for micro_batch in batch.micro_batches:
            answers = micro_batch.answer_tokens()
            tokens = iter(micro_batch.images.tokens)
            for sample, key in enumerate(micro_batch.keys):
                count = micro_batch.images.per_sample[sample]
                blank = batch.blank[image : image + count].tolist()
                image += count
                shard, name = key.split("/", 1)
                line = {
                    "step": step,
                    "dataset": self._sources[micro_batch.sources[sample]],
                    "shard": shard,
                    "key": name,
                    "text_tokens": int(micro_batch.text_lengths[sample]),
                    "answer_tokens": answers[sample],
                    "vision_tokens": sum(next(tokens) * (not is_blank) for is_blank in blank),
                    "bad": key in bad,
                }
                self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._steps):
            if file is not None:
                file.close()


def open_for_append(path: Path) -> IO[str]:
    """Open for appending, after removing the partial last line that a killed run may have left."""
    with open_lock(path.parent, path.name) as file:  # through no link: it may lead to a file that is not the run's
        end = size = file.seek(0, os.SEEK_END)
        while end:
            block = min(end, 1 << 16)
            file.seek(end - block)
            if (newline := file.read(block).rfind(b"\n")) >= 0:
                end += newline + 1 - block
                break
            end -= block
        if end < size:
            file.truncate(end)
    return open_append(path)
