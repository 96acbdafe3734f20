"""How fast is the data room beside webdataset, megatron-energon and Ray Data? All in one run on one machine.

    make bench-data
    make bench-data BENCH_ARGS="--only read pack --scale 0.1"

It makes its own environment with the others in it, and its own data: photo-like JPEGs of about 640x480 pixels and 64 KB, each
with a conversation, as shards of 512 (550 MB at --scale 1). Repetitions of the candidates take turns, after one of each that
is not counted and brings the files into the page cache. Ratios are of medians. Exit code 1 when a line is missed.

- read: samples a second into one process, in order, nothing decoded; ours with and without checksums, webdataset on the same
  tars, megatron-energon on the same tars with its own index.
- decode: one core; ours reads, decodes and resizes to 384x384 as uint8; webdataset reads, and Pillow decodes and resizes
  (bicubic), and torch normalises to fp32. How far ours are from Pillow's pixels is counted in levels of 255.
- preprocess: JSON and images to shards; ours by Ray, ours in one process, and Ray Data's `map_batches` with `write_webdataset`
  and the same checks (and with Pillow's decoding, for comparison). Ray is up already. Ours syncs every shard to the disk and
  hashes it, Ray Data's does neither.
- pack: how full packs of 2,048 text tokens and 46 images are, of the budget that binds, on lengths like LLaVA's.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from himix_megatron.config import VisionConfig
from himix_megatron.data.images import image_file
from himix_megatron.data.loading.packing import plan_packs
from himix_megatron.data.loading.plan import WINDOW
from himix_megatron.data.shards.reader import ShardDataset
from pipelines.cli import parse_settings, run_main
from tools.bench.photos import write_source

NUM_SAMPLES = 8192
SAMPLES_PER_SHARD = 512
DECODED = 1024
"""Samples of the decoding section."""
BATCH = 64
Section = Literal["read", "decode", "preprocess", "pack"]
PEERS: dict[Section, tuple[str, ...]] = {
    "read": ("webdataset", "megatron-energon"),
    "decode": ("webdataset",),
    "preprocess": ("ray", "pyarrow"),
    "pack": (),
}
VISION = VisionConfig(  # SigLIP's input; nothing else of it matters here
    tower="siglip",
    image_size=384,
    patch_size=14,
    hidden_size=1152,
    num_layers=27,
    num_attention_heads=16,
    ffn_hidden_size=4304,
)
PACK_TEXT_TOKENS, PACK_IMAGES = 2048, 46
SIGMA = 0.6
"""Of the logarithm of text lengths."""


@dataclass(frozen=True)
class Arguments:
    """Compare the data room with webdataset, megatron-energon and Ray Data."""

    only: tuple[Section, ...] = tuple(PEERS)
    """Which sections."""
    scale: float = 1.0
    """Of the amount of data: 1 is 8,192 samples, 550 MB. Lines are meant for 1."""
    repetitions: int = 5
    """Counted ones; preprocessing, which takes longest, does half of them, rounded up."""
    workers: int = 2
    """Of preprocessing."""
    work: Path | None = None
    """Folder for the data, 3 GB at --scale 1, emptied at the end; None: one in the system's temporary folder."""

    def __post_init__(self) -> None:
        if not 0.005 <= self.scale <= 10:
            raise ValueError(f"--scale is {self.scale}: wanted 0.005 to 10")
        for name in ("repetitions", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: wanted 1 or more")
        if not self.only:
            raise ValueError(f"--only names no section: wanted some of {', '.join(PEERS)}")

    @property
    def num_samples(self) -> int:
        """Of the data set."""
        return int(NUM_SAMPLES * self.scale)


@dataclass(frozen=True)
class Line:
    """One thing that is promised."""

    text: str
    found: float
    wanted: float
    at_most: bool = False

    @property
    def is_held(self) -> bool:
        """Whether it is kept."""
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted

    def __str__(self) -> str:
        bound = "at most" if self.at_most else "at least"
        return f"{'  ok    ' if self.is_held else '  MISSED'} {self.text}: {self.found:.3g} (wanted {bound} {self.wanted:g})"


Rates = dict[str, list[float]]
Work = Callable[[], Iterator[int]]
"""Makes ready, which is not timed, and returns what works while it is run through: it yields numbers of samples done."""


def in_turns(candidates: dict[str, Work], repetitions: int) -> Rates:
    """Samples a second of each candidate's repetitions."""
    rates: Rates = {name: [] for name in candidates}
    for number in range(repetitions + 1):
        for name, ready in candidates.items():
            work = ready()
            begun = time.perf_counter()
            num_samples = sum(work)
            if number:
                rates[name].append(num_samples / (time.perf_counter() - begun))
    return rates


def times(rates: Rates, ours: str, theirs: str, wanted: float) -> Line:
    """How many times faster one is than another."""
    ratio = statistics.median(rates[ours]) / statistics.median(rates[theirs])
    return Line(f"{ours}, times {theirs}", ratio, wanted)


def show(title: str, lines: list[Line], rates: Rates, also: Sequence[Line] = ()) -> None:
    """Ratios first, then medians with the smallest and largest. `also`: ratios that nothing depends on."""
    print(f"\n{title}, load {os.getloadavg()[0]:.1f}", *lines, sep="\n", flush=True)
    for line in also:
        print(f"         {line.text}: {line.found:.3g}")
    for name, values in rates.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"           {name:<44}{middle:>10,.0f} samples/s  ({low:,.0f} to {high:,.0f})", flush=True)


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
    rates = in_turns(candidates, arguments.repetitions)
    lines = [
        times(rates, "ours", "webdataset", 3),
        times(rates, "ours with checksums", "webdataset", 2.3),
        times(rates, "ours", "megatron-energon", 8),
    ]
    show(f"read: {len(with_checks)} samples, one process, page cache warm, nothing decoded", lines, rates)
    return lines


