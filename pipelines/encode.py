"""A shard dataset -> the features of its images, by the frozen tower, once for all runs that train on them.

    python -m pipelines.encode RECIPE --data DIR --out DIR [--section.field value ...]
    python -m pipelines.pretrain RECIPE --data.datasets DIR --data.features OUT [--section.field value ...]

Recipe and flags are those of the training (`python -m pipelines.pretrain RECIPE --help` lists them), so that tower,
preprocessing and precision are the same: the tower comes from --checkpoint.init-from where that is given, else from
--vision.path. --data.features-dtype fp8_token halves the size, at an error that is printed. Training refuses
features of another tower, preprocessing, dtype or dataset.

Each GPU (each core, where there is none) is a Ray actor that holds the tower and makes one feature file at a time. Run the
same command again after a crash: files whose receipts verify are kept, the rest is made.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from himix_megatron.config import Config, Count, ParallelConfig
from himix_megatron.costs.memory import IMAGES_PER_FORWARD
from himix_megatron.data.ingest.shard_writer import load_receipt, write_record
from himix_megatron.data.shards import shard_format
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.data.shards.storage import LocalFolder
from himix_megatron.runtime.durable_files import file_digest
from himix_megatron.runtime.process import bulk_import
from pipelines.cli import parse, parse_settings, run_main, split_recipe_flags
from pipelines.launchers.task_engine import own_errors, ray_started
from pipelines.preprocess import Progress, attempt_in

if TYPE_CHECKING:
    from torch import Tensor

    from himix_megatron.data.ingest.feature_writer import FeatureJob
    from himix_megatron.data.loading.feature_cache import FeatureManifest, FeatureReceipt

PROGRAM = "python -m pipelines.encode"
PARTS = ("features", "receipts", "towers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to read, where to write, and with how many hands."""

    data: str | None = None
    """Shard dataset to encode; None: the recipe's data.datasets, if it is a single one."""
    out: Path
    """Folder of features to write."""
    engine: Literal["ray", "local"] = "ray"
    """Where images are encoded. ray: on Ray actors; local: in this process, without Ray."""
    num_workers: Count | None = None
    """Number of actors; None: one per GPU, or per core where there is none (of the cluster, with RAY_ADDRESS)."""
    decode_threads: Count = 4
    """Number of threads per actor that decode images."""


def encode(config: Config, settings: Settings) -> FeatureManifest:
    """Make the features, or finish them, and return their manifest (written last).

    Raises: ValueError for a missing dataset or tower, or an output folder that holds other features or is being written.
    """
    from himix_megatron.data.ingest.feature_writer import FeatureJob
    from himix_megatron.data.loading import feature_cache

    dataset = ShardDataset(_data(config, settings))
    with attempt_in(str(settings.out), PARTS) as (folder, attempt):
        if not isinstance(folder, LocalFolder):
            raise ValueError(f"--out {settings.out}: features are written to a folder, not to an object store")
        tower_file = _store_tower(config, folder.path)
        key = feature_cache.feature_key(config, dataset, tower_file.stem)
        _refuse_other_features(folder, key)
        shape = (config.vision.max_tokens_per_image if config.vision.has_fixed_size else None, config.vision.feature_width)
        first = FeatureJob(folder, attempt, shard_format.hash_of(key), config.data.features_dtype, shape, None)
        jobs = [first, *(replace(first, shard=shard) for shard in range(len(dataset.manifest.shards)))]
        worker = functools.partial(Encoder, config, str(dataset.location), tower_file, settings.decode_threads)
        made = _with_progress(
            _with_ray(worker, jobs, settings) if settings.engine == "ray" else map(worker().make, jobs), dataset
        )
        receipts = {receipt.name: receipt for receipt, _ in made}
        shards = tuple(receipts[shard.name] for shard in dataset.manifest.shards)
        squares = sum(receipt.squared for receipt in shards)
        manifest = feature_cache.FeatureManifest(
            features_version=receipts[feature_cache.BLANK].features_version,
            key=key,
            tokens_per_image=shape[0],
            width=shape[1],
            num_images=sum(receipt.num_images for receipt in shards),
            relative_error=math.sqrt(sum(receipt.squared_error for receipt in shards) / squares) if squares else 0.0,
            blank=receipts[feature_cache.BLANK],
            shards=shards,
        )
        write_record(folder, attempt, shard_format.MANIFEST, manifest)
    return manifest


