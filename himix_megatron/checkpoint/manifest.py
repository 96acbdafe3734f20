"""The manifest of a checkpoint, verification, and which checkpoints of a run are used or removed.

    RUN/checkpoints/step-00001000/manifest.json   size and SHA-256 of every other file in the folder, and of itself
                                  himix.json      description.py
                                  *.distcp .metadata metadata.json common.pt       megatron-core's
    RUN/checkpoints/latest                        name of the newest checkpoint
    RUN/towers/HASH.safetensors                   a frozen tower, named by its hash

A folder is renamed to `step-...` when all of it is on the disk, so a folder of that name was complete once. `verify_checkpoint`
checks whether it still is. No code may open the pickles in it before their hashes are verified, and `.metadata` looked through.
Flows in: paths; out: one line for each problem.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..data.loading.plan import DataPosition
from ..runtime import typed_json
from ..runtime.durable_files import FileDigest, file_digest, sync_folder, write_synced
from ..runtime.limits import CountOrZero, Pattern
from ..runtime.untrusted_files import read_regular
from .torch_metadata import METADATA, check_metadata

if TYPE_CHECKING:
    from ..distributed.control_group import ControlGroup

logger = logging.getLogger(__name__)

MANIFEST, DESCRIPTION, LATEST = "manifest.json", "himix.json", "latest"
DESCRIPTION_VERSION: Literal[1] = 1
"""Of himix.json."""
_NAME = re.compile(r"step-([0-9]{8})")


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a run stands: it continues with the next step of the same plan."""

    step: CountOrZero
    """Optimizer steps done."""
    place: DataPosition
    """Where the data continues."""
    data: dict[str, Any]
    """The settings that determine which sample is in which step (`SamplingPlan.fingerprint_fields`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The content of himix.json. `parts`: what trained, empty in a converted model; `tower`: the frozen one's file."""

    version: Literal[0, 1] = 0
    position: Position
    parts: tuple[str, ...]
    architecture: dict[str, Any]
    distributed_optimizer: bool
    tower: Annotated[str, Pattern(r"[0-9a-f]{64}\.safetensors", "HASH.safetensors")] | None
    validation_loss: float | None


# ---- writing -------------------------------------------------------------------------------------------------------


