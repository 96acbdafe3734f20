"""Answers about images, at any layout of ranks: greedy or drawn, many prompts at once.

Flows in: prompts and their images, the same on every rank of a replica; out: token ids, the same on every rank of it.
The images go through the tower, and through each layer's vision projections, once; after the prompts each new token runs
alone against what the layers keep (`kv_cache.py`). The pipeline's stages keep theirs, and new tokens go through its
forward-only schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checkpoint.checkpointer import Checkpoints
from ..config import Config
from ..data.loading.image_table import ImageTable, blank_pixels, image_share, in_sequence, rows_in_text
from ..distributed.fused_kernels import Kernels
from ..distributed.megatron_config import params_dtype
from ..distributed.topology import Topology
from ..model.attention.kv_cache import KVCache
from ..model.himix_model import build_model_chunks, unwrap_model
from ..model.schedule import run_logits
from ..model.stage_input import StageInput
from ..model.towers import Tower, build_tower
from ..model.vision_encoder import ShardedVisionEncoder, feature_ranks
from ..model.vision_input import reduced
from .sampling import Sampling, choose

TokenCallback = Callable[[int, list[int]], bool]
"""Called on every rank after each new token with the prompt's number and its answer's ids so far; True ends that answer."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, tokenized up to where its answer starts."""

    ids: npt.NDArray[np.int64]
    """int64[T]."""
    images: tuple[npt.NDArray[np.uint8], ...]
    """Each uint8[3, height, width], as `images.decode.decode` gives them."""
    image_places: tuple[int, ...] = ()
    """Tokens before each image. Another number than of images: all stand before the text."""

    @property
    def places(self) -> tuple[int, ...]:
        """Tokens before each image."""
        return self.image_places if len(self.image_places) == len(self.images) else (0,) * len(self.images)


@dataclass(slots=True)
class _Part:
    """Texts that go through the pipeline together, as one micro-batch."""

    rows: list[int]
    """Their numbers."""
    given: StageInput
    """The next pass."""
    last: Tensor
    """int64[B]: which of its tokens has the logits of each text's next one; with a cache there is only one."""


