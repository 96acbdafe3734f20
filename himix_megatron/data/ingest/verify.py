"""A dataset folder in, what is wrong with it out: files against hashes, tars against indexes, all against the manifest.

Reading trusts headers, padding and receipts to be as written, since it does not need them; here they are looked at, too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import mmap
import multiprocessing
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..images import image_file
from ..shards import shard_format
from ..shards.shard_format import Manifest, Receipt, Records
from ..shards.storage import LocalFolder
from .shard_writer import load_receipt, verify_shard

PARTS = ("shards", "receipts", "quarantine")
"""Folders in which every file belongs to a shard of the manifest."""
FEW_BYTES = 1 << 30
"""A smaller dataset is looked at in this process: starting others takes longer."""
BESIDE = ("lengths", ".nv-meta")
"""Folders that others keep beside the shards: text lengths; megatron-energon's metadata (tools/bench/data.py)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One damaged shard, or another file of the dataset. As a string: one line."""

    name: str
    """NAME-000000, or the file's path in the folder."""
    problems: tuple[str, ...]
    num_samples: int
    """At stake: those of the shard, even where most of them can still be read."""
    is_shard: bool = True
    """Or another file of the dataset."""

    def __str__(self) -> str:
        return f"{self.name}: {self.num_samples} samples at stake: {'; '.join(self.problems)}"


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found."""

    findings: tuple[Finding, ...]
    foreign: tuple[str, ...]
    """Files in the folder that are not the dataset's, and that nobody reads."""
    num_shards: int
    num_samples: int
    num_images: int
    num_bytes: int
    """Of tars and indexes."""


