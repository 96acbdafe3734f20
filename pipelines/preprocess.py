"""Raw image-text files -> a verified shard dataset, one Ray task per shard.

    python -m pipelines.preprocess --source llava --annotations FILE.json --images DIR --out DIR

Every image is decoded once; rows with a missing or damaged one go to OUT/quarantine with the reason, and their neighbours
lose nothing. The same input gives the same bytes on every run, with Ray or `--engine local`, on one worker or many. Run the
same command again after a crash: shards whose receipts verify are kept, the rest is made.

Image bytes never pass through Ray: a task gets its rows' text and reads, checks and writes by itself. Ray starts on this
machine without a dashboard and stops at the end; with RAY_ADDRESS set a running cluster is used instead (OUT, the images and
this package must then be the same on its machines). Ray trusts its network, and its processes listen on every interface.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from himix_megatron.data import image, schema, shards, sources, writing
from himix_megatron.data.schema import Manifest, Receipt
from himix_megatron.data.writing import ReadRow, ShardJob
from pipelines.cli import parse_settings, run_main

Made = tuple[Receipt, bool]
Task = tuple[ShardJob, Sequence[Any]]
PARTS = ("shards", "receipts", "quarantine")
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to read, what to write, and with how many hands."""

    source: Literal["llava"] = "llava"
    """Layout of the source: LLaVA's JSON list of {id, image, conversations} beside a folder of images."""
    annotations: Path
    """The JSON file (or .jsonl: one object a line)."""
    images: Path
    """The folder that image names start from."""
    out: Path
    """The dataset folder to write."""
    name: str | None = None
    """Shards are called NAME-000000.tar; None: the annotation file's name."""
    samples_per_shard: int = 1000
    """Rows per shard, and per task."""
    engine: Literal["ray", "local"] = "ray"
    """`local` uses processes of this machine without Ray; the bytes are the same."""
    num_workers: int | None = None
    """Shards made at the same time; None: one per core (of the cluster, with RAY_ADDRESS)."""
    max_bad_fraction: float = 0.1
    """No dataset is made when a larger share of the rows is bad."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard is {self.samples_per_shard}: wanted 1 or more")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers is {self.num_workers}: wanted 1 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction is {self.max_bad_fraction}: wanted 0 to 1")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", self.shard_prefix):
            raise ValueError(f"shards cannot be called {self.shard_prefix!r}: give --name of letters, digits, dots, - and _")

    @property
    def shard_prefix(self) -> str:
        """NAME of NAME-000000."""
        return self.annotations.stem if self.name is None else self.name


def preprocess(settings: Settings) -> Manifest:
    """Make the dataset, or finish it, and return its manifest (written last).

    Raises: ValueError for a missing source, an output folder that holds another dataset or is being written, or too many bad
    rows.
    """
    if not settings.images.is_dir():
        raise ValueError(f"--images {settings.images}: no such folder")
    rows = sources.llava_rows(settings.annotations)
    config = {
        "source": settings.source,
        "name": settings.shard_prefix,
        "samples_per_shard": settings.samples_per_shard,
        "max_image_pixels": image.MAX_PIXELS,
        "max_image_bytes": sources.MAX_IMAGE_BYTES,
    }
    source_hash = schema.file_digest(settings.annotations).sha256
    read = functools.partial(sources.read_llava, images=settings.images.absolute())
    with attempt_in(settings.out.absolute(), PARTS) as attempt:
        job = ShardJob(settings.out.absolute(), attempt, settings.shard_prefix, 0, schema.hash_of(config), source_hash)
        _refuse_other_dataset(job)
        receipts = _make_all(settings, job, rows, read)
        manifest = Manifest(
            schema_version=schema.SCHEMA_VERSION,
            name=settings.shard_prefix,
            config=config,
            config_hash=job.config_hash,
            source_hash=source_hash,
            num_rows=len(rows),
            num_samples=sum(receipt.num_samples for receipt in receipts),
            num_images=sum(receipt.num_images for receipt in receipts),
            quarantined=dict(sorted(_quarantined(receipts).items())),
            shards=tuple(receipts),
        )
        writing.write_manifest(job.folder, manifest)
    return manifest


def _make_all(settings: Settings, job: ShardJob, rows: list[Any], read: ReadRow) -> list[Receipt]:
    """Make every shard. Returns: receipts in order. Raises: ValueError as soon as too many rows are bad."""
    size = settings.samples_per_shard
    progress = _Progress(len(rows), -(-len(rows) // size))

    def tasks() -> Iterator[Task]:
        progress.start()  # the engine asks for the first task when it is up: its start is not in the rate
        for number, first in enumerate(range(0, len(rows), size)):
            yield _part(job, number, first), rows[first : first + size]

    engine = _with_ray if settings.engine == "ray" else _with_processes
    receipts: list[Receipt] = []
    with contextlib.closing(engine(tasks(), read, settings.num_workers)) as results:
        for receipt, was_written in results:
            receipts.append(receipt)
            bad = _quarantined(receipts)
            progress.show(receipt, was_written, bad.total())
            if bad.total() > settings.max_bad_fraction * len(rows):
                raise ValueError(
                    f"{bad.total()} of {len(rows)} rows are bad ({_counts(bad)}), more than --max-bad-fraction "
                    f"{settings.max_bad_fraction} allows; {job.folder / 'quarantine'} lists them"
                )
    return sorted(receipts, key=lambda receipt: receipt.first_row)


def _part(job: ShardJob, number: int, first_row: int) -> ShardJob:
    name = schema.shard_name(job.name, number)
    return ShardJob(job.folder, job.attempt, name, first_row, job.config_hash, job.source_hash)


@contextlib.contextmanager
def ray_started(num_workers: int | None = None) -> Iterator[int]:
    """Ray for as long as the block lasts; one that already runs in this process is used and left alone.

    Yields: the number of tasks that fit at the same time. Several datasets made within one block start Ray once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about this run is sent anywhere
    import ray  # only this engine needs it

    was_running = ray.is_initialized()
    if not was_running:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not os.environ.get("RAY_ADDRESS"):
            options |= {
                "address": "local",
                "num_cpus": num_workers or os.cpu_count(),
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "object_store_memory": 256 << 20,  # it holds the texts of the tasks under way, nothing else
            }
        ray.init(**options)
    try:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield num_workers or int(resources.get("CPU", 1))
    finally:
        if not was_running:
            ray.shutdown()