class Answerer:
    """A model ready to answer: its weights loaded, its tower frozen. Every rank of a replica makes the same calls."""

    def __init__(self, config: Config, kernels: Kernels, topology: Topology, tower: Tower | None = None):
        """Fresh weights; `load` or `share` replaces them. `train.trainable_parts` must leave the tower frozen.

        Args: tower: one to use as it is; None: fresh too.
        """
        assert "tower" not in config.train.trainable_parts
        # One token cannot be split over the tensor ranks, with the same outcome; and it is too few rows for FP8.
        self.config = config = replace(
            config, parallel=replace(config.parallel, sequence=False), train=replace(config.train, fp8="none")
        )
        self.topology = topology
        dtype = params_dtype(config)
        if tower is None:
            tower = build_tower(config.vision, seed=config.train.seed, dtype=dtype).eval().requires_grad_(False)
        self.tower = tower.to(topology.device)
        self.model_chunks: list[Any] = [
            model_chunk.eval() for model_chunk in build_model_chunks(config, kernels, topology, self.tower, trains=False)
        ]
        self.encoder = ShardedVisionEncoder(
            self.tower, topology.replica, trainable=False, dtype=dtype, receivers=feature_ranks(config)
        )

    def load(self, checkpoint: Any) -> None:
        """Take a checkpoint's weights. Raises: ValueError for another architecture."""
        Checkpoints(self.config, self.model_chunks, None, self.tower).load_weights(checkpoint)

    def share(self, model_chunks: Sequence[Any]) -> None:
        """Answer with the weights of a model in training, of the same layout: they are not copied."""
        for own, training in zip(self.model_chunks, model_chunks, strict=True):
            weights = dict(unwrap_model(training).named_parameters())
            for name, parameter in unwrap_model(own).named_parameters():
                parameter.data = weights[name].data

    @torch.no_grad()
    def answer(
        self,
        prompts: Sequence[Prompt],
        stops: Collection[int],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        watch: TokenCallback | None = None,
        cached: bool = True,
    ) -> list[list[int]]:
        """The continuation of each prompt, up to a stop token (not included) or `max_new_tokens`.

        Args:
            sampling: None: the most likely token.
            cached: False runs the whole text again for every token: slow, and the same; the reference of the tests.
        """
        sampling = sampling or Sampling()
        # The interleaved schedule wants a multiple of the stages: the first prompt stands in for what is missing.
        num_parts = self.config.parallel.pipeline if self.config.parallel.virtual_pipeline > 1 else 1
        prompts, num_asked = [*prompts, *[prompts[0]] * (-len(prompts) % num_parts)], len(prompts)
        texts = [list(map(int, prompt.ids)) for prompt in prompts]
        draws = [sampling.stream(row) for row in range(len(prompts))]
        going = set(range(num_asked))
        parts = self._parts(prompts, num_parts, max_new_tokens if cached else None)
        for _ in range(max_new_tokens):
            for row, token in self._next_tokens(parts, texts, sampling, draws):
                if row not in going:
                    continue
                if token in stops:
                    going.remove(row)
                    continue
                texts[row].append(token)
                if watch is not None and watch(row, texts[row][len(prompts[row].ids) :]):
                    going.remove(row)
            if not going:
                break
            self._prepare(parts, texts, going)
        return [text[len(prompt.ids) :] for text, prompt in zip(texts, prompts, strict=True)][:num_asked]

    def _parts(self, prompts: Sequence[Prompt], num_parts: int, room: int | None) -> list[_Part]:
        """The prompts in equal parts, ready for the first pass; with `room` for new tokens in caches, unless it is None."""
        tables, features, blank = self._encode(prompts)
        of_prompt = torch.split(features, [sum(table.tokens) if len(features) else 0 for table in tables])
        blanks = torch.split(blank, [len(table) for table in tables])
        all_rows = [rows.tolist() for rows in np.array_split(np.arange(len(prompts)), num_parts)]
        joined = [ImageTable.joined(tables[row] for row in rows) for rows in all_rows]
        laid_out = self._laid_out([[prompts[row].ids.tolist() for row in rows] for rows in all_rows], joined)
        parts = []
        for rows, images, (ids, vision_rows, lengths) in zip(all_rows, joined, laid_out, strict=True):
            own, blank = torch.cat([of_prompt[row] for row in rows]), torch.cat([blanks[row] for row in rows])
            given, last = StageInput(ids, own, blank, images, vision_rows=vision_rows), lengths - 1
            if room is not None:
                cache = KVCache(reduced(images, self.config), lengths, ids.shape[1], room, self.config.injection)
                given, last = replace(given, cache=cache), torch.zeros_like(last)
            parts.append(_Part(rows, given, last))
        return parts

    def _prepare(self, parts: list[_Part], texts: list[list[int]], going: Collection[int]) -> None:
        """Make the next pass: the new tokens, or without a cache the whole texts."""
        for part in parts:
            if (cache := part.given.cache) is None:
                continue
            cache.advance()
            kept = [i for i, row in enumerate(part.rows) if row in going]
            # Moving what is kept costs as much as some tokens do. Parts of one schedule must stay equally large.
            if len(parts) == 1 and 2 * len(kept) <= len(part.rows):
                part.rows, part.last = [part.rows[i] for i in kept], part.last[: len(kept)]
                cache.select(kept)
            ids = torch.tensor([texts[row][-1:] for row in part.rows], device=self.topology.device)
            part.given = replace(part.given, text_ids=ids, vision_rows=None)
        if parts[0].given.cache is None:
            tables = [part.given.image_table for part in parts]
            laid_out = self._laid_out([[texts[row] for row in part.rows] for part in parts], tables)
            for part, (ids, vision_rows, lengths) in zip(parts, laid_out, strict=True):
                part.given, part.last = replace(part.given, text_ids=ids, vision_rows=vision_rows), lengths - 1

    def _laid_out(
        self, texts: Sequence[Sequence[list[int]]], tables: Sequence[ImageTable]
    ) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """The texts of each part of a schedule, all padded to one length, with room for the vision that stands in them.

        Returns: of each part the ids int64[B, length], `StageInput.vision_rows`, and the tokens of each text, int64[B].
        """
        images, device = [in_sequence(table, self.config) for table in tables], self.topology.device
        lengths = [
            [len(text) + more for text, more in zip(own, table.sample_tokens(), strict=True)]
            for own, table in zip(texts, images, strict=True)
        ]
        longest, found = max(map(max, lengths)), []
        for own, table, of_rows in zip(texts, images, lengths, strict=True):
            text_rows, vision_rows = map(torch.from_numpy, rows_in_text(list(map(len, own)), table, longest))
            ids = torch.zeros(len(own), longest, dtype=torch.long)
            ids.view(-1)[text_rows] = torch.tensor([token for text in own for token in text])
            in_text = vision_rows.to(device) if self.config.injection.in_sequence else None
            found.append((ids.to(device), in_text, torch.tensor(of_rows, device=device)))
        return found

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[list[ImageTable], Tensor, Tensor]:
        """Each prompt's images, their features and which are blank; encoded once: this rank encodes its share."""
        vision, without, topology = self.config.vision, self.config.model.images_without, self.topology
        tables = []
        for prompt in prompts:
            sizes = [(image.shape[2], image.shape[1]) for image in prompt.images]
            tables.append(ImageTable.of(vision, [sizes or [vision.blank_size] * without], [prompt.places or (0,) * without]))
        table = ImageTable.joined(tables)
        images = [image for p in prompts for image in (p.images or (None,) * without)]
        blank = torch.tensor([image is None for image in images], dtype=torch.bool)
        share = image_share(table, vision, topology.replica_rank, topology.replica_size)
        pixels = blank_pixels(own := table.images_of(share), vision)
        for k, place in zip(share, own.split(pixels), strict=True):
            if (image := images[k]) is not None:
                place.copy_(torch.from_numpy(image))
        device = topology.device
        return tables, self.encoder.encode(pixels, blank, table), blank.to(device)

    def _next_tokens(
        self, parts: list[_Part], texts: list[list[int]], sampling: Sampling, draws: list[np.random.Generator]
    ) -> Iterator[tuple[int, int]]:
        """Run a pass. Returns: (row, next token) of every text that is in it."""

        def take(number: int, logits_BSW: Tensor) -> Tensor:
            part = parts[number]
            own = logits_BSW[torch.arange(len(part.last), device=part.last.device), part.last]
            drawn = torch.tensor([draws[row].random() for row in part.rows], dtype=torch.float64)
            return self._choose(own.float().contiguous(), sampling, drawn.to(own.device))

        found = run_logits(self.model_chunks, [part.given for part in parts], take)
        rows = [row for part in parts for row in part.rows]
        device = self.topology.device
        tokens = torch.cat(found) if self.topology.is_last_stage else torch.zeros(len(rows), dtype=torch.long, device=device)
        last_stage = torch.distributed.get_process_group_ranks(self.topology.pipeline)[-1]
        torch.distributed.broadcast(tokens, src=last_stage, group=self.topology.pipeline)
        return zip(rows, tokens.tolist(), strict=True)

    def _choose(self, own_BW: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
        """int64[B], from this tensor rank's share of the vocabulary's logits."""
        return choose(whole_vocabulary(own_BW, self.topology, self.config.model.vocab_size), sampling, draws_B)


def whole_vocabulary(own: Tensor, topology: Topology, vocab_size: int) -> Tensor:
    """float[..., vocabulary]: the logits of all tensor ranks, from each one's contiguous share, without the padding."""
    parts = [torch.empty_like(own) for _ in range(topology.tensor_size)]
    torch.distributed.all_gather(parts, own, group=topology.tensor)
    return torch.cat(parts, dim=-1)[..., :vocab_size]
