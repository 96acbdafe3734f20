"""Step number in, `StepBatch` out: the plan made real by reading, tokenizing and decoding, in worker processes or here.

Every rank computes the same plan from (manifest, seed, step): samples [s*G, (s+1)*G) of the order are global batch s, and
micro-batch j of data rank r takes the (j*D + r)-th run of m samples in it. So resuming is asking for a later step, and any
number of data ranks that divides the batch reads the same global batches.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from himix_megatron.config import DataConfig, TrainConfig, VisionConfig
from himix_megatron.data import conversation, image
from himix_megatron.data.batch import StepBatch, collate, share_of, without_loss
from himix_megatron.data.conversation import EncodedText
from himix_megatron.data.order import Order
from himix_megatron.data.schema import BadSampleError
from himix_megatron.data.shards import ShardDataset
from himix_megatron.data.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

# A text that cannot be read leaves one token in its slot, with no loss.
UNREADABLE = EncodedText(np.zeros(1, np.int64), np.zeros(1, np.bool_), was_cut=False)


class StepDataset(Dataset[StepBatch]):
    """The steps of a run, as one rank sees them. `dataset[step]` is a pure function of the step and the arguments here.

    `data_rank` of `data_size` says which samples, `replica_rank` of `replica_size` (the TP x PP ranks that share a model)
    which of their images this rank decodes. Texts are padded to a multiple of `pad_multiple` tokens.
    Raises: ValueError when the global batch does not divide, or the tokenizer does not fit the template.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        *,
        data_config: DataConfig,
        vision_config: VisionConfig,
        train_config: TrainConfig,
        text_only: Literal["zero_image", "none"],
        data_rank: int = 0,
        data_size: int = 1,
        replica_rank: int = 0,
        replica_size: int = 1,
        pad_multiple: int = 1,
    ) -> None:
        assert train_config.global_batch_samples is not None
        if train_config.global_batch_samples % (data_size * train_config.micro_batch_samples):
            raise ValueError(
                f"train.global_batch_samples ({train_config.global_batch_samples}) is not a multiple of {data_size} "
                f"data-parallel ranks x train.micro_batch_samples ({train_config.micro_batch_samples})"
            )
        self.dataset, self.order = dataset, Order(len(dataset), train_config.seed, dataset.fingerprint)
        self.data_config, self.vision_config, self.train_config = data_config, vision_config, train_config
        self.tokenizer = load_tokenizer(data_config.tokenizer)
        conversation.check_tokenizer(self.tokenizer, data_config.template)
        self.images_without = 1 if text_only == "zero_image" else 0
        self.data_rank, self.data_size = data_rank, data_size
        self.replica_rank, self.replica_size = replica_rank, replica_size
        self.pad_multiple = pad_multiple
        self._text(0, dataset.key(0))  # a template that does not suit the data is known now, not inside a worker

    def samples_of(self, step: int) -> list[int]:
        """The sample numbers of this rank's micro-batches, one after the other."""
        size, each = self.train_config.global_batch_samples, self.train_config.micro_batch_samples
        assert size is not None
        starts = range(step * size + self.data_rank * each, (step + 1) * size, self.data_size * each)
        return [self.order[position] for start in starts for position in range(start, start + each)]

    def __getitem__(self, step: int) -> StepBatch:
        """Read one step. Raises: OSError when the machine fails; ValueError for a text the template refuses."""
        samples = self.samples_of(step)
        keys = [self.dataset.key(i) for i in samples]
        num_images = [self.dataset.num_images(i) or self.images_without for i in samples]
        texts = [self._text(i, key) for i, key in zip(samples, keys, strict=True)]
        bad_texts = {slot for slot, text in enumerate(texts) if text is None}
        read = [text or UNREADABLE for text in texts]

        places = [(slot, k) for slot, count in enumerate(num_images) for k in range(count)]
        blank = torch.tensor([slot in bad_texts or not self.dataset.num_images(samples[slot]) for slot, _ in places]).bool()
        share = share_of(len(places), self.replica_rank, self.replica_size)
        pixels, bad_images = self._pixels(
            [(samples[places[n][0]], places[n][1]) for n in share], blank[share.start : share.stop]
        )
        for n in bad_images:
            blank[share.start + n] = True
        bad = sorted(bad_texts | {places[share.start + n][0] for n in bad_images})

        longest = max(len(text.ids) for text in read)
        padded, each = -(-longest // self.pad_multiple) * self.pad_multiple, self.train_config.micro_batch_samples
        parts = [slice(start, start + each) for start in range(0, len(samples), each)]
        batch = StepBatch(
            step=step,
            micro_batches=tuple(collate(read[part], num_images[part], keys[part], padded) for part in parts),
            blank=blank,
            pixels=pixels,
            bad_keys=tuple(keys[slot] for slot in bad),
            bad_samples=tuple(bad),
            num_cut=sum(text.was_cut for text in read),
        )
        return without_loss(batch, bad) if self.replica_size == 1 else batch

    def _text(self, i: int, key: str) -> EncodedText | None:
        """A sample's text; None where its bytes are damaged, or the template has no place for its turns."""
        config = self.data_config
        try:
            sample = self.dataset.text(i)
        except BadSampleError as error:
            log.warning("%s is left out of the loss: %s", key, error.detail)
            return None
        try:
            return conversation.encode(sample, self.tokenizer, config.template, config.max_text_tokens)
        except ValueError as error:
            log.warning("%s is left out of the loss: %s", key, error)
            return None

    def _pixels(self, images: list[tuple[int, int]], blank: Tensor) -> tuple[Tensor, list[int]]:
        """Decode images (sample, image) that are not blank. Returns: uint8[len, 3, H, W], and which of them are damaged."""
        size = self.vision_config.image_size
        pixels, damaged = torch.zeros(len(images), 3, size, size, dtype=torch.uint8), []
        for n, (i, k) in enumerate(images):
            if blank[n]:
                continue
            try:
                pixels[n] = torch.from_numpy(image.decode(self.dataset.image_bytes(i, k), self.vision_config))
            except BadSampleError as error:
                log.warning("%s is left out of the loss: image %d, %s", self.dataset.key(i), k, error.detail)
                damaged.append(n)
        return pixels, damaged


def step_loader(dataset: StepDataset, first_step: int, last_step: int, num_workers: int) -> Iterator[StepBatch]:
    """Steps first_step <= step < last_step in order, read ahead by worker processes (0: read here, when asked for)."""
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(first_step, last_step),
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else each loader would draw a number from the training's random state
            worker_init_fn=_die_with_parent if num_workers else None,
            multiprocessing_context=_fork_server() if num_workers else None,
        )
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _fork_server() -> multiprocessing.context.ForkServerContext:
    """Where workers are forked from: a clean process. Forking this one would copy the locks that gloo's, NCCL's and the
    autograd threads may hold at that moment, and an initialised CUDA.

    The server imports torch and the program once, so that each worker starts in a fraction of a second.
    """
    context = multiprocessing.get_context("forkserver")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    context.set_forkserver_preload([__name__] + ([spec.name] if spec else []))
    return context


def _die_with_parent(worker: int) -> None:
    """End this worker when the training process ends, however it ends. torch's own watch looks at the parent process id,
    which here is the fork server's, and that lives as long as its children do."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name=f"die-with-parent-{worker}", daemon=True).start()