def verify_dataset(
    folder: Path, num_workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Look at every byte of a dataset. `progress` is called with the bytes of the shards seen so far, and of all.

    Raises: ValueError for a folder that is no dataset of ours, so that there is nothing to compare it with.
    """
    receipts, findings = _expected(folder)
    sizes = [receipt.tar.bytes + receipt.index.bytes for receipt in receipts]
    for receipt, problems, seen in zip(
        receipts, _each(folder, receipts, num_workers), itertools.accumulate(sizes), strict=True
    ):
        if problems:
            findings.append(Finding(receipt.name, tuple(problems), receipt.num_samples))
        progress(seen, sum(sizes))
    extra, foreign = _strays(folder, receipts)
    findings += [Finding(path, ("the manifest has no such file",), 0, is_shard=False) for path in extra]
    return Report(
        findings=tuple(findings),
        foreign=tuple(foreign),
        num_shards=len(receipts),
        num_samples=sum(receipt.num_samples for receipt in receipts),
        num_images=sum(receipt.num_images for receipt in receipts),
        num_bytes=sum(sizes),
    )


def check_shard(folder: Path, receipt: Receipt) -> list[str]:
    """What is wrong with a shard, files and members, in words; nothing: []."""
    names, files = shard_format.shard_files(receipt.name), LocalFolder(folder)
    index_name = Path(names.index).name
    problems = []
    try:
        if files.read(names.receipt) != shard_format.to_json(receipt):
            problems.append(_state(folder / names.receipt))
        problems += [problem.split(" (")[0] for problem in verify_shard(files, receipt)]
        if not any(problem.startswith(index_name) for problem in problems) and (folder / names.tar).is_file():
            samples, images = shard_format.decode_index(files.read(names.index) or b"")
            problems += _count_problems(receipt, samples, images, files.read(names.quarantine) or b"")
            problems += _member_problems(folder / names.tar, samples, images)
        problems += _length_problems(files, receipt)
    except OSError as error:
        problems.append(f"cannot be read ({error.strerror})")
    except ValueError as error:
        problems.append(f"{index_name}: {error}")
    return problems


def _expected(folder: Path) -> tuple[list[Receipt], list[Finding]]:
    """The shards that should be there: the manifest's, or, without one that can be read, those that have receipts."""
    path = shard_format.manifest_path(folder)
    content = LocalFolder(folder).read(shard_format.MANIFEST)
    try:
        if content is None:
            raise ValueError("missing: the preprocessing has not finished, or the file was lost")
        manifest = shard_format.from_json(Manifest, content)
        problems = [] if shard_format.to_json(manifest) == content else [_state(path)]
        ends = [0, *(shard.end_row for shard in manifest.shards)]
        if [shard.first_row for shard in manifest.shards] != ends[:-1] or ends[-1] != manifest.num_rows:
            problems.append(f"its shards do not cover its {manifest.num_rows} rows one after the other")
        finding = Finding(path.name, tuple(problems), manifest.num_samples, is_shard=False)
        return list(manifest.shards), [finding] if problems else []
    except ValueError as error:
        problem = f"{path.name}: {error}"
    names = sorted(file.stem for file in (folder / "receipts").glob("*.json"))
    found = [load_receipt(LocalFolder(folder), Receipt, name) for name in names]
    receipts = [receipt for name, receipt in zip(names, found, strict=True) if receipt and receipt.name == name]
    if content is None and not names:
        num_tars = sum(1 for _ in folder.rglob("*.tar"))
        what = f"{num_tars} tar files of somebody else's" if num_tars else "no tar files"
        raise ValueError(
            f"{folder} is not a dataset of pipelines.preprocess (no {path.name}, no receipts; {what}): "
            "there are no hashes to compare it with"
        )
    unreadable = [Finding(name, ("its receipt cannot be read",), 0) for name in names if name not in {r.name for r in receipts}]
    return receipts, [Finding(path.name, (problem,), sum(r.num_samples for r in receipts), is_shard=False), *unreadable]


def _each(folder: Path, receipts: Sequence[Receipt], num_workers: int) -> Iterator[list[str]]:
    """`check_shard` of every receipt, in order; in as many processes, where that pays."""
    check = functools.partial(check_shard, folder)
    if num_workers == 1 or len(receipts) < 2 or sum(receipt.tar.bytes for receipt in receipts) < FEW_BYTES:
        yield from map(check, receipts)
        return
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(check, receipts)


def _count_problems(receipt: Receipt, samples: Records, images: Records, quarantine: bytes) -> list[str]:
    """Whether index, quarantine and receipt count the same."""
    problems = []
    num_left_out = sum(receipt.quarantined.values())
    for what, found, wanted in (
        ("samples in the index", len(samples), receipt.num_samples),
        ("images in the index", len(images), receipt.num_images),
        ("images of the index's samples", int(samples["num_images"].sum()), receipt.num_images),
        ("quarantined rows", quarantine.count(b"\n"), num_left_out),
        ("samples and quarantined rows", receipt.num_samples + num_left_out, receipt.end_row - receipt.first_row),
    ):
        if found != wanted:
            problems.append(f"{found} {what}, not {wanted}")
    rows = samples["row"].tolist()
    if rows != sorted(set(rows)) or (rows and not receipt.first_row <= rows[0] <= rows[-1] < receipt.end_row):
        problems.append(f"the index's rows do not rise from {receipt.first_row} to below {receipt.end_row}")
    return problems


def _length_problems(folder: LocalFolder, receipt: Receipt) -> list[str]:
    """Whether every text column that the shard has is its own, and whole."""
    problems = []
    for path in sorted((folder.path / "lengths").glob(f"*/{receipt.name}.text")):
        name = shard_format.lengths_file(path.parent.name, receipt.name)
        try:
            shard_format.decode_text_column(folder.read(name) or b"", receipt)
        except ValueError as error:
            problems.append(f"{name}: {error} (it can be deleted: it is made again)")
    return problems


def _members(samples: Records, images: Records) -> Iterator[tuple[str, int, int, int]]:
    """(name up to the format, offset, size, CRC-32) of every member, in the tar's order."""
    for sample in samples:
        key, first = shard_format.sample_key(int(sample["row"])), int(sample["first_image"])
        yield f"{key}.json", int(sample["offset"]), int(sample["size"]), int(sample["crc32"])
        for k, record in enumerate(images[first : first + int(sample["num_images"])]):
            yield f"{key}.{k}.", int(record["offset"]), int(record["size"]), int(record["crc32"])


def _member_problems(tar: Path, samples: Records, images: Records) -> list[str]:
    """Whether a tar holds the members of its index, in order, each with its content, and nothing else."""
    with tar.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    view = memoryview(data)
    wanted = list(_members(samples, images))
    found, problems = _headers(data)
    names = [_without_format(name) for name, _, _ in found]
    expected = [name for name, *_ in wanted]
    for what, those in (
        ("members twice", [name for name, count in Counter(names).items() if count > 1]),
        ("extra members", sorted(set(names) - set(expected))),
        ("members without a header", sorted(set(expected) - set(names))),
    ):
        if those:
            problems.append(f"{len(those)} {what}, the first {those[0].rstrip('.')}")
    places = [(_without_format(name), offset, size) for name, offset, size in found]
    if not problems and places != [member[:3] for member in wanted]:
        problems.append("its members are not in the index's order")
    broken = dict.fromkeys(
        name.split(".")[0]
        for name, offset, size, crc32 in wanted
        if len(data) < offset + size or zlib.crc32(view[offset : offset + size]) != crc32
    )
    if broken:
        problems.append(f"{len(broken)} of its samples do not match their checksums, the first {next(iter(broken))}")
    return problems


def _headers(data: bytes | mmap.mmap) -> tuple[list[tuple[str, int, int]], list[str]]:
    """(name, offset, size) of the members that headers tell of, and what is wrong with headers, padding and end."""
    found: list[tuple[str, int, int]] = []
    at = 0
    while data[at : at + shard_format.BLOCK].strip(b"\0"):
        block = data[at : at + shard_format.BLOCK]
        try:
            member = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            is_ours = block == shard_format.tar_header(member.name, member.size)
        except (tarfile.HeaderError, ValueError):
            is_ours = False
        if not is_ours:
            return found, [f"a damaged header at byte {at}"]
        start, end = at + shard_format.BLOCK, at + shard_format.BLOCK + member.size
        found.append((member.name, start, member.size))
        at = end + len(shard_format.padding(member.size))
        if data[end:at].strip(b"\0"):
            return found, [f"no zeros behind {member.name}"]
    return found, [] if data[at:] == shard_format.TAR_END else [f"no end at byte {at}"]


def _without_format(name: str) -> str:
    """An image's member up to its suffix, which the index does not hold; any other name as it is."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}." if suffix in image_file.SUFFIXES.values() else name


def _strays(folder: Path, receipts: Sequence[Receipt]) -> tuple[list[str], list[str]]:
    """Files that no receipt tells of: among the shards' files, and elsewhere in the folder."""
    known = {shard_format.MANIFEST, ".lock"}
    for receipt in receipts:
        names = shard_format.shard_files(receipt.name)
        known |= {*dataclasses.astuple(names), f"{names.tar}.idx"}
    extra: list[str] = []
    foreign: list[str] = []
    for path in sorted(folder.rglob("*")):
        name, part = path.relative_to(folder).as_posix(), path.relative_to(folder).parts[0]
        if name in known or part in BESIDE or path.is_dir():
            continue
        (extra if part in PARTS else foreign).append(name)
    return extra, foreign


def _state(path: Path) -> str:
    """Of a file that is not as it should be."""
    return f"{path.name} is {'damaged' if path.is_file() else 'missing'}"
