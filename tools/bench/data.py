"""Reading, decoding, preprocessing and packing, beside webdataset, megatron-energon and Ray Data, in one run on one machine.

    make bench-data
    make bench-data BENCH_ARGS="--only read pack --scale 0.1"
    python -m tools.bench.data --export-energon DIR      let megatron-energon read a shard dataset

The target builds an environment that has the others, and its own data: photo-like JPEGs of about 640x480 pixels and 64 KB, each
with a conversation, in shards of 512 (550 MB at --scale 1). Repetitions take turns after one uncounted round, which brings the
files into the page cache. Ratios are of medians. Exit code 1 if a stated ratio is missed.

- read: samples per second into one process, in order, without decoding: ours with and without checksums, webdataset on the same
  tars, megatron-energon on the same tars with its own index.
- decode: one core; ours reads, decodes and resizes to 384x384 as uint8; webdataset reads, Pillow decodes and resizes (bicubic),
  torch normalises to fp32. The distance of our pixels from Pillow's is counted in levels of 255.
- preprocess: JSON and images to shards: ours with Ray, ours in one process, and Ray Data's `map_batches` with
  `write_webdataset` and the same checks (also with Pillow's decoding). Ray runs already. Ours syncs every shard to the disk and
  hashes it, Ray Data does neither.
- pack: how full packs of 2,048 text tokens and 46 images of 729 tokens are, of the budget that binds, for lengths like LLaVA's.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from himix_megatron.config import Count, Limit
from himix_megatron.data.images import image_file
from himix_megatron.data.images.decode import decode
from himix_megatron.data.loading.packing import plan_packs
from himix_megatron.data.loading.plan import WINDOW
from himix_megatron.data.shards.reader import ShardDataset
from pipelines.cli import parse_settings, run_main
from pipelines.recipes import siglip_so400m_384
from tools.bench.measure import Line, report, take_turns
from tools.bench.photos import write_source

NUM_SAMPLES = 8192
SAMPLES_PER_SHARD = 512
DECODED = 1024
"""Samples of the decoding section."""
BATCH = 64
ENERGON_META = ".nv-meta"
Section = Literal["read", "decode", "preprocess", "pack"]
PEERS: dict[Section, tuple[str, ...]] = {
    "read": ("webdataset", "megatron-energon"),
    "decode": ("webdataset",),
    "preprocess": ("ray", "pyarrow"),
    "pack": (),
}
VISION = siglip_so400m_384()
PACK_TEXT_TOKENS, PACK_IMAGES = 2048, 46
SIGMA = 0.6
"""Standard deviation of the logarithm of text lengths."""


@dataclass(frozen=True)
class Arguments:
    """Compare reading, decoding, preprocessing and packing with webdataset, megatron-energon and Ray Data."""

    only: tuple[Section, ...] = tuple(PEERS)
    """Sections to run."""
    scale: Annotated[float, Limit(0.005, 10)] = 1.0
    """Amount of data; 1 is 8,192 samples (550 MB), for which the wanted ratios are meant."""
    repetitions: Count = 5
    """Counted repetitions; preprocessing does half as many, rounded up."""
    workers: Count = 2
    """Worker processes of preprocessing and of --export-energon."""
    work: Path | None = None
    """Folder for the data (3 GB at --scale 1), emptied at the end. None: the system's temporary folder."""
    export_energon: Path | None = None
    """Write megatron-energon's metadata beside the shards of this dataset, and nothing else."""

    def __post_init__(self) -> None:
        if not self.only:
            raise ValueError(f"--only names no section: wanted some of {', '.join(PEERS)}")

    @property
    def num_samples(self) -> int:
        """Samples of the generated dataset."""
        return int(NUM_SAMPLES * self.scale)


Work = Callable[[], Iterator[int]]
"""Prepares (not timed) and returns an iterator that does the work; it yields numbers of finished samples."""


def rate_of(prepare: Work) -> float:
    """Samples per second of one repetition."""
    work = prepare()
    begun = time.perf_counter()
    return sum(work) / (time.perf_counter() - begun)


def times(rates: dict[str, list[float]], ours: str, theirs: str, wanted: float | None) -> Line:
    """How many times faster one candidate is than another."""
    return Line(f"{ours}, times {theirs}", statistics.median(rates[ours]) / statistics.median(rates[theirs]), wanted)


# ---- read ----------------------------------------------------------------------------------------------------------


