"""What is read: datasets, their order, and how samples become batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import positive


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which shards are read, and how a sample becomes tokens."""

    datasets: tuple[str, ...] = ()
    """Shard datasets (folders with manifest.json). The tiny recipes make their own when there is none."""
    weights: tuple[float, ...] = ()
    """Share of each dataset in the samples read, in any unit; none: each dataset is read once an epoch."""
    validation_path: str | None = None
    """Held-out shard dataset for the validation loss; None: no validation."""
    features: tuple[str, ...] = ()
    """Features that pipelines.encode made of the images, a folder for each of `path`: no image is read, and the frozen tower
    does not run. None: images are read and encoded in training."""
    validation_features: str | None = None
    """The same for validation_path."""
    features_dtype: Literal["bf16", "fp8_token"] = "bf16"
    """How such features are stored: bf16, or half of that in fp8 (e4m3) with one scale for each token."""
    tokenizer: str = "bytes"
    """Folder of a Hugging Face tokenizer, or `bytes` for the built-in byte-level one."""
    template: Literal["plain", "vicuna", "llama3", "chatml", "tiny"]
    """How a conversation becomes one string: plain (captions only), Vicuna v1, Llama 3, ChatML (Qwen2), or our tiny one."""
    max_text_tokens: int
    """Most text tokens of one sample."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What becomes of a longer sample: its text is cut to max_text_tokens, or it is left out; both are counted."""
    pack_max_text_tokens: int | None = None
    """Text tokens of a pack: several samples share one sequence, each seeing only itself and its own images.
    None: no packing."""
    pack_max_images: int | None = None
    """Images of a pack."""
    shuffle: Literal["auto", "samples", "shards"] = "auto"
    """What is shuffled: all samples; or the shards, and the samples within each group of shuffle_shards of them, so that
    remote data is read a few shards at a time. auto: samples, or shards where a dataset is remote (s3://)."""
    shuffle_shards: int = 16
    """Shards read at the same time when shards are shuffled."""
    cache_dir: str | None = None
    """Where shards of remote datasets are kept while they are read; None: a folder of the user's cache."""
    cache_gib: float = 50.0
    """Most that the cache may hold, per machine; the shards used longest ago go first."""
    decode: Literal["fast", "exact"] = "fast"
    """Resizing by torch on bytes (faster, within 2 of 255 levels), or by Pillow, equal to transformers' to the bit."""
    webdataset_urls: tuple[str, ...] = ()
    """Instead of `path`: tar files of any WebDataset, read as a stream. Not exact: see docs/data.md."""
    num_workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process."""
    max_bad_fraction: float = 0.01
    """Samples that cannot be read in training keep their slot with zero loss; above this share of them (of those since the
    start, counted as at least 1,000) the run stops with exit code 3, and says why in RUN/STOP."""

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str) or isinstance(self.webdataset_urls, str):
            raise ValueError(f"data.datasets is {self.datasets!r}: wanted a list of folders")
        positive(
            data__max_text_tokens=self.max_text_tokens,
            data__shuffle_shards=self.shuffle_shards,
            data__cache_gib=self.cache_gib,
        )
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers is {self.num_workers}: wanted 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}: wanted 0 to 1")
        if self.weights and len(self.weights) != len(self.datasets):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.datasets)} datasets: give one for each"
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"data.weights is {list(self.weights)}: wanted numbers above 0")
        if self.features and len(self.features) != len(self.datasets):
            raise ValueError(
                f"data.features names {len(self.features)} folders for {len(self.datasets)} datasets: give one for each"
            )
        if self.validation_features is not None and self.validation_path is None:
            raise ValueError("data.validation_features is given without --data.validation-path")
        if self.datasets and self.webdataset_urls:
            raise ValueError("data.datasets and data.webdataset_urls are both given: choose one")
        if (self.pack_max_text_tokens is None) != (self.pack_max_images is None):
            raise ValueError(
                "packing has two budgets: give both --data.pack-max-text-tokens and --data.pack-max-images, or neither"
            )
        if self.pack_max_text_tokens is not None and self.pack_max_images is not None:
            positive(data__pack_max_text_tokens=self.pack_max_text_tokens, data__pack_max_images=self.pack_max_images)
            if self.max_text_tokens > self.pack_max_text_tokens:
                raise ValueError(
                    f"data.max_text_tokens ({self.max_text_tokens}) is above data.pack_max_text_tokens "
                    f"({self.pack_max_text_tokens}): a sample must fit into a pack"
                )
            if self.webdataset_urls:
                raise ValueError(
                    "data.webdataset_urls cannot be packed: packs are planned from an index, which only --data.datasets has"
                )

    @property
    def packs(self) -> bool:
        """Whether samples are packed."""
        return self.pack_max_text_tokens is not None
