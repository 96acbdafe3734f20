"""What is read: datasets, their order, and how samples become batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..runtime.limits import Count, CountOrZero, Fraction, Positive, check_limits


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The datasets that are read, and how a sample becomes tokens."""

    datasets: tuple[str, ...] = ()
    """Shard datasets: folders with a manifest.json. The tiny recipes render their own when none is given."""
    weights: tuple[Positive, ...] = ()
    """Share of each dataset in the samples read, in any unit; empty: each dataset is read once per epoch."""
    validation_path: str | None = None
    """Held-out shard dataset for the validation loss; None: no validation."""
    features: tuple[str, ...] = ()
    """Folders of features that pipelines.encode wrote, one for each of `datasets`: images are not read and the frozen tower
    does not run. Empty: images are read and encoded in training."""
    validation_features: str | None = None
    """Folder of the features of validation_path; None: its images are read and encoded."""
    features_dtype: Literal["bf16", "fp8_token"] = "bf16"
    """Storage format of such features. bf16; or fp8 (e4m3), half the size, with one scale per token."""
    tokenizer: str = "bytes"
    """Folder of a Hugging Face tokenizer; `bytes`: the built-in byte-level one."""
    template: Literal["plain", "vicuna", "llama3", "chatml", "tiny"]
    """Chat template that makes one string of a conversation: plain (captions only), Vicuna v1, Llama 3, ChatML (Qwen2), or the
    tiny one of this project."""
    max_text_tokens: Count
    """Maximum number of text tokens in one sample."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """Treatment of a sample above max_text_tokens: its text is truncated, or the sample is dropped; both are counted."""
    pack_max_text_tokens: Count | None = None
    """Maximum number of text tokens in a pack: several samples share one sequence, and each attends only to itself and its own
    images. None: no packing."""
    pack_max_vision_tokens: Count | None = None
    """Maximum number of vision tokens in a pack."""
    shuffle: Literal["auto", "samples", "shards"] = "auto"
    """Unit of shuffling. samples: all samples; shards: the shards, and the samples within each group of shuffle_shards shards,
    so that remote data is read a few shards at a time; auto: samples, or shards where a dataset is remote (s3://)."""
    shuffle_shards: Count = 16
    """Number of shards read at the same time when shards are shuffled."""
    cache_dir: str | None = None
    """Folder that holds shards of remote datasets while they are read; None: a folder in the user's cache."""
    cache_gib: Positive = 50.0
    """Maximum size of that cache on each machine, in GiB; the least recently used shards are removed first."""
    decode: Literal["fast", "exact"] = "fast"
    """Way of resizing images. fast: by torch on bytes, within 2 of 255 levels; exact: by Pillow, equal to transformers' bit for
    bit."""
    webdataset_urls: tuple[str, ...] = ()
    """Tar files of any WebDataset, read as a stream instead of `datasets`. Not exact: see docs/data.md."""
    num_workers: CountOrZero = 2
    """Number of decoding processes per rank; 0: decoding happens in the training process."""
    max_bad_fraction: Fraction = 0.01
    """Maximum share of unreadable samples, of those read since the start (at least 1,000). They keep their slot with zero loss;
    above this share the run stops with exit code 3 and the reason in RUN/STOP."""

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str) or isinstance(self.webdataset_urls, str):
            raise ValueError(f"data.datasets is {self.datasets!r}: wanted a list of folders")
        check_limits(self, "data")
        if self.weights and len(self.weights) != len(self.datasets):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.datasets)} datasets: give one for each"
            )
        if self.features and len(self.features) != len(self.datasets):
            raise ValueError(
                f"data.features names {len(self.features)} folders for {len(self.datasets)} datasets: give one for each"
            )
        if self.validation_features is not None and self.validation_path is None:
            raise ValueError("data.validation_features is given without --data.validation-path")
        if self.datasets and self.webdataset_urls:
            raise ValueError("data.datasets and data.webdataset_urls are both given: choose one")
        if (self.pack_max_text_tokens is None) != (self.pack_max_vision_tokens is None):
            raise ValueError(
                "packing has two budgets: give both --data.pack-max-text-tokens and --data.pack-max-vision-tokens, or neither"
            )
        if self.pack_max_text_tokens is not None and self.pack_max_vision_tokens is not None:
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