def bench_read(shards: Path, arguments: Arguments) -> list[Line]:
    """Samples into one process, nothing decoded."""
    import webdataset

    with_checks, without = ShardDataset(shards), ShardDataset(shards, checksums=False)
    tars = tars_of(with_checks)
    candidates: dict[str, Work] = {
        "ours": lambda: counted(map(without.members, range(len(without)))),
        "ours with checksums": lambda: counted(map(with_checks.members, range(len(with_checks)))),
        "webdataset": lambda: counted(webdataset.WebDataset(tars, shardshuffle=False)),
        "megatron-energon": energon_reader(shards),
    }
    rates = take_turns(candidates, arguments.repetitions, measure=rate_of)
    lines = [
        times(rates, "ours", "webdataset", 3),
        times(rates, "ours with checksums", "webdataset", 2.3),
        times(rates, "ours", "megatron-energon", 8),
    ]
    report(f"read: {len(with_checks)} samples, one process, page cache warm, nothing decoded", lines, rates, unit="samples/s")
    return lines


def export_energon(folder: Path, num_workers: int = 1) -> int:
    """Let megatron-energon write its own metadata, over an earlier export: FOLDER/.nv-meta with the index of samples, the split
    (all shards are `train`) and a dataset.yaml, and one NAME.tar.idx beside each tar. The shards do not change; our reader and
    `tools.inspect_shards --verify` accept the files. To undo the export, delete them. For energon the dataset is a
    CrudeWebdataset: a sample is a dict of `json`, `0.jpg`, `1.png` ..., which a Cooker of your TaskEncoder converts.

    Returns: the number of samples in it. Raises: ValueError if megatron-energon is not installed or counts other samples.
    """
    energon = _energon()
    # megatron-energon cannot take a shard without samples (whose rows were all bad).
    shards = {
        f"shards/{shard.name}.tar": shard.num_samples for shard in ShardDataset(folder).manifest.shards if shard.num_samples
    }
    nothing = "(?!)"  # a regular expression that no name matches
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for every file it writes
        energon.BaseWebdatasetFactory.prepare_dataset(
            folder.absolute(),
            list(shards),
            split_parts_patterns=[("train", ".*"), ("val", nothing), ("test", nothing)],
            workers=num_workers,
        )
    found = json.loads((folder / ENERGON_META / ".info.json").read_text(encoding="utf-8"))["shard_counts"]
    for name, num_samples in shards.items():
        if found.get(name) != num_samples:
            raise ValueError(
                f"{folder / name}: megatron-energon found {found.get(name, 0)} samples, not {num_samples}: "
                f"see python -m tools.inspect_shards {folder} --verify"
            )
    (folder / ENERGON_META / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n", encoding="utf-8"
    )
    return sum(shards.values())


def _energon() -> Any:
    try:
        from megatron import energon
    except ImportError as error:
        if (error.name or "").startswith("megatron"):
            raise ValueError("megatron-energon is not installed: pip install megatron-energon") from None
        raise
    return energon


def energon_reader(shards: Path) -> Work:
    """megatron-energon on the same tars: its own index, without shuffling, decoding or workers."""
    energon = _energon()
    export_energon(shards, os.cpu_count() or 1)

    @energon.stateless
    def unchanged(sample: Any) -> Any:
        return sample

    class Raw(energon.DefaultTaskEncoder):  # type: ignore[misc]
        """No decoding, no collating."""

        decoder = None
        cookers = (energon.Cooker(unchanged),)

    def read() -> Iterator[int]:
        dataset = energon.get_train_dataset(
            shards,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            repeat=False,
            task_encoder=Raw(),
        )
        return counted(energon.get_loader(dataset, watchdog_timeout_seconds=None))

    return read


def tars_of(dataset: ShardDataset) -> list[str]:
    """Its tars, in order."""
    return [str(dataset.path / "shards" / f"{shard.name}.tar") for shard in dataset.manifest.shards]


def counted(items: Iterable[Any], each: int = 1) -> Iterator[int]:
    """`each` for every item, none of which is kept."""
    return (each for _ in items)


# ---- decode --------------------------------------------------------------------------------------------------------


def bench_decode(shards: Path, arguments: Arguments) -> list[Line]:
    """Read, decode and resize on one core."""
    import torch

    torch.set_num_threads(1)
    dataset = ShardDataset(shards)
    num_samples = min(len(dataset), max(BATCH, int(DECODED * arguments.scale)))
    candidates: dict[str, Work] = {
        "ours, uint8": lambda: counted(our_pixels(dataset, num_samples), BATCH),
        "ours, normalised to fp32 here too": lambda: counted(map(normalised, our_pixels(dataset, num_samples)), BATCH),
        "webdataset + Pillow + fp32": lambda: counted(their_pixels(tars_of(dataset), num_samples), BATCH),
    }
    rates = take_turns(candidates, arguments.repetitions, measure=rate_of)
    largest, mean = level_differences(dataset, min(num_samples, 256))
    lines = [
        times(rates, "ours, uint8", "webdataset + Pillow + fp32", 2.5),
        Line(f"largest difference to Pillow in levels of 255 (mean {mean:.4f})", largest, 2, at_most=True),
    ]
    report(f"decode: {num_samples} images to 384x384, one core, batches of {BATCH}", lines, rates, unit="samples/s")
    return lines


