"""Greedy answers about images, at any layout of ranks.

Flows in: prompts and their images, the same on every rank of a replica; out: token ids, the same on every rank of it.
Each new token recomputes the whole text, which is short in HiMix: the images were encoded once and are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .adapter import params_dtype
from .checkpoint import Checkpoints
from .config import Config
from .data.batch import share_of
from .kernels import Kernels
from .model.himix import build_stage
from .model.vision import ReplicaEncoder, build_tower
from .parallel import Topology
from .step import StageInput, run_logits


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, tokenized up to where its answer starts."""

    ids: npt.NDArray[np.int64]
    """int64[T]."""
    images: tuple[npt.NDArray[np.uint8], ...]
    """Each uint8[3, height, width], as `image.decode` gives them."""


class Answerer:
    """A model ready to answer: its weights loaded, its tower frozen. Every rank of a replica makes the same calls."""

    def __init__(self, config: Config, kernels: Kernels, topology: Topology):
        """Fresh weights; `load` replaces them. `train.parts` must leave the tower frozen."""
        assert "tower" not in config.train.parts
        self.config, self.topology = config, topology
        dtype = params_dtype(config)
        self.tower = build_tower(config.vision, seed=config.train.seed, dtype=dtype).to(topology.device).eval()
        self.stages: list[Any] = [stage.eval() for stage in build_stage(config, kernels, topology, self.tower, trains=False)]
        self.encoder = ReplicaEncoder(self.tower, topology.replica, trainable=False, dtype=dtype)

    def load(self, checkpoint: Any) -> None:
        """Take a checkpoint's weights. Raises: ValueError for another architecture."""
        Checkpoints(self.config, self.stages, None, self.tower).load_weights(checkpoint)

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], stops: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        """The most likely continuation of each prompt, up to a stop token (not included) or `max_new_tokens`."""
        images_per_sample, features, blank = self._encode(prompts)
        texts = [list(map(int, prompt.ids)) for prompt in prompts]
        done = [False] * len(texts)
        for _ in range(max_new_tokens):
            for row, token in enumerate(self._next_tokens(texts, features, blank, images_per_sample)):
                done[row] |= token in stops
                if not done[row]:
                    texts[row].append(token)
            if all(done):
                break
        return [text[len(prompt.ids) :] for text, prompt in zip(texts, prompts, strict=True)]

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[list[int], Tensor, Tensor]:
        """Features of all the prompts' images, encoded once: this rank encodes its share, and all get all."""
        zero_image = self.config.model.text_only == "zero_image"
        images_per_sample = [len(p.images) or int(zero_image) for p in prompts]
        size = self.config.vision.image_size
        nothing = np.zeros((3, size, size), np.uint8)
        images = [image for p in prompts for image in (p.images or ((nothing,) if zero_image else ()))]
        blank = torch.tensor(
            [b for p in prompts for b in ([False] * len(p.images) or [True] * int(zero_image))], dtype=torch.bool
        )
        share = [images[i] for i in share_of(len(images), self.topology.replica_rank, self.topology.replica_size)]
        pixels = torch.from_numpy(np.stack(share)) if share else torch.empty(0, 3, size, size, dtype=torch.uint8)
        device = self.topology.device
        return images_per_sample, self.encoder.encode(pixels.to(device), blank.to(device), len(images)), blank.to(device)

    def _next_tokens(self, texts: list[list[int]], features: Tensor, blank: Tensor, images_per_sample: list[int]) -> list[int]:
        """The most likely next token of each text."""
        parallel = self.config.parallel
        # The interleaved schedule wants a multiple of the stages; what is added repeats the first text.
        num_parts = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
        rows = list(range(len(texts))) + [0] * (-len(texts) % num_parts)
        length = max(map(len, texts))
        length += -length % (parallel.tensor if parallel.sequence else 1)
        starts = np.cumsum([0, *images_per_sample])
        inputs, last = [], []
        for part in np.array_split(np.array(rows), num_parts):
            own = [int(row) for row in part]
            ids = torch.zeros(len(own), length, dtype=torch.long)
            for i, row in enumerate(own):
                ids[i, : len(texts[row])] = torch.tensor(texts[row])
            images = [k for row in own for k in range(starts[row], starts[row + 1])]
            counts = tuple(images_per_sample[row] for row in own)
            inputs.append(StageInput(ids.to(self.topology.device), features[images], blank[images], counts))
            last.append(torch.tensor([len(texts[row]) - 1 for row in own], device=self.topology.device))
        best = run_logits(self.stages, inputs, lambda number, logits: self._best(logits, last[number]))
        tokens = (
            torch.cat(best) if self.topology.is_last_stage else torch.zeros(len(rows), dtype=torch.long, device=features.device)
        )
        last_stage = torch.distributed.get_process_group_ranks(self.topology.pipeline)[-1]
        torch.distributed.broadcast(tokens, src=last_stage, group=self.topology.pipeline)
        return [int(token) for token in tokens[: len(texts)]]

    def _best(self, logits_BSW: Tensor, last_B: Tensor) -> Tensor:
        """int64[B], the most likely token after each row's last, over the whole vocabulary."""
        own = logits_BSW[torch.arange(len(last_B), device=last_B.device), last_B].float().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.topology.tensor_size)]
        torch.distributed.all_gather(parts, own, group=self.topology.tensor)
        return torch.cat(parts, dim=-1)[:, : self.config.model.vocab_size].argmax(-1)
