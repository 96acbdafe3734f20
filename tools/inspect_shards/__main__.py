"""What is in a shard dataset, and is it intact?

    python -m tools.inspect_shards DIR                      numbers and histograms
    python -m tools.inspect_shards DIR --sheet sheet.png    also a picture of random samples with their texts
    python -m tools.inspect_shards DIR --verify             check every byte against its hash; exit code 1 if any is damaged

Verification prints one line for each damaged shard, with the number of samples at stake. It checks files against the hashes of
receipt and manifest, tar headers and padding, members against the index (missing, extra, swapped, duplicated), counts and
checksums, and names files that do not belong to the dataset. Exit code 0: everything is as written; 2: the folder is not a
dataset of pipelines.preprocess. To repair, run the preprocessing again: it makes only what is missing or damaged.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from himix_megatron.config import Count
from himix_megatron.data.ingest.verify import Report, verify_dataset
from himix_megatron.data.shards.reader import AGAIN, ShardDataset
from pipelines.cli import parse_settings, run_main
from pipelines.flags import Word
from tools.inspect_shards.histogram import drawn, histogram, summary
from tools.inspect_shards.statistics import Numbers, Statistics, draw, statistics

PROGRESS_SECONDS = 0.2


@dataclass(frozen=True)
class Arguments:
    """Describe a shard dataset, or verify it."""

    dir: Annotated[Path, Word("DIR")]
    """The dataset: the folder with manifest.json."""
    verify: bool = False
    """Compare every byte with what was written, and print only the result."""
    sheet: Path | None = None
    """PNG file to write: random samples with their texts, and the histograms."""
    sheet_samples: Count = 12
    """Samples on the sheet."""
    texts: Count = 10_000
    """Random samples whose texts are read for the numbers about texts and formats."""
    seed: int = 0
    """Seed of the random samples."""
    num_workers: Count | None = None
    """Processes that verify. None: one per core."""


def main() -> int:
    """The command line."""
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.inspect_shards", __doc__)
    if not arguments.dir.is_dir():
        raise ValueError(f"{arguments.dir}: no such folder")
    if arguments.verify:
        report = verify_dataset(arguments.dir, arguments.num_workers or os.cpu_count() or 1, _Progress("verify", _size).show)
        print(*verdict(arguments.dir, report), sep="\n")
        return 1 if report.findings else 0
    dataset = ShardDataset(arguments.dir)
    found = statistics(dataset, arguments.texts, arguments.seed, _Progress("texts", str).show)
    print(*described(dataset, found), sep="\n")
    if arguments.sheet:
        _save_sheet(arguments.sheet, dataset, found, draw(dataset, arguments.sheet_samples, arguments.seed))
        print(f"\nsheet: {arguments.sheet}")
    return 0


def verdict(folder: Path, report: Report) -> Iterator[str]:
    """What a verification found: one line for each damaged shard or file, one that sums up."""
    for finding in report.findings:
        yield str(finding)
    for path in report.foreign:
        yield f"{path}: does not belong to the dataset; it is ignored"
    what = f"{report.num_shards} shards, {report.num_samples} samples, {report.num_images} images, {_size(report.num_bytes)}"
    if not report.findings:
        yield f"{folder}: {what}: hashes, headers, counts and checksums are all right"
        return
    damaged = [finding for finding in report.findings if finding.is_shard]
    others = [finding for finding in report.findings if not finding.is_shard]
    at_stake = max([sum(finding.num_samples for finding in damaged), *(finding.num_samples for finding in others)])
    yield (
        f"{folder}: {len(damaged)} of {report.num_shards} shards are damaged, {at_stake} of {report.num_samples} samples at "
        f"stake, {len(others)} other files are wrong: {AGAIN}"
    )


def described(dataset: ShardDataset, found: Statistics) -> Iterator[str]:
    """The numbers and histograms, line by line."""
    manifest = dataset.manifest
    num_bytes = sum(shard.tar.bytes + shard.index.bytes for shard in manifest.shards)
    yield (
        f"{dataset.path}: {manifest.num_samples:,} samples, {manifest.num_images:,} images, {len(manifest.shards):,} shards, "
        f"{_size(num_bytes)}"
    )
    yield f"fingerprint {dataset.fingerprint}, made from {manifest.num_rows:,} rows"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.quarantined.items())
    yield f"left out: {sum(manifest.quarantined.values()):,} rows ({reasons or 'none'})"
    images = sum(found.formats.values())
    formats = ", ".join(f"{suffix} {100 * count / images:.1f} %" for suffix, count in found.formats.items())
    yield f"formats: {formats or 'no images'} (of {images:,} images looked at)"
    if found.num_unreadable:
        yield f"unreadable: {found.num_unreadable:,} of {found.num_looked_at:,} samples looked at (--verify tells more)"
    full = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    for title, values in _measured(found):
        yield ""
        yield f"{title}: {summary(values)}"
        yield from (f"  {line}" for line in drawn(histogram(values), full=full))


def _measured(found: Statistics) -> Iterator[tuple[str, Numbers]]:
    """What histograms are made of."""
    yield "images per sample", found.images_per_sample
    yield "image width, pixels", found.image_widths
    yield "image height, pixels", found.image_heights
    yield "image file, KiB", (found.image_bytes + 1023) // 1024
    yield f"text characters (of {len(found.characters):,} samples)", found.characters
    yield f"turns (of {len(found.turns):,} samples)", found.turns
    for column, lengths in found.text_tokens.items():
        yield f"text tokens, column {column}", lengths


def _save_sheet(path: Path, dataset: ShardDataset, found: Statistics, samples: list[int]) -> None:
    from tools.inspect_shards.contact_sheet import Chart, sheet

    manifest = dataset.manifest
    charts = [Chart(title, summary(values), histogram(values)) for title, values in _measured(found) if len(values)]
    note = (
        f"{manifest.num_samples:,} samples, {manifest.num_images:,} images, {len(manifest.shards):,} shards; "
        f"{len(samples)} samples drawn at random; questions blue, answers green"
    )
    sheet(path, dataset, samples, manifest.name, note, charts)


def _size(num_bytes: int) -> str:
    """1.2 MB."""
    value, unit = float(num_bytes), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if unit != "bytes" else f"{num_bytes} bytes"


class _Progress:
    """One line on stderr, redrawn and in the end cleared; nothing where there is no terminal."""

    def __init__(self, what: str, shown_as: Callable[[int], str]) -> None:
        self.what, self.shown_as = what, shown_as
        self.started, self.shown = time.monotonic(), 0.0

    def show(self, done: int, total: int) -> None:
        """Show the amount done and the total."""
        now, is_last = time.monotonic(), done == total
        if not sys.stderr.isatty() or not (is_last or now - self.shown >= PROGRESS_SECONDS):
            return
        self.shown = now
        rate = done / max(now - self.started, 1e-9)
        line = (
            f"{self.what}: {self.shown_as(done)} of {self.shown_as(total)}, {self.shown_as(int(rate))}/s, "
            f"{(total - done) / max(rate, 1):.0f} s left"
        )
        print(f"\r\033[K{'' if is_last else line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
