"""Which keys each text token attends to, where its sample's images are not all alike to it.

The text of a sample falls into segments that see the same vision: from one image's place to the next. A view lists for each
segment the rows of all keys that it attends to; the last of them may be its own text, up to itself (bottom-right causal). So
the same kernels serve as for whole samples, and keys that several segments see are given to each.

Flows in: a PackedLayout and the choices; out: an AttentionView. Rows of keys: all T vision tokens, then the M text tokens of
the micro-batch, sample by sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...config import InjectionConfig

if TYPE_CHECKING:
    from .packed_layout import ImageInText, PackedLayout

Numbers = npt.NDArray[np.int64]


class Segment(NamedTuple):
    """Neighbouring text tokens of one sample that see the same vision."""

    text: slice
    """Their rows of the M text rows."""
    sample_begin: int
    """The first text row of their sample."""
    vision: slice
    """The rows of vision that they see."""
    latest: int
    """The text row at the place of the latest image that they see; their sample's first where they see none."""


@dataclass(frozen=True, slots=True)
class ViewGroup:
    """b segments of n text tokens and l keys each."""

    queries: Tensor
    """int64[b * n], text rows."""
    keys: Tensor
    """int64[b * l], rows of keys."""
    num_segments: int
    mask: Tensor | None
    """bool[n, l], True where a key is seen; None: all are."""


@dataclass(frozen=True)
class AttentionView:
    """The segments of a micro-batch, as the kernels want them."""

    has_text: bool
    """Whether the keys end with the segment's own text; then it is seen causally."""
    segments: list[tuple[slice, Numbers]]
    """Of each its text rows, and its rows of keys."""
    key_rows: Tensor
    """int64[L]: the rows of keys of all segments, one after the other. A segment without any has one of zeros, or as many as
    text, which lies behind all others."""
    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    """int32[segments + 1]."""
    max_seqlen_q: int
    max_seqlen_kv: int
    sees: Tensor
    """bool[M, 1]: whether the text token sees vision."""
    has_blind: bool
    """Whether some attend to nothing: their outcome is 0."""

    @cached_property
    def groups(self) -> tuple[tuple[ViewGroup, ...], Tensor]:
        """For attention group by group: segments of equal sizes together; and int64[M], which row of their outcomes, one after
        the other and then one of zeros, is each text token's."""
        groups, order = _groups(self.segments, self.has_text, self.sees.device)
        return groups, torch.from_numpy(order).to(self.sees.device)


def make_view(layout: PackedLayout, num_rows: int, injection: InjectionConfig, device: torch.device) -> AttentionView:
    """What the choices let each of `num_rows` text rows see: `joint` vision and the text so far, else vision, and with
    `local_text` the text since the latest image."""
    joint = injection.fusion == "joint"
    has_text = joint or injection.local_text
    found: list[tuple[slice, Numbers, bool]] = []
    for segment in _segments(layout, injection):
        keys = [np.arange(segment.vision.start, segment.vision.stop)]
        if joint or (injection.local_text and len(keys[0])):
            begin = segment.sample_begin if joint else segment.latest
            keys.append(layout.num_vision_rows + np.arange(begin, segment.text.stop))
        found.append((segment.text, np.concatenate(keys), bool(len(keys[0]))))
    if (end := found[-1][0].stop if found else 0) < num_rows:
        padding = slice(end, num_rows)
        own = layout.num_vision_rows + np.arange(end, num_rows) if joint else np.arange(0)
        found.append((padding, own, False))
    return _as_tensors(found, has_text, not joint, layout.num_vision_rows + num_rows, device)


def _segments(layout: PackedLayout, injection: InjectionConfig) -> Iterator[Segment]:
    """All segments in the order of the text."""
    images = _by_sample(layout)
    ends = pairwise(accumulate(layout.text_lengths, initial=0))
    visions = pairwise(accumulate(layout.vision_lengths, initial=0))
    for (begin, end), (first, last), own in zip(ends, visions, images, strict=True):
        # Where in the text what is seen changes, and the first vision row and the place of each group of images.
        starts: dict[int, int] = {}
        row = first
        for image in own:
            starts.setdefault(min(image.place, end - begin), row)
            row += image.num_tokens
        places = sorted({0, *starts, end - begin})
        for from_place, to_place in pairwise(places):
            known = [place for place in starts if place <= from_place]
            seen = slice(first, first)
            if injection.visibility == "all":
                seen = slice(first, last)
            elif known:
                following = [starts[place] for place in sorted(starts) if place > from_place]
                start = first if injection.visibility == "earlier" else starts[max(known)]
                seen = slice(start, following[0] if following else last)
            latest = begin + (max(known) if known else 0)
            yield Segment(slice(begin + from_place, begin + to_place), begin, seen, latest)


def _by_sample(layout: PackedLayout) -> list[list[ImageInText]]:
    found: list[list[ImageInText]] = [[] for _ in layout.text_lengths]
    for image in layout.images:
        found[image.sample].append(image)
    return found


