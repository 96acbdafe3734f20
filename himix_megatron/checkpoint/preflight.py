"""The preflight check of saving: a run that could not save fails before its first step, not at its first save.

Flows in: the size of a checkpoint and the run folder; out: nothing, or one line that names the obstacle.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from ..config import CheckpointConfig
from ..distributed.control_group import ControlGroup, SaveError
from ..runtime.durable_files import write_synced
from ..runtime.errors import StartError
from .manifest import complete_checkpoints
from .run_lock import RunLock

_PROBE = bytes(range(256)) * 16


def check_disk_space(settings: CheckpointConfig, run_lock: RunLock, ranks: ControlGroup, size_bytes: int) -> None:
    """All ranks call it. Raises: StartError on all ranks if one cannot write, or space is short."""
    try:
        ranks.on_all_ranks(lambda: _check_writing(run_lock.folder, ranks.rank, -(-size_bytes // ranks.size)))
        ranks.on_all_ranks(lambda: _check_reading(run_lock.folder, ranks.size))
        ranks.on_rank_zero(lambda: _check_space(settings, run_lock.folder.parent.parent, size_bytes))
    except SaveError as error:
        raise StartError(f"{run_lock.folder.parent} cannot take checkpoints: {error}") from None
    if ranks.rank == 0:
        for rank in range(ranks.size):
            _probe(run_lock.folder, rank).unlink(missing_ok=True)


def _probe(folder: Path, rank: int) -> Path:
    return folder / f"probe-{rank}"


def _check_writing(folder: Path, rank: int, share_bytes: int) -> None:
    write_synced(_probe(folder, rank), _PROBE)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and limit < share_bytes:
        raise OSError(
            f"the limit on a file's size (ulimit -f) is {_gib(limit)}, and a file will have about {_gib(share_bytes)}"
        )


def _check_reading(folder: Path, num_ranks: int) -> None:
    os.listdir(folder)
    for rank in range(num_ranks):
        path = _probe(folder, rank)
        if not path.is_file() or path.read_bytes() != _PROBE:
            raise OSError(f"{path}, which rank {rank} wrote, is not seen here: the run folder must be shared by all nodes")


def _check_space(settings: CheckpointConfig, run_dir: Path, size_bytes: int) -> None:
    kept = settings.keep_last + 1  # the newest, and the best
    more = max(1, kept + 1 - len(complete_checkpoints(run_dir)))  # and the one that is being written
    free = shutil.disk_usage(run_dir / "checkpoints").free
    if free < more * size_bytes:
        raise OSError(
            f"it will need {more} x {_gib(size_bytes)} for checkpoints (keep_last {settings.keep_last}, the best one, and the "
            f"one being written), and {_gib(free)} are free: make room, or lower --checkpoint.keep-last"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
