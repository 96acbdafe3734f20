"""Where the samples of a micro-batch lie, in text and in vision: what a text token may see, without any mask.

Flows in: the micro-batch's text lengths and images; out: a PackedLayout that megatron-core's block hands to every
layer, in the place it has for packed sequences (`packed_seq_params`).

Vision is always flat: the vision tokens of all samples one after the other. Text is either n rows of S tokens (padding on the
right, where causality hides it), or one row that holds n samples one after the other and ends with padding. The fused kernels
get padding as further samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ...config import InjectionConfig
from ...config.injection import HIMIX
from ...data.loading.image_table import ImageTable
from .attention_view import AttentionView, make_view, positions


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """b neighbouring samples of the same lengths: where they lie in text [S, B, ...] and in the flat vision [T, ...]."""

    num_text: int
    num_vision: int
    columns: slice
    rows: slice
    vision: slice

    def of_text(self, text_SBX: Tensor) -> Tensor:
        """Their text as a view [b, num_text, ...]."""
        own = text_SBX[self.rows, self.columns]
        return own.transpose(0, 1) if own.shape[0] == self.num_text else own.view(-1, self.num_text, *own.shape[2:])

    def of_vision(self, vision_TX: Tensor) -> Tensor:
        """Their vision as a view [b, num_vision, ...]."""
        own = vision_TX[self.vision]
        num_samples = (self.rows.stop - self.rows.start) // self.num_text * (self.columns.stop - self.columns.start)
        return own.view(num_samples, self.num_vision, *own.shape[1:])


class ImageInText(NamedTuple):
    """Where one image of a micro-batch belongs."""

    sample: int
    """Its sample's number."""
    order: int
    """Its number among the sample's images."""
    place: int
    """Text tokens of the sample that come before it."""
    num_tokens: int
    """Its vision tokens."""