class Encoder:
    """A tower at work: makes one feature file a call. As a Ray actor it has its GPU to itself."""

    def __init__(self, config: Config, data: str, tower_file: Path, decode_threads: int) -> None:
        import torch
        from safetensors.torch import load_file

        from himix_megatron.data.loading.vision_reader import PixelReader
        from himix_megatron.model.towers import build_tower

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        tower = build_tower(config.vision, seed=config.train.seed, dtype=dtype)
        if file_digest(tower_file).sha256 != tower_file.stem:
            raise ValueError(f"{tower_file} is damaged: its content does not have the hash that is its name")
        tower.load_state_dict(load_file(tower_file), strict=True)
        self.tower = tower.to(self.device).eval().requires_grad_(False)
        self.dataset, self.reader = ShardDataset(data), PixelReader(config.vision, config.data.decode)
        self.pool = ThreadPoolExecutor(decode_threads)

    def make(self, job: FeatureJob) -> tuple[FeatureReceipt, bool]:
        """See that one feature file exists."""
        from himix_megatron.data.ingest.feature_writer import make_features

        max_tokens = IMAGES_PER_FORWARD * self.reader.vision.max_tokens_per_image
        return make_features(job, self.dataset, self._features, self.reader, max_tokens=max_tokens, pool=self.pool)

    def _features(self, pixels: Tensor, blank: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        import torch

        with torch.no_grad():
            return self.tower.features(pixels.to(self.device), blank.to(self.device), sizes).cpu()


def _with_ray(
    worker: functools.partial[Encoder], jobs: Sequence[FeatureJob], settings: Settings
) -> Iterator[tuple[FeatureReceipt, bool]]:
    """An actor on each GPU, or core; one that dies is started again, and its file made anew."""
    with ray_started(settings.num_workers) as cores:
        import ray
        from ray.util import ActorPool

        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = int(resources.get("GPU", 0))
        room = gpus or int(resources.get("CPU", 1))
        if settings.num_workers is not None and settings.num_workers > room:
            # More would wait for room for ever.
            raise ValueError(f"--num-workers is {settings.num_workers}, but Ray has {room} {'GPUs' if gpus else 'cores'}")
        number = min(settings.num_workers or gpus or cores, len(jobs))
        options: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        make = ray.remote(Encoder).options(**options, max_restarts=3, max_task_retries=3)
        pool = ActorPool([make.remote(*worker.args) for _ in range(number)])
        with own_errors():
            yield from pool.map_unordered(lambda actor, job: actor.make.remote(job), jobs)


def _data(config: Config, settings: Settings) -> str:
    """The dataset's place. Raises: ValueError where it is not said, or several are."""
    paths = (settings.data,) if settings.data is not None else config.data.datasets
    if len(paths) != 1:
        raise ValueError(f"the recipe reads {len(paths)} datasets: name the one to encode with --data DIR")
    return paths[0]


def _store_tower(config: Config, folder: Path) -> Path:
    """Put the tower's weights into the cache, under their hash. Returns: the file."""
    with bulk_import():
        from himix_megatron.distributed import cpu_backend

        cpu_backend.activate_if_needed()  # before megatron-core
        from himix_megatron.checkpoint.checkpointer import Checkpoints
        from himix_megatron.checkpoint.frozen_tower import store_tower
        from himix_megatron.checkpoint.manifest import find_checkpoint
        from himix_megatron.distributed.megatron_config import params_dtype
        from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
        from himix_megatron.model.towers import build_tower

    tower = build_tower(config.vision, seed=config.train.seed, dtype=params_dtype(config))
    if config.checkpoint.init_from is not None:
        checkpoint = find_checkpoint(config.checkpoint.init_from)
        init_distributed(ParallelConfig(), seed=config.train.seed)
        Checkpoints(config, [], None, tower).load_tower(checkpoint)
        shutdown_distributed()
    return folder / "towers" / store_tower(folder, tower.state_dict())


def _refuse_other_features(folder: LocalFolder, key: dict[str, Any]) -> None:
    """Raises: ValueError when the folder has features of another key: they would be overwritten."""
    from himix_megatron.data.loading.feature_cache import FeatureReceipt

    for name in folder.receipts():
        receipt = load_receipt(folder, FeatureReceipt, name)
        if receipt is not None and receipt.key_hash != shard_format.hash_of(key):
            raise ValueError(
                f"--out {folder} holds features of another dataset, tower, preprocessing or dtype: choose another folder, or "
                "delete this one"
            )


def _with_progress(made: Iterator[tuple[FeatureReceipt, bool]], dataset: ShardDataset) -> Iterator[tuple[FeatureReceipt, bool]]:
    """The same; each file is shown on stderr."""
    progress = Progress("encode", "files", 1 + len(dataset.manifest.shards), 1 + dataset.manifest.num_images, "image")
    for receipt, was_written in made:
        yield receipt, was_written
        progress.show(receipt.num_images, not was_written, len(receipt.damaged))


def main() -> None:
    """The command line."""
    recipe, own = split_recipe_flags(sys.argv[1:])
    settings = parse_settings(Settings, own, f"{PROGRAM} RECIPE", __doc__)
    config = parse(recipe, PROGRAM)
    manifest = encode(config, settings)
    damaged = sum(len(receipt.damaged) for receipt in manifest.shards)
    size = sum(receipt.file.bytes for receipt in manifest.shards)
    print(
        f"{settings.out}: {manifest.num_images} images, {size / 2**30:.2f} GiB of {manifest.dtype} features, relative error "
        f"{manifest.relative_error:.2e}{f'; {damaged} images could not be decoded' if damaged else ''}"
    )


if __name__ == "__main__":
    run_main(main)