def positions(layout: PackedLayout, injection: InjectionConfig) -> tuple[Numbers, Numbers]:
    """Rotary positions of all real text rows, and of all vision rows."""
    text, vision = [], []
    for length, own in zip(layout.text_lengths, _by_sample(layout), strict=True):
        before = np.zeros(length + 1, np.int64)
        earlier = 0
        for image in own:
            place = min(image.place, length)
            if injection.position == "rotary_image":
                vision.append(np.full(image.num_tokens, place))
                continue
            vision.append(place + earlier + np.arange(image.num_tokens))
            before[place:] += image.num_tokens
            earlier += image.num_tokens
        text.append(np.arange(length) + before[:length])
    return _joined(text), _joined(vision)


def _joined(parts: list[Numbers]) -> Numbers:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _as_tensors(
    found: list[tuple[slice, Numbers, bool]], has_text: bool, can_be_blind: bool, num_key_rows: int, device: torch.device
) -> AttentionView:
    """Args: found: of each segment its text rows, rows of keys, and whether vision is among them; can_be_blind: whether there
    may be no keys."""
    num_text = [rows.stop - rows.start for rows, _, _ in found]
    sees = np.repeat([sees for _, _, sees in found], num_text)
    filled = [
        keys if len(keys) else np.full(number if has_text else 1, num_key_rows)
        for number, (_, keys, _) in zip(num_text, found, strict=True)
    ]
    ends = [np.concatenate(([0], np.cumsum(lengths))) for lengths in (num_text, [len(keys) for keys in filled])]
    arrays = [np.concatenate(filled), *ends, sees.astype(np.int64)]
    joined = torch.from_numpy(np.concatenate(arrays).astype(np.int64))
    if device.type != "cpu":
        joined = joined.pin_memory().to(device, non_blocking=True)
    key_rows, ends_q, ends_kv, seen = torch.split(joined, [len(array) for array in arrays])
    return AttentionView(
        has_text=has_text,
        segments=[(rows, keys) for rows, keys, _ in found],
        key_rows=key_rows,
        cu_seqlens_q=ends_q.int(),
        cu_seqlens_kv=ends_kv.int(),
        max_seqlen_q=max(num_text),
        max_seqlen_kv=max(map(len, filled)),
        sees=seen.bool()[:, None],
        has_blind=can_be_blind and not sees.all(),
    )


def _groups(found: list[tuple[slice, Numbers]], has_text: bool, device: torch.device) -> tuple[tuple[ViewGroup, ...], Numbers]:
    """Segments of equal sizes together, and where each text row is found among their outcomes."""
    alike: dict[tuple[int, int], list[tuple[slice, Numbers]]] = defaultdict(list)
    for rows, own in found:
        if len(own):
            alike[rows.stop - rows.start, len(own)].append((rows, own))
    groups, taken = [], []
    for (n, num_keys), segments in alike.items():
        queries = np.concatenate([np.arange(rows.start, rows.stop) for rows, _ in segments])
        keys = np.concatenate([own for _, own in segments])
        mask = torch.ones(n, num_keys, dtype=torch.bool).tril(num_keys - n) if has_text and n > 1 else None
        rows_q, rows_k = (torch.from_numpy(array).to(device) for array in (queries, keys))
        groups.append(ViewGroup(rows_q, rows_k, len(segments), None if mask is None else mask.to(device)))
        taken.append(queries)
    computed = _joined(taken)
    order = np.full(max((rows.stop for rows, _ in found), default=0), len(computed))
    order[computed] = np.arange(len(computed))
    return tuple(groups), order


def attend_by_groups(query_MQD: Tensor, key_RGD: Tensor, value_RGD: Tensor, view: AttentionView, scale: float) -> Tensor:
    """float[M, Q, D], zeros where nothing is seen: one call of torch's attention for each size of segment. All query heads that
    share a key head go through together, as more rows: no key is written out twice."""
    num_groups = key_RGD.shape[1]
    groups, order = view.groups
    found = []
    for group in groups:
        query_bnQD = _by_segment(query_MQD, group.queries, group)
        query_bGrD = _heads_first(query_bnQD, num_groups)
        key, value = (_by_segment(rows, group.keys, group).transpose(1, 2) for rows in (key_RGD, value_RGD))
        mask = group.mask if group.mask is None else group.mask.repeat(query_bGrD.shape[2] // len(group.mask), 1)
        mixed = torch.nn.functional.scaled_dot_product_attention(query_bGrD, key, value, attn_mask=mask, scale=scale)
        by_head = torch.unflatten(mixed, 2, (-1, query_bnQD.shape[1]))  # [b, G, Q / G, n, D]
        found.append(by_head.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1))
    zeros = query_MQD.new_zeros(1, *query_MQD.shape[1:])
    if not found:  # recomputation goes back through it all the same
        zeros = zeros + sum(rows[:0].sum() for rows in (query_MQD, key_RGD, value_RGD))
    return torch.cat([*found, zeros]).index_select(0, order)


def _heads_first(query_bnQD: Tensor, num_groups: int) -> Tensor:
    """[b, n, Q, D] as [b, G, (Q / G) * n, D]."""
    return torch.unflatten(query_bnQD, 2, (num_groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _by_segment(rows_RX: Tensor, index: Tensor, group: ViewGroup) -> Tensor:
    """[b, rows of one segment, ...]."""
    return torch.unflatten(rows_RX.index_select(0, index), 0, (group.num_segments, -1))