@dataclass
class PackedLayout(PackedSeqParams):  # type: ignore[misc]
    """One micro-batch of n samples: the lengths on the host, and as the fused kernels want them (`cu_seqlens_*`).

    Keys of a sample are its vision tokens, then its text.
    """

    text_lengths: tuple[int, ...] = ()
    """n numbers; of rows all S."""
    vision_lengths: tuple[int, ...] = ()
    """n numbers."""
    packed: bool = False
    """Whether the text is one row."""
    angles: Tensor | None = None
    """float[S, 1, 1, D], RoPE angles of each text position; every sample starts at 0."""
    vision_places: Tensor | None = None
    """int64[T]: which of all keys each vision token becomes; what pads the vision, the last one, which nobody sees."""
    text_places: Tensor | None = None
    """int64[S * B]: the same for text, padding included."""
    num_keys: int = 0
    """Rows of all keys."""
    samples: Tensor | None = None
    """int32[4, n]: of each sample, padding included, where its text begins in [S * B, ...], its length, where its vision
    begins, its length. In a row a sample's tokens follow each other; in [S, B] they lie B apart."""
    max_vision: int = 0
    """Vision tokens of a sample at most."""
    pads_vision: bool = False
    """Whether some vision tokens belong to no sample."""
    images: tuple[ImageInText, ...] = ()
    """All images, in the order of their vision tokens; empty where their places are not known. HiMix needs none of it: every
    text token sees all images of its sample."""
    text: PackedLayout | None = None
    """The same text without vision, where something attends to text alone."""
    view: AttentionView | None = None
    """What text sees of vision, where that is not simply all of its sample's."""
    vision_angles: Tensor | None = None
    """float[T, 1, 1, D], RoPE angles of vision keys; None: they are not turned."""

    @property
    def num_vision_rows(self) -> int:
        """Rows of the features, T."""
        return 0 if self.vision_places is None else len(self.vision_places)

    def sample_groups(self) -> list[SampleGroup]:
        """All samples, neighbours of equal lengths taken together."""
        groups, sample, text, vision = [], 0, 0, 0
        for (num_text, num_vision), same in groupby(zip(self.text_lengths, self.vision_lengths, strict=True)):
            count = len(list(same))
            columns = slice(0, 1) if self.packed else slice(sample, sample + count)
            rows = slice(text, text + count * num_text) if self.packed else slice(0, num_text)
            groups.append(SampleGroup(num_text, num_vision, columns, rows, slice(vision, vision + count * num_vision)))
            sample, text, vision = sample + count, rows.stop, vision + count * num_vision
        return groups

    def flatten_text(self, text_SBX: Tensor) -> Tensor:
        """[S, B, ...] text as [S * B, ...], sample by sample; what pads a packed row stays at its end."""
        return text_SBX.squeeze(1) if self.packed else text_SBX.transpose(0, 1).flatten(0, 1)

    def unflatten_text(self, text_MX: Tensor, num_text: int) -> Tensor:
        """The opposite: [S, B, X]."""
        if self.packed:
            return text_MX.unsqueeze(1)
        return text_MX.view(-1, num_text, text_MX.shape[1]).transpose(0, 1).contiguous()

    def interleave_kv(self, vision_kv_TG2D: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """All keys, and all values, each float[num_keys, G, D]: by sample, its vision first, then its text."""
        given = (vision_kv_TG2D, key_SBGD, value_SBGD, self.vision_places, self.text_places, self.num_keys)
        joined: tuple[Tensor, Tensor] = _InterleaveKV.apply(*given)  # type: ignore[no-untyped-call]
        return joined


class _InterleaveKV(torch.autograd.Function):
    """Rows to their places, and gradients back: one pass each, whatever the number of samples.

    Splitting by sample and putting the pieces together again took a third of the host's time for a layer.
    """

    @staticmethod
    def forward(
        ctx: Any, vision_kv: Tensor, key: Tensor, value: Tensor, vision_places: Tensor, text_places: Tensor, num_keys: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(vision_places, text_places)
        ctx.text_shape, ctx.has_spare = key.shape, num_keys == len(vision_places) + len(text_places) + 1
        # What nobody's keys fill may be read by a kernel that takes whole tiles, and times zero.
        make = torch.zeros if ctx.has_spare else torch.empty
        keys, values = make(2, num_keys, *key.shape[2:], dtype=key.dtype, device=key.device).unbind()
        for rows, of_vision, of_text in zip((keys, values), vision_kv.unbind(2), (key, value), strict=True):
            rows.index_copy_(0, vision_places, of_vision).index_copy_(0, text_places, of_text.flatten(0, 1))
        return keys, values

    @staticmethod
    def backward(ctx: Any, of_keys: Tensor, of_values: Tensor) -> tuple[Tensor | None, ...]:
        vision_places, text_places = ctx.saved_tensors
        if ctx.has_spare:
            of_keys[-1].zero_()  # where no kernel wrote anything
            of_values[-1].zero_()
        of_vision = torch.stack([rows.index_select(0, vision_places) for rows in (of_keys, of_values)], dim=2)
        if not any(ctx.needs_input_grad[1:3]):  # the first layer of a frozen decoder
            return of_vision, None, None, None, None, None
        of_text = (rows.index_select(0, text_places).view(ctx.text_shape) for rows in (of_keys, of_values))
        return of_vision, *of_text, None, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """To what a layout's tensors are padded, so that those of many micro-batches have the same shapes. What pads is seen by
    padding alone."""

    num_samples: int
    num_vision: int
    """Rows of the features."""
    max_text: int
    """The longest sample's text tokens, as the kernels get them."""
    max_vision: int
    """The same, of its vision."""


def make_layout(
    text_ids: Tensor,
    packed_lengths: Sequence[int] | None,
    images: ImageTable,
    rotary: Callable[[int], Tensor],
    sizes: Sizes | None = None,
    *,
    injection: InjectionConfig = HIMIX,
    has_text_layers: bool = False,
) -> PackedLayout:
    """The layout of a micro-batch.

    Args:
        text_ids: int64[B, S]; its shape and device are used.
        packed_lengths: text tokens of each sample in its one row; None: each row is a sample.
        images: of each sample.
        rotary: RoPE angles float[n, 1, 1, D] of n text tokens from position 0.
        sizes: None: none larger than they are. Packed text only.
        injection: how vision enters the layers. has_text_layers: whether some take up none.
    """
    num_rows, num_text = text_ids.shape
    vision_lengths = images.sample_tokens()
    packed = packed_lengths is not None
    text_lengths = tuple(packed_lengths) if packed_lengths is not None else (num_text,) * num_rows
    assert len(text_lengths) == len(vision_lengths), (text_lengths, vision_lengths)
    assert not packed or (num_rows == 1 and sum(text_lengths) <= num_text), (num_rows, num_text, text_lengths)
    assert sizes is None or packed
    assert not (injection.needs_places and len(images)) or images.places, "where the images stand in the text is not known"
    longest = max(text_lengths) if sizes is None else sizes.max_text
    # Padding is made of samples without an image, no longer than the others: the kernels write every row, and nothing
    # undefined comes out of it (0 times NaN would be NaN in a weight's gradient).
    padding = num_text * num_rows - sum(text_lengths)
    of_padding = [longest] * (padding // longest) + ([padding % longest] if padding % longest else [])
    missing = 0 if sizes is None else sizes.num_samples - len(text_lengths) - len(of_padding)
    assert missing >= 0, (sizes, len(text_lengths), padding)
    text = np.array([*text_lengths, *of_padding, *[0] * missing])
    vision = np.array([*vision_lengths, *[0] * (len(text) - len(vision_lengths))])
    tensors = _tensors(text, vision, num_rows, num_text, 0 if sizes is None else sizes.num_vision)
    positions, vision_places, text_places, ends_q, ends_kv, samples = _to(text_ids.device, tensors)
    # The angles of a few lengths only are ever made: megatron-core keeps the last ones.
    angles = rotary(-(-longest // 256) * 256 if packed else longest)
    layout = PackedLayout(
        qkv_format="thd",
        cu_seqlens_q=ends_q.int(),
        cu_seqlens_kv=ends_kv.int(),
        max_seqlen_q=longest,
        max_seqlen_kv=int((text + vision).max()) if sizes is None else sizes.max_text + sizes.max_vision,
        text_lengths=text_lengths,
        vision_lengths=tuple(vision_lengths),
        packed=packed,
        angles=angles[positions] if packed else angles,
        vision_places=vision_places,
        text_places=text_places,
        num_keys=num_text * num_rows + len(vision_places) + (0 if sizes is None else 1),
        samples=samples.int().view(4, -1),
        max_vision=int(vision.max()) if sizes is None else sizes.max_vision,
        pads_vision=sizes is not None,
        images=_in_text(images),
    )
    if injection.position in ("rotary", "rotary_image") and not injection.in_sequence:
        layout.angles, layout.vision_angles = _rotary_angles(layout, text_ids, rotary, injection)
    if has_text_layers or injection.fusion in ("separate", "block"):
        nothing = ImageTable((0,) * len(text_lengths), (), ())
        layout.text = replace(make_layout(text_ids, packed_lengths, nothing, rotary), angles=layout.angles)
    if injection.fusion in ("separate", "block") or (injection.fusion == "joint" and injection.visibility != "all"):
        layout.view = make_view(layout, num_text * num_rows, injection, text_ids.device)
    return layout


def _rotary_angles(
    layout: PackedLayout, text_ids: Tensor, rotary: Callable[[int], Tensor], injection: InjectionConfig
) -> tuple[Tensor, Tensor]:
    """RoPE angles of text, float[S, 1, 1, D] or in rows float[S, B, 1, D], and of vision, float[T, 1, 1, D]."""
    text, vision = positions(layout, injection)
    num_rows, num_text = text_ids.shape
    text = np.concatenate((text, np.zeros(num_rows * num_text - len(text), np.int64)))
    most = int(max(text.max(initial=0), vision.max(initial=0))) + 1
    of_text, of_vision = _to(text_ids.device, [text.reshape(num_rows, num_text).T.flatten(), vision])
    angles = rotary(-(-most // 256) * 256)[:, 0, 0]
    return angles[of_text].view(num_text, num_rows, 1, -1), angles[of_vision][:, None, None]


def _in_text(images: ImageTable) -> tuple[ImageInText, ...]:
    if not images.places:
        return ()
    numbered = ((sample, order) for sample, count in enumerate(images.per_sample) for order in range(count))
    found = zip(numbered, images.places, images.tokens, strict=True)
    return tuple(ImageInText(*number, place, num_tokens) for number, place, num_tokens in found)


def _tensors(
    text: np.ndarray[Any, Any], vision: np.ndarray[Any, Any], num_rows: int, num_text: int, num_vision: int
) -> list[np.ndarray[Any, Any]]:
    """By arithmetic, from both lengths of all samples: positions of the text, places of vision and text (in the order of their
    tensors) among the keys, where samples end in queries and keys, and `PackedLayout.samples`."""
    begin = np.cumsum(text + vision) - (text + vision)
    within_text, within_vision = (np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) for n in (text, vision))
    of_vision = np.repeat(begin, vision) + within_vision
    of_text = np.repeat(begin + vision, text) + within_text
    spare = np.full(max(0, num_vision - len(of_vision)), num_vision + len(of_text))
    ends = [np.concatenate(([0], np.cumsum(lengths))) for lengths in (text, text + vision)]
    # Text comes as [S, B]: in rows, sample by sample is column by column.
    begins = np.arange(len(text)) if num_rows > 1 else np.cumsum(text) - text
    samples = np.concatenate((begins, text, np.cumsum(vision) - vision, vision))
    return [within_text, np.concatenate((of_vision, spare)), of_text.reshape(num_rows, num_text).T.flatten(), *ends, samples]


def _to(device: torch.device, arrays: list[np.ndarray[Any, Any]]) -> list[Tensor]:
    """int64 tensors on the device, by one copy that the host does not wait for."""
    joined = torch.from_numpy(np.concatenate(arrays).astype(np.int64))
    if device.type != "cpu":
        joined = joined.pin_memory().to(device, non_blocking=True)
    return list(torch.split(joined, [len(array) for array in arrays]))