def energon_reader(shards: Path) -> Work:
    """megatron-energon over the same tars: its own index, no shuffling, no decoding, no workers."""
    from megatron import energon

    from tools.bench.energon import export

    export(shards)

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
    rates = in_turns(candidates, arguments.repetitions)
    largest, mean = level_differences(dataset, min(num_samples, 256))
    lines = [
        times(rates, "ours, uint8", "webdataset + Pillow + fp32", 2.5),
        Line(f"largest difference to Pillow in levels of 255 (mean {mean:.4f})", largest, 2, at_most=True),
    ]
    show(f"decode: {num_samples} images to 384x384, one core, batches of {BATCH}", lines, rates)
    return lines


def our_pixels(dataset: ShardDataset, num_samples: int) -> Iterator[image_file.Pixels]:
    """Batches as the loader makes them, checksums included."""
    for first in range(0, num_samples - BATCH + 1, BATCH):
        pixels = image_file.blank_pixels(BATCH, VISION)
        for place, i in enumerate(range(first, first + BATCH)):
            _, data = dataset.sample(i)
            image_file.decode(data[0], VISION, "fast", out=pixels[place])
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
        fast, exact = (image_file.decode(data, VISION, how).astype(np.int16) for how in ("fast", "exact"))
        difference = np.abs(fast - exact)
        largest, total = max(largest, int(difference.max())), total + float(difference.mean())
    return largest, total / num_samples


# ---- preprocess ----------------------------------------------------------------------------------------------------


def bench_preprocess(annotations: Path, images: Path, work: Path, arguments: Arguments) -> list[Line]:
    """JSON and images to shards."""
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
    with ray_data_baseline.ray_with_room(workers):
        rates = in_turns(candidates, (arguments.repetitions + 1) // 2)
    lines = [
        times(rates, "ours, header check", "Ray Data, header check", 2.5),
        times(rates, "ours, full decode", "Ray Data, full decode", 1.4),
        times(rates, "ours, full decode", "ours in one process, full decode", 1.7),
    ]
    also = [
        times(rates, "ours, header check", "Ray Data, header check by Pillow", 0),
        times(rates, "ours, full decode", "Ray Data, full decode by Pillow", 0),
    ]
    show(f"preprocess: {arguments.num_samples} rows, {workers} Ray workers, Ray started", lines, rates, also)
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
    lines, rates = [], {}
    for what, mean, text_only_vision in (("captions", 44, 0.0), ("chats", 314, 40_688 / 665_298)):
        normal = draw.normal(np.log(mean) - SIGMA**2 / 2, SIGMA, size)
        text_tokens = np.clip(np.exp(normal).round(), 4, PACK_TEXT_TOKENS).astype(np.int64)
        images = (draw.random(size) >= text_only_vision).astype(np.int64)
        begun = time.perf_counter()
        parts = [slice(first, first + WINDOW) for first in range(0, size, WINDOW)]
        packs = sum(len(plan_packs(text_tokens[p], images[p], PACK_TEXT_TOKENS, PACK_IMAGES)) for p in parts)
        rates[f"packs planned, {what}"] = [size / (time.perf_counter() - begun)]
        fills = {"text": text_tokens.sum() / packs / PACK_TEXT_TOKENS, "images": images.sum() / packs / PACK_IMAGES}
        binds = max(fills, key=lambda name: float(fills[name]))
        padded = text_tokens.reshape(-1, 16).sum() / (16 * text_tokens.reshape(-1, 16).max(1).sum())
        means = f"mean {text_tokens.mean():.0f} text tokens, {images.mean():.2f} images"
        text = f"fill by {binds} of packed {what} ({means}; batches of 16, padded, fill {padded:.2f} of their text)"
        lines.append(Line(text, float(fills[binds]), 0.98))
    show(f"pack: {size} samples in windows of {WINDOW}, log-normal lengths of sigma {SIGMA}", lines, rates)
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
    print(describe(arguments))
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=arguments.work) as work:
        lines = run(arguments, Path(work))
    missed = [line for line in lines if not line.is_held]
    print(f"\n{len(lines) - len(missed)} of {len(lines)} lines are held", *missed, sep="\n")
    return 1 if missed else 0


if __name__ == "__main__":
    run_main(main)