def _with_ray(tasks: Iterator[Task], read: ReadRow, num_workers: int | None) -> Generator[Made, None, None]:
    """One Ray task per shard, at most two per worker under way."""
    with ray_started(num_workers) as workers:
        import ray

        make = ray.remote(writing.make_shard).options(num_cpus=1, max_retries=3)  # again when its worker died

        def finish(running: list[Any]) -> tuple[list[Made], list[Any]]:
            done, rest = ray.wait(running)
            return ray.get(done), rest

        yield from _bounded(tasks, lambda task: make.remote(*task, read), finish, 2 * workers)


def _with_processes(tasks: Iterator[Task], read: ReadRow, num_workers: int | None) -> Generator[Made, None, None]:
    """The same in processes of this machine; with one worker, in this process."""
    workers = num_workers or os.cpu_count() or 1
    if workers == 1:
        yield from (writing.make_shard(*task, read) for task in tasks)
        return

    def finish(running: list[Future[Made]]) -> tuple[list[Made], list[Future[Made]]]:
        done, rest = wait(running, return_when=FIRST_COMPLETED)
        return [future.result() for future in done], list(rest)

    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from _bounded(tasks, lambda task: pool.submit(writing.make_shard, *task, read), finish, 2 * workers)


def _bounded(
    tasks: Iterator[Task],
    start: Callable[[Task], Any],
    finish: Callable[[list[Any]], tuple[list[Made], list[Any]]],
    limit: int,
) -> Iterator[Made]:
    """Keep `limit` tasks under way; results come as they are done."""
    running: list[Any] = []
    for task in tasks:
        running.append(start(task))
        if len(running) == limit:
            done, running = finish(running)
            yield from done
    while running:
        done, running = finish(running)
        yield from done


@contextlib.contextmanager
def attempt_in(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """An output folder made ready with its parts, locked, and cleared of what killed attempts left.

    Yields: this attempt's own folder. Raises: ValueError while another run is writing there.
    """
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder}: another run is writing it") from None
        for left in folder.glob(".partial-*"):
            shutil.rmtree(left)
        attempt = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            yield attempt
        finally:
            shutil.rmtree(attempt, ignore_errors=True)


def _refuse_other_dataset(job: ShardJob) -> None:
    """Raises: ValueError when the folder has shards of another source or other settings: they would be overwritten."""
    for path in sorted((job.folder / "receipts").glob("*.json")):
        receipt = shards.load_receipt(job.folder, path.stem)
        if receipt and (receipt.config_hash, receipt.source_hash) != (job.config_hash, job.source_hash):
            what = (
                "another annotation file" if receipt.source_hash != job.source_hash else "another --name or --samples-per-shard"
            )
            raise ValueError(f"--out {job.folder} holds shards made with {what}: choose another folder, or delete this one")


def _quarantined(receipts: Sequence[Receipt]) -> Counter[str]:
    total: Counter[str] = Counter()
    for receipt in receipts:
        total.update(receipt.quarantined)
    return total


def _counts(quarantined: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(quarantined.items()))


class _Progress:
    """One line on stderr: on a terminal redrawn with every shard, elsewhere every few seconds."""

    def __init__(self, num_rows: int, num_shards: int) -> None:
        self.num_rows, self.num_shards = num_rows, num_shards
        self.rows = self.shards = self.kept = 0
        self.start()

    def start(self) -> None:
        """Set the clock to zero."""
        self.started = self.shown = time.monotonic()

    def show(self, receipt: Receipt, was_written: bool, num_bad: int) -> None:
        """Count one more shard."""
        self.rows += receipt.end_row - receipt.first_row
        self.shards += 1
        self.kept += not was_written
        now, on_terminal = time.monotonic(), sys.stderr.isatty()
        is_last = self.shards == self.num_shards
        if not (on_terminal or is_last or now - self.shown >= PROGRESS_SECONDS):
            return
        self.shown = now
        rate = self.rows / max(now - self.started, 1e-9)
        line = (
            f"preprocess: {self.shards}/{self.num_shards} shards ({self.kept} kept), {self.rows}/{self.num_rows} rows, "
            f"{rate:.0f} rows/s, {(self.num_rows - self.rows) / rate:.0f} s left, {num_bad} quarantined"
        )
        print(("\r\033[K" if on_terminal else "") + line, end="" if on_terminal and not is_last else "\n", file=sys.stderr)
        sys.stderr.flush()


def main() -> None:
    """The command line."""
    settings = parse_settings(Settings, sys.argv[1:], "python -m pipelines.preprocess", __doc__)
    manifest = preprocess(settings)
    left_out = (
        f"; left out: {_counts(manifest.quarantined)} (see {settings.out / 'quarantine'})" if manifest.quarantined else ""
    )
    print(
        f"{settings.out}: {manifest.num_samples} samples, {manifest.num_images} images, {len(manifest.shards)} shards{left_out}"
    )


if __name__ == "__main__":
    run_main(main)