def sync_and_digest(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Sync files to the disk, and hash what is read back."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        found[name] = file_digest(folder / name)
    return found


def write_manifest(folder: Path, files: Mapping[str, FileDigest]) -> None:
    """Write manifest.json; afterwards nothing in the folder may change."""
    write_synced(folder / MANIFEST, _manifest(files))
    sync_folder(folder)


def _manifest(files: Mapping[str, FileDigest]) -> bytes:
    listed = json.dumps({name: asdict(files[name]) for name in sorted(files)}, indent=1)
    return f'{{"sha256": "{hashlib.sha256(listed.encode()).hexdigest()}", "files": {listed}}}\n'.encode()


# ---- verifying ----------------------------------------------------------------------------------------------------


class DamagedError(ValueError):
    """A checkpoint failed verification; the message names the file and the problem."""


def read_manifest(folder: Path) -> dict[str, FileDigest]:
    """The digests with which a checkpoint was written. Raises: DamagedError if manifest.json is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{path} is missing: the checkpoint cannot be verified (was it written by an older version?)")
    try:
        data = read_regular(path, typed_json.MAX_FILE_BYTES)
        stored = typed_json.parse_object(data, str(path)).get("files")
        files: dict[str, FileDigest] = typed_json.as_type(dict[str, FileDigest], stored, str(path), "files")
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    if _manifest(files) != data:
        raise DamagedError(f"{path} is damaged: it is not what was written")
    return files


def read_description(folder: Path) -> Description:
    """himix.json. Raises: DamagedError, as `read_manifest`; ValueError for a version that this code does not know."""
    path, wanted = folder / DESCRIPTION, read_manifest(folder).get(DESCRIPTION)
    if wanted is None or not path.is_file():
        raise DamagedError(f"{path} is missing")
    try:
        data = read_regular(path, typed_json.MAX_FILE_BYTES)
        if hashlib.sha256(data).hexdigest() != wanted.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}")
        stored = typed_json.parse_object(data, str(path))
        if (version := stored.get("version", 0)) in (0, DESCRIPTION_VERSION):
            return typed_json.build(Description, stored, str(path))
    except ValueError as error:
        raise DamagedError(str(error)) from None
    raise ValueError(
        f"{path} has version {version}, and this code reads versions up to {DESCRIPTION_VERSION}: use the code that wrote it"
    )


def tower_path(folder: Path, file: str) -> Path:
    """Path of the frozen tower that a checkpoint refers to."""
    return folder.parent.parent / "towers" / file


def files_to_verify(folder: Path) -> tuple[dict[Path, int], list[str]]:
    """The files whose hashes are to be checked, with their sizes in bytes: a checkpoint's own, and its tower's. And every
    problem that shows without reading them: files that are missing, of another size, or not in the manifest."""
    try:
        return _files_and_problems(folder, read_manifest(folder))
    except (DamagedError, OSError) as error:
        return {}, [str(error)]


def _files_and_problems(folder: Path, files: Mapping[str, FileDigest]) -> tuple[dict[Path, int], list[str]]:
    present = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}
    found = [f"{folder / name} is missing" for name in sorted(files.keys() - present.keys())]
    found += [f"{present[name]} is in no manifest" for name in sorted(present.keys() - files.keys() - {MANIFEST})]
    for name in sorted(files.keys() & present.keys()):
        size = present[name].stat().st_size
        if size != files[name].bytes:
            found.append(f"{present[name]} has {size} bytes, it was written with {files[name].bytes}")
    tower = None
    try:
        tower = read_description(folder).tower
    except DamagedError as error:
        found += [line for line in [str(error)] if line not in found]
    sizes = {folder / name: digest.bytes for name, digest in files.items()}
    if tower is not None and not (path := tower_path(folder, tower)).is_file():
        found.append(f"tower {path} is missing: keep a run folder together")
    elif tower is not None:
        sizes[path] = path.stat().st_size
    return sizes, found


def hash_mismatches(folder: Path, paths: Iterable[Path]) -> list[str]:
    """A line for each of these files of a checkpoint whose content is not what was written."""
    try:
        files = read_manifest(folder)
    except (DamagedError, OSError) as error:
        return [str(error)]
    found = []
    for path in paths:
        inside = path.is_relative_to(folder)
        wanted, who = (files[str(path.relative_to(folder))].sha256, MANIFEST) if inside else (path.stem, "its name")
        try:
            if file_digest(path).sha256 != wanted:
                found.append(f"{path} is damaged: its SHA-256 is not the one in {who}")
            elif path == folder / METADATA:
                check_metadata(path, files)
        except ValueError as error:
            found.append(str(error))
        except OSError as error:  # e.g. a bad sector
            found.append(f"{path} cannot be read: {error}")
    return found


def verify_checkpoint(folder: Path) -> list[str]:
    """All problems of a checkpoint, found by one process; empty if every byte is as it was written."""
    sizes, wrong = files_to_verify(folder)
    return wrong or hash_mismatches(folder, sizes)


def verify_distributed(folder: Path, ranks: ControlGroup) -> list[str]:
    """As `verify_checkpoint`, where each rank reads a share of the files; the same result on all ranks."""
    sizes, wrong = ranks.on_rank_zero(lambda: files_to_verify(folder))
    if wrong:
        return wrong
    share = _shares(sizes, ranks.size)[ranks.rank]
    return [line for found in ranks.on_all_ranks(lambda: hash_mismatches(folder, share)) for line in found]


def latest_intact(folders: Iterable[Path], ranks: ControlGroup) -> Path:
    """The first checkpoint without a problem, as `verify_distributed`; the same on all ranks.

    Raises: DamagedError listing the problems of each.
    """
    wrong: list[str] = []
    for folder in folders:
        found = verify_distributed(folder, ranks)
        if not found:
            if wrong:
                logger.warning("falling back to %s", folder)
            return folder
        logger.warning("checkpoint %s is passed over: %s", folder, "; ".join(found))
        wrong += found
    raise _none_left(wrong)


def _shares(sizes: Mapping[Path, int], num_ranks: int) -> list[list[Path]]:
    """The files that each rank reads, of about equal size in sum."""
    shares: list[list[Path]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for path, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        rank = totals.index(min(totals))
        shares[rank].append(path)
        totals[rank] += size
    return shares


def quarantine(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints to damaged-step-...: they are no longer used, and never removed."""
    for folder in damaged:
        names = (f"damaged-{folder.name}{f'.{number}' if number else ''}" for number in itertools.count())
        aside = next(path for path in map(folder.with_name, names) if not path.exists())
        folder.rename(aside)
        logger.warning("kept as %s for inspection; delete it when no longer needed", aside)


# ---- selecting -----------------------------------------------------------------------------------------------------


def step_of(folder: Path) -> int:
    """Optimizer steps done, from a checkpoint's name."""
    found = _NAME.fullmatch(folder.name)
    assert found is not None, folder
    return int(found[1])


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted(folder for folder in folders if _NAME.fullmatch(folder.name) and folder.is_dir())


def resolve_checkpoints(path: str) -> list[Path]:
    """The checkpoint that a path names, or those of the run folder that it names, newest first.

    Raises: ValueError if there is none.
    """
    folder = Path(path)
    if (folder / DESCRIPTION).is_file() or (folder / MANIFEST).is_file():
        return [folder]
    found = complete_checkpoints(folder)
    if not found:
        raise ValueError(
            f"{path} holds no checkpoint (--checkpoint.init-from takes a run folder or a checkpoints/step-... folder)"
        )
    return found[::-1]


def first_intact(folders: Iterable[Path]) -> Path:
    """The first checkpoint without a problem that shows without reading it; loading it reads it.

    Raises: DamagedError listing the problems of each.
    """
    wrong: list[str] = []
    for folder in folders:
        _, found = files_to_verify(folder)
        if not found:
            return folder
        wrong += found
    raise _none_left(wrong)


def _none_left(wrong: Iterable[str]) -> DamagedError:
    """The error where no checkpoint is left to fall back to."""
    return DamagedError(f"no checkpoint can be trusted: {'; '.join(wrong)}")


def find_checkpoint(path: str) -> Path:
    """The checkpoint that a path names, or the first intact one of a run folder. Raises: ValueError if there is none."""
    folders = resolve_checkpoints(path)
    found = first_intact(folders)
    for folder in folders[: folders.index(found)]:
        logger.warning("checkpoint %s is damaged and passed over", folder)
    return found


def to_remove(run_dir: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Checkpoints to remove: all but the newest `keep_last`, multiples of `keep_every` steps, and the best one."""
    found = complete_checkpoints(run_dir)
    measured = [(loss, folder) for folder in found if (loss := validation_loss(folder)) is not None]
    keep = {*found[-keep_last:], *(folder for _, folder in sorted(measured)[:1])}
    if keep_every is not None:
        keep |= {folder for folder in found if step_of(folder) % keep_every == 0}
    return [folder for folder in found if folder not in keep]


def validation_loss(folder: Path) -> float | None:
    """The validation loss of a checkpoint; None if none was measured then, or its description is damaged."""
    try:
        loss = read_description(folder).validation_loss
    except (DamagedError, OSError):
        return None
    return loss if loss is not None and math.isfinite(loss) else None  # nan cannot be compared