def our_pixels(dataset: ShardDataset, num_samples: int) -> Iterator[image_file.Pixels]:
    """Batches as the loader makes them, checksums included."""
    for first in range(0, num_samples - BATCH + 1, BATCH):
        pixels = image_file.blank_pixels(BATCH, VISION.blank_size)
        for place, i in enumerate(range(first, first + BATCH)):
            _, data = dataset.sample(i)
            decode(data[0], VISION, "fast", out=pixels[place])
        yield pixels


def normalised(pixels: image_file.Pixels) -> Any:
    """(x / 255 - mean) / std, as training does it where the tower runs."""
    import torch

    mean, std = (torch.tensor(values)[:, None, None] for values in (VISION.pixel_mean, VISION.pixel_std))
    return torch.from_numpy(pixels).float().div_(255).sub_(mean).div_(std)


def their_pixels(tars: list[str], num_samples: int) -> Iterator[Any]:
    """The usual pipeline: webdataset's own decoding by Pillow, Pillow's bicubic, torch's normalisation."""
    import torch
    import webdataset
    from PIL import Image

    mean, std = (torch.tensor(values)[:, None, None] for values in (VISION.pixel_mean, VISION.pixel_std))

    def tensor(picture: Image.Image) -> torch.Tensor:
        resized = picture.resize((VISION.image_size, VISION.image_size), Image.Resampling.BICUBIC)
        pixels_CHW = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        return pixels_CHW.div_(255).sub_(mean).div_(std)

    samples = iter(webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("0.jpg", "json").map_tuple(tensor))
    for _ in range(num_samples // BATCH):
        yield torch.stack([pixels for pixels, _ in itertools.islice(samples, BATCH)])


def level_differences(dataset: ShardDataset, num_samples: int) -> tuple[int, float]:
    """How far our fast pixels are from Pillow's: the largest, and the mean."""
    largest, total = 0, 0.0
    for i in range(num_samples):
        data = dataset.image_bytes(i, 0)
        fast, exact = (decode(data, VISION, how).astype(np.int16) for how in ("fast", "exact"))
        difference = np.abs(fast - exact)
        largest, total = max(largest, int(difference.max())), total + float(difference.mean())
    return largest, total / num_samples


# ---- preprocess ----------------------------------------------------------------------------------------------------


def bench_preprocess(annotations: Path, images: Path, work: Path, arguments: Arguments) -> list[Line]:
    """JSON and images to shards."""
    from pipelines.launchers.task_engine import ray_started
    from pipelines.preprocess import Settings, preprocess
    from tools.bench import ray_data as ray_data_baseline

    def ours(**options: Any) -> Work:
        source = {"annotations": annotations, "images": images, "samples_per_shard": SAMPLES_PER_SHARD}

        def make(out: Path) -> Iterator[int]:
            with quiet():
                yield preprocess(Settings(out=out, **source, **options)).num_samples

        return lambda: make(fresh(work / "ours"))

    def ray_data(check: ray_data_baseline.Check) -> Work:
        def make(out: Path) -> Iterator[int]:
            with quiet():
                ray_data_baseline.write_by_ray_data(annotations, images, out, check=check, samples_per_shard=SAMPLES_PER_SHARD)
            yield arguments.num_samples

        return lambda: make(fresh(work / "ray-data"))

    workers = arguments.workers
    candidates: dict[str, Work] = {
        "ours, header check": ours(engine="ray", num_workers=workers, check="header"),
        "Ray Data, header check": ray_data("header"),
        "Ray Data, header check by Pillow": ray_data("header by Pillow"),
        "ours, full decode": ours(engine="ray", num_workers=workers, check="decode"),
        "Ray Data, full decode": ray_data("decode"),
        "Ray Data, full decode by Pillow": ray_data("decode by Pillow"),
        "ours in one process, full decode": ours(engine="local", num_workers=1, check="decode"),
    }
    with ray_started(workers, object_store_bytes=ray_data_baseline.OBJECT_STORE_BYTES):
        rates = take_turns(candidates, (arguments.repetitions + 1) // 2, measure=rate_of)
    lines = [
        times(rates, "ours, header check", "Ray Data, header check", 2.5),
        times(rates, "ours, full decode", "Ray Data, full decode", 1.4),
        times(rates, "ours, full decode", "ours in one process, full decode", 1.7),
        times(rates, "ours, header check", "Ray Data, header check by Pillow", None),
        times(rates, "ours, full decode", "Ray Data, full decode by Pillow", None),
    ]
    report(f"preprocess: {arguments.num_samples} rows, {workers} Ray workers, Ray started", lines, rates, unit="samples/s")
    return lines


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress lines."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def fresh(folder: Path) -> Path:
    """The folder, with nothing in it; and nothing of an earlier candidate that the disk still has to write: who syncs would
    wait for that too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()
    return folder


# ---- pack ----------------------------------------------------------------------------------------------------------


def bench_pack(arguments: Arguments) -> list[Line]:
    """How full packs are."""
    draw = np.random.default_rng(0)
    size = WINDOW * max(1, round(16 * arguments.scale))
    lines, rates, each = [], {}, VISION.max_tokens_per_image
    for what, mean, text_only_vision in (("captions", 44, 0.0), ("chats", 314, 40_688 / 665_298)):
        normal = draw.normal(np.log(mean) - SIGMA**2 / 2, SIGMA, size)
        text_tokens = np.clip(np.exp(normal).round(), 4, PACK_TEXT_TOKENS).astype(np.int64)
        images = (draw.random(size) >= text_only_vision).astype(np.int64)
        begun = time.perf_counter()
        parts = [slice(first, first + WINDOW) for first in range(0, size, WINDOW)]
        budgets = (PACK_TEXT_TOKENS, PACK_IMAGES * each)
        packs = sum(len(plan_packs(text_tokens[p], images[p] * each, *budgets, image_tokens=each)) for p in parts)
        rates[f"packs planned, {what}"] = [size / (time.perf_counter() - begun)]
        fills = {"text": text_tokens.sum() / packs / PACK_TEXT_TOKENS, "images": images.sum() / packs / PACK_IMAGES}
        binds = max(fills, key=lambda name: float(fills[name]))
        padded = text_tokens.reshape(-1, 16).sum() / (16 * text_tokens.reshape(-1, 16).max(1).sum())
        means = f"mean {text_tokens.mean():.0f} text tokens, {images.mean():.2f} images"
        text = f"fill by {binds} of packed {what} ({means}; batches of 16, padded, fill {padded:.2f} of their text)"
        lines.append(Line(text, float(fills[binds]), 0.98))
    report(f"pack: {size} samples in windows of {WINDOW}, log-normal lengths of sigma {SIGMA}", lines, rates, unit="samples/s")
    return lines


# ---- the run -------------------------------------------------------------------------------------------------------


def run(arguments: Arguments, work: Path) -> list[Line]:
    """The chosen sections."""
    from pipelines.preprocess import Settings, preprocess

    lines: list[Line] = []
    shards = work / "shards"
    if set(arguments.only) & {"read", "decode", "preprocess"}:
        print(f"rendering {arguments.num_samples} samples into {work}", flush=True)
        annotations, images = write_source(work / "source", arguments.num_samples)
        source: dict[str, Any] = {"annotations": annotations, "images": images, "samples_per_shard": SAMPLES_PER_SHARD}
        with quiet():
            manifest = preprocess(Settings(out=shards, engine="local", **source))
        total = sum(shard.tar.bytes for shard in manifest.shards)
        print(f"{total / 1e6:.0f} MB in {len(manifest.shards)} shards, {total / manifest.num_samples / 1e3:.0f} KB a sample")
    if "read" in arguments.only:
        lines += bench_read(shards, arguments)
    if "decode" in arguments.only:
        lines += bench_decode(shards, arguments)
    if "preprocess" in arguments.only:
        lines += bench_preprocess(annotations, images, work, arguments)
    if "pack" in arguments.only:
        lines += bench_pack(arguments)
    return lines


def describe(arguments: Arguments) -> str:
    """The machine, and which versions are compared. Raises: ValueError where one of them is not installed."""
    versions = {"Python": sys.version.split()[0]}
    for name in dict.fromkeys(("numpy", "torch", "pillow", *(peer for section in arguments.only for peer in PEERS[section]))):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            raise ValueError(f"{name} is not installed: make bench-data makes an environment that has it") from None
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, " + ", ".join(map(" ".join, versions.items()))


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.data", __doc__)
    if arguments.export_energon is not None:
        num_samples = export_energon(arguments.export_energon, arguments.workers)
        print(f"{arguments.export_energon / ENERGON_META}: megatron-energon reads {num_samples} samples as CrudeWebdataset")
        return 0
    print(describe(arguments))
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=arguments.work) as work:
        lines = run(arguments, Path(work))
    missed = [line for line in lines if not line.holds]
    print(f"{len(lines) - len(missed)} of {len(lines)} lines hold", *missed, sep="\n")
    return Line.code(lines)


if __name__ == "__main__":
    run_main(main)
