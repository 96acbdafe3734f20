"""Raw image-text files -> a verified shard dataset, one Ray task per shard.

    python -m pipelines.preprocess --source llava --annotations FILE.json --images DIR --out DIR
    python -m pipelines.preprocess --source parquet|img2dataset|webdataset --input DIR --out DIR

Places are paths, file:// or s3://. Every image is decoded once; rows with a missing or damaged one go to OUT/quarantine with
the reason, and their neighbours lose nothing. The same input gives the same bytes on every run, with Ray or `--engine local`,
on one worker or many. Run the same command again after a crash: shards whose receipts verify are kept, the rest is made.

Image bytes never pass through Ray: a task gets its rows' text, or which rows of which files, and reads, checks and writes by
itself. Ray starts on this machine without a dashboard and stops at the end; with RAY_ADDRESS set a running cluster is used
instead (OUT, the source and this package must then be the same on its machines). Ray trusts its network, and its processes
listen on every interface.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import pkgutil
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from himix_megatron.config import Count, Fraction, check_limits
from himix_megatron.data.images import image_file
from himix_megatron.data.ingest import shard_writer
from himix_megatron.data.ingest.shard_writer import Check, ShardJob
from himix_megatron.data.ingest.sources.base import MAX_SAMPLE_BYTES, Part, Source
from himix_megatron.data.ingest.sources.file_list import FileReader, FileScan, FilesSource, find_files
from himix_megatron.data.ingest.sources.llava import LlavaSource
from himix_megatron.data.shards import shard_format, storage
from himix_megatron.data.shards.shard_format import Manifest, Receipt
from himix_megatron.data.text import chat_template, tokenizer
from himix_megatron.runtime.untrusted_files import escaped, folder_below, open_lock
from pipelines.cli import parse_settings, run_main
from pipelines.launchers.task_engine import Engine, engine_started

PARTS = ("shards", "receipts", "quarantine")
PROGRESS_SECONDS = 5.0
RATE_SECONDS = 60.0
SOURCES = {
    "llava": None,
    "parquet": "himix_megatron.data.ingest.sources.parquet:ParquetReader",
    "img2dataset": "himix_megatron.data.ingest.sources.img2dataset:open_img2dataset",
    "webdataset": "himix_megatron.data.ingest.sources.webdataset:TarReader",
}
"""The sources by name, and what reads their files (imported only then: a task that reads LLaVA's rows needs no pyarrow)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to read, what to write, and how many workers do it."""

    source: str = "llava"
    """Layout of the source: `llava`, a JSON list of {id, image, conversations} beside a folder of images; `parquet`, files with
    the images in them; `img2dataset`, what it wrote; `webdataset`, tars of any; or `package.module:Reader`, files that a reader
    of your own reads."""
    annotations: str | Path | None = None
    """llava: JSON file (or .jsonl: one object per line)."""
    images: str | Path | None = None
    """llava: folder that image names are relative to."""
    input: tuple[str | Path, ...] = ()
    """Other sources: files, or folders whose files are read in the order of their names."""
    image_column: str | None = None
    """parquet: column with bytes, {bytes, path}, or lists of them; None: images, image, jpg, png or webp."""
    text_column: str | None = None
    """parquet: column with LLaVA's turns, or captions; None: conversations, text or caption."""
    id_column: str | None = None
    """parquet: column with identifiers; None: id or key, where there is one."""
    out: str | Path
    """Dataset folder to write."""
    name: str | None = None
    """Prefix of the shards, NAME-000000.tar; None: the name of the annotation file or of the first input."""
    samples_per_shard: Count = 1000
    """Number of rows per shard, and per task."""
    check: Check = "decode"
    """Check of each image. decode: it is decoded; header: only its header is read, and training finds damaged ones."""
    tokenizer: str | None = None
    """Model folder, or `bytes`, whose tokenizer counts each text's tokens; None: training counts them on first use."""
    template: str | None = None
    """Chat template that goes with `tokenizer`, as in --data.template."""
    engine: Literal["ray", "local"] = "ray"
    """Engine that runs the tasks. ray: Ray; local: processes of this machine, with the same bytes as result."""
    num_workers: Count | None = None
    """Number of shards made at the same time; None: one per core (of the cluster, with RAY_ADDRESS)."""
    follow_links: bool = False
    """Read what is a symbolic link below --images or --input; a stranger's link can lead to any file of yours."""
    max_bad_fraction: Fraction = 0.1
    """Maximum share of bad rows; above it no dataset is made."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.source not in SOURCES and ":" not in self.source:
            raise ValueError(f"--source is {self.source}: wanted one of {', '.join(SOURCES)}, or package.module:Reader")
        self._check_source()
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{,99}", self.shard_prefix):
            raise ValueError(f"shards cannot be called {self.shard_prefix!r}: give --name of letters, digits, dots, - and _")
        if (self.tokenizer is None) != (self.template is None):
            raise ValueError("text lengths need both --tokenizer and --template")
        if self.template is not None and self.template not in chat_template.TEMPLATES:
            raise ValueError(f"--template is {self.template}: wanted one of {', '.join(chat_template.TEMPLATES)}")

    def _check_source(self) -> None:
        """Raises: ValueError for a place that is missing, that another source would need, or of another scheme."""
        is_llava = self.source == "llava"
        given = {"--annotations": self.annotations, "--images": self.images, "--input": self.input}
        for flag, value in given.items():
            if bool(value) != (is_llava == (flag != "--input")):
                what = "must be given" if not value else "belongs to another source"
                raise ValueError(
                    f"{flag} {what}: --source {self.source} reads {'--annotations and --images' if is_llava else '--input'}"
                )
        for flag in ("image_column", "text_column", "id_column"):
            if getattr(self, flag) is not None and self.source != "parquet":
                raise ValueError(f"--{flag.replace('_', '-')} belongs to --source parquet, not {self.source}")
        for flag, place in self._places():
            storage.check_scheme(place, flag)

    def _places(self) -> list[tuple[str, str]]:
        """(flag, place) of everything that is read or written."""
        given = [("--annotations", self.annotations), ("--images", self.images), ("--out", self.out)]
        given += [("--input", place) for place in self.input]
        return [(flag, str(place)) for flag, place in given if place is not None]

    def check_reachable(self) -> None:
        """Raises: ValueError for an object store that does not answer."""
        for flag, place in self._places():
            storage.check_reachable(place, flag)

    @property
    def shard_prefix(self) -> str:
        """NAME of NAME-000000."""
        return Path(storage.name_of(str(self.annotations or self.input[0]))).stem if self.name is None else self.name


def preprocess(settings: Settings) -> Manifest:
    """Make the dataset, or finish it, and return its manifest (written last).

    Raises: ValueError for a missing or damaged source, an output folder that holds another dataset or is being written, or too
    many bad rows.
    """
    column = None
    if settings.tokenizer is not None and settings.template is not None:
        column = (_absolute(settings.tokenizer), settings.template)
        chat_template.check_tokenizer(tokenizer.load_tokenizer(column[0]), column[1])
    settings.check_reachable()
    files = _files(settings)
    ready = None if files else LlavaSource(str(settings.annotations), str(settings.images), settings.follow_links)
    config = _config(settings, files[0] if files else None)
    with engine_started(settings.engine, settings.num_workers) as engine:
        source = ready or _scan(engine, *files)  # type: ignore[misc]
        with attempt_in(str(settings.out), PARTS) as (folder, attempt):
            in_task = None if isinstance(folder, storage.RemoteFolder) else attempt
            job = ShardJob(
                folder, in_task, settings.shard_prefix, shard_format.hash_of(config), source.source_hash, settings.check, column
            )
            _refuse_other_dataset(job, config)
            receipts = _make_all(settings, engine, job, source)
            manifest = Manifest(
                schema_version=shard_format.SCHEMA_VERSION,
                name=settings.shard_prefix,
                config=config,
                config_hash=job.config_hash,
                source_hash=job.source_hash,
                num_rows=source.num_rows,
                num_samples=sum(receipt.num_samples for receipt in receipts),
                num_images=sum(receipt.num_images for receipt in receipts),
                quarantined=dict(sorted(sum((Counter(r.quarantined) for r in receipts), Counter[str]()).items())),
                shards=tuple(receipts),
            )
            shard_writer.write_record(folder, attempt, shard_format.MANIFEST, manifest)
    return manifest


def _config(settings: Settings, reader: FileReader | None) -> dict[str, Any]:
    """The settings that decide the bytes."""
    columns = {"image_column", "text_column", "id_column"} if settings.source == "parquet" else set()
    return {
        "source": settings.source,
        "name": settings.shard_prefix,
        "samples_per_shard": settings.samples_per_shard,
        "check": settings.check,
        **{name: getattr(settings, name) for name in sorted(columns)},
        **({"layout": type(reader).__name__} if settings.source == "img2dataset" else {}),
        "max_image_pixels": image_file.MAX_PIXELS,
        "max_sample_bytes": MAX_SAMPLE_BYTES,
    }


def _files(settings: Settings) -> tuple[FileReader, list[str]] | None:
    """How the source's files are read, and which they are; None for LLaVA's."""
    inputs = [str(place) for place in settings.input]
    if settings.source == "llava":
        return None
    try:
        found = pkgutil.resolve_name(SOURCES.get(settings.source) or settings.source)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--source {settings.source}: {error}") from None
    if settings.source == "img2dataset":
        opened: tuple[FileReader, list[str]] = found(inputs, settings.follow_links)
        return opened
    is_parquet = settings.source == "parquet"
    reader: FileReader = found(settings.image_column, settings.text_column, settings.id_column) if is_parquet else found()
    return reader, find_files(inputs, reader.suffixes, settings.follow_links)


def _scan_file(reader: FileReader, number: int, place: str) -> tuple[int, FileScan]:
    return number, reader.scan(place)


def _scan(engine: Engine, reader: FileReader, places: list[str]) -> FilesSource:
    """The first pass over the files: hash them and count their rows."""
    progress = Progress("scan", "files", len(places), 0)
    scans: dict[int, FileScan] = {}
    with contextlib.closing(engine.run(_scan_file, ((reader, *item) for item in enumerate(places)))) as results:
        for number, scan in results:
            scans[number] = scan
            progress.show(scan.num_rows)
    return FilesSource(reader, places, [scans[number] for number in range(len(places))])


def _make_all(settings: Settings, engine: Engine, job: ShardJob, source: Source) -> list[Receipt]:
    """Make every shard. Returns: receipts in order. Raises: ValueError as soon as too many rows are bad."""
    size, num_rows = settings.samples_per_shard, source.num_rows
    progress = Progress("preprocess", "shards", -(-num_rows // size), num_rows)

    def tasks() -> Iterator[tuple[ShardJob, Part]]:
        progress.start()  # the engine asks for the first task when it is up: its start is not in the rate
        for number, first in enumerate(range(0, num_rows, size)):
            name = shard_format.shard_name(job.name, number)
            yield dataclasses.replace(job, name=name), source.part(first, min(first + size, num_rows))

    receipts: list[Receipt] = []
    bad: Counter[str] = Counter()
    with contextlib.closing(engine.run(shard_writer.make_shard, tasks())) as results:
        for receipt, was_written in results:
            receipts.append(receipt)
            bad.update(receipt.quarantined)
            progress.show(receipt.end_row - receipt.first_row, not was_written, bad.total())
            if bad.total() > settings.max_bad_fraction * num_rows:
                raise ValueError(
                    f"{bad.total()} of {num_rows} rows are bad ({_counts(bad)}), more than --max-bad-fraction "
                    f"{settings.max_bad_fraction} allows; {storage.join(str(job.folder), 'quarantine')} lists them"
                    f"{_retry_hint(settings, bad)}"
                )
    return sorted(receipts, key=lambda receipt: receipt.first_row)


@contextlib.contextmanager
def attempt_in(out: str, parts: Sequence[str]) -> Iterator[tuple[storage.LocalFolder | storage.RemoteFolder, Path]]:
    """An output folder made ready with its parts, locked, cleared of what killed attempts left; and this attempt's own.

    An object store has no lock: two runs of one command there write the same objects twice, and one of another dataset is
    refused by the receipts.
    """
    folder = storage.folder_at(out)
    if isinstance(folder, storage.RemoteFolder):
        with tempfile.TemporaryDirectory(prefix="himix-preprocess-") as temporary:
            yield folder, Path(temporary)
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    for part in parts:
        folder_below(folder.path, part)
    with open_lock(folder.path, ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder}: another run is writing it") from None
        for left in folder.path.glob(".partial-*"):
            left.unlink() if left.is_symlink() or not left.is_dir() else shutil.rmtree(left)
        for left in folder.path.glob("lengths/*/.*.text.*"):
            folder_below(folder.path, f"lengths/{left.parent.name}")
            left.unlink(missing_ok=True)
        attempt = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.path))
        try:
            yield folder, attempt
        finally:
            shutil.rmtree(attempt, ignore_errors=True)


def _refuse_other_dataset(job: ShardJob, config: dict[str, Any]) -> None:
    """Raises: ValueError when the folder has shards of another source or other settings: they would be overwritten."""
    for name in job.folder.receipts():
        receipt = shard_writer.load_receipt(job.folder, Receipt, name)
        if receipt is None:
            continue
        if receipt.source_hash != job.source_hash:
            what = "another annotation file" if config["source"] == "llava" else "other --input files"
        elif receipt.config_hash != job.config_hash:
            what = _other_settings(job, config)
        else:
            return  # whoever wrote the others looked at this one
        raise ValueError(f"--out {job.folder} holds shards made with {what}: choose another folder, or delete this one")


def _other_settings(job: ShardJob, config: dict[str, Any]) -> str:
    """Which settings differ from those of the folder's manifest, if there is one."""
    try:
        old = shard_format.from_json(Manifest, job.folder.read(shard_format.MANIFEST) or b"").config
    except ValueError:
        old = config
    names = [key for key in {**old, **config} if old.get(key) != config.get(key)] or ["name", "samples_per_shard", "check"]
    return "another " + " or ".join(f"--{name.replace('_', '-')}" for name in names)


def _absolute(tokenizer_name: str) -> str:
    """A tokenizer folder wherever a task runs; `bytes` as it is."""
    return str(Path(tokenizer_name).absolute()) if Path(tokenizer_name).is_dir() else tokenizer_name


def _counts(quarantined: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(quarantined.items()))


def _retry_hint(settings: Settings, quarantined: Mapping[str, int]) -> str:
    """How rows that were left out for their images come in; other sources hold their images themselves."""
    count = sum(quarantined.get(reason, 0) for reason in shard_writer.IMAGE_REASONS)
    if settings.source != "llava" or not count:
        return ""
    return f"; {count} for missing or damaged images: put these in place and run the same command again"


class Progress:
    """One line on stderr: on a terminal redrawn with every task, elsewhere every few seconds.

    The rate is that of the last minute: a run that goes on where another stopped passes what is there much faster.
    """

    def __init__(self, what: str, unit: str, num_tasks: int, num_rows: int, row: str = "row") -> None:
        """`unit`: the plural of a task; `row`: the singular of what a task has many of."""
        self.what, self.unit, self.num_tasks, self.num_rows, self.row = what, unit, num_tasks, num_rows, row
        self.rows = self.tasks = self.kept = 0
        self.start()

    def start(self) -> None:
        """Set the clock to zero."""
        self.shown = time.monotonic()
        self.recent = deque([(self.shown, 0)])

    def show(self, rows: int, was_kept: bool = False, num_bad: int = 0) -> None:
        """Count one more task."""
        self.rows += rows
        self.tasks += 1
        self.kept += was_kept
        now, on_terminal = time.monotonic(), sys.stderr.isatty()
        is_last = self.tasks == self.num_tasks
        if not (on_terminal or (is_last and self.num_rows) or now - self.shown >= PROGRESS_SECONDS):
            return
        self.shown = now
        line = f"{self.what}: {self.tasks}/{self.num_tasks} {self.unit} "
        while len(self.recent) > 1 and now - self.recent[0][0] > RATE_SECONDS:
            self.recent.popleft()
        then, rows_then = self.recent[0]
        rate = (self.rows - rows_then) / max(now - then, 1e-9)
        self.recent.append((now, self.rows))
        if self.num_rows:
            left = (self.num_rows - self.rows) / max(rate, 1e-9)
            line += f"({self.kept} kept), {self.rows}/{self.num_rows} {self.row}s, "
            line += f"{rate:.0f} {self.row}s/s, {left:.0f} s left, {num_bad} quarantined"
        else:
            line += f"({self.rows} {self.row}s), {rate:.0f} {self.row}s/s"
        print(("\r\033[K" if on_terminal else "") + line, end="" if on_terminal and not is_last else "\n", file=sys.stderr)
        sys.stderr.flush()


def main() -> None:
    """The command line."""
    settings = parse_settings(Settings, sys.argv[1:], "python -m pipelines.preprocess", __doc__)
    manifest = preprocess(settings)
    said = f"{settings.out}: {manifest.num_samples} samples, {manifest.num_images} images, {len(manifest.shards)} shards"
    if manifest.quarantined:
        said += f"; left out: {_counts(manifest.quarantined)} (see {storage.join(str(settings.out), 'quarantine')})"
    print(escaped(said + _retry_hint(settings, manifest.quarantined)))


if __name__ == "__main__":
    run_main(main)
