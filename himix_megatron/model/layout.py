"""Where the samples of a micro-batch lie, in text and in vision: what a text token may see, without any mask.

Flows in: the micro-batch's text lengths and image counts; out: a Layout that megatron-core's block hands to every layer in
the place it has for packed sequences (`packed_seq_params`).

Vision is always flat: the vision tokens of all samples one after the other, no padding. Text is either n rows of S tokens
(padding on the right, where causality hides it), or one row that holds n samples one after the other and ends with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
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


@dataclass
class Layout(PackedSeqParams):  # type: ignore[misc]
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

    def runs(self) -> list[Run]:
        """All samples, neighbours of equal lengths taken together."""
        runs, sample, text, vision = [], 0, 0, 0
        for (num_text, num_vision), same in groupby(zip(self.text_lengths, self.vision_lengths, strict=True)):
            count = len(list(same))
            columns = slice(0, 1) if self.packed else slice(sample, sample + count)
            rows = slice(text, text + count * num_text) if self.packed else slice(0, num_text)
            runs.append(Run(num_text, num_vision, columns, rows, slice(vision, vision + count * num_vision)))
            sample, text, vision = sample + count, rows.stop, vision + count * num_vision
        return runs

    def one_after_the_other(self, text_SBX: Tensor) -> Tensor:
        """[S, B, ...] text as [sum of text_lengths, ...], padding of a packed row left out."""
        if self.packed:
            return text_SBX[: sum(self.text_lengths), 0]
        return text_SBX.transpose(0, 1).flatten(0, 1)

    def as_text(self, flat_TX: Tensor, num_text: int) -> Tensor:
        """The opposite: [S, B, X]; zeros in the padding of a packed row."""
        if self.packed:
            return torch.nn.functional.pad(flat_TX, (0, 0, 0, num_text - len(flat_TX)))[:, None]
        return flat_TX.view(-1, num_text, flat_TX.shape[1]).transpose(0, 1).contiguous()

    def keys(self, vision_TX: Tensor, text_SBX: Tensor) -> Tensor:
        """Keys (or values) by sample, vision first: [sum of both lengths, ...]."""
        vision = torch.split(vision_TX, list(self.vision_lengths))
        text = torch.split(self.one_after_the_other(text_SBX), list(self.text_lengths))
        return torch.cat([part for pair in zip(vision, text, strict=True) for part in pair])


def lay_out(
    text_ids: Tensor, packed_lengths: Sequence[int] | None, vision_lengths: Sequence[int], rotary: Callable[[int], Tensor]
) -> Layout:
    """The Layout of a micro-batch.

    Args:
        text_ids: int64[B, S]; its shape and device are used.
        packed_lengths: text tokens of each sample in its one row; None: each row is a sample.
        vision_lengths: vision tokens of each sample.
        rotary: RoPE angles float[n, 1, 1, D] of n text tokens from position 0.
    """
    num_rows, num_text = text_ids.shape
    packed = packed_lengths is not None
    text_lengths = tuple(packed_lengths) if packed_lengths is not None else (num_text,) * num_rows
    assert len(text_lengths) == len(vision_lengths), (text_lengths, vision_lengths)
    assert not packed or (num_rows == 1 and sum(text_lengths) <= num_text), (num_rows, num_text, text_lengths)
    key_lengths = [text + vision for text, vision in zip(text_lengths, vision_lengths, strict=True)]

    def ends(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=text_ids.device)

    angles = rotary(max(text_lengths))
    if packed:
        places = [torch.arange(length) for length in text_lengths]
        places.append(torch.zeros(num_text - sum(text_lengths), dtype=torch.long))
        angles = angles[torch.cat(places).to(angles.device)]
    return Layout(
        qkv_format="thd",
        cu_seqlens_q=ends(text_lengths),
        cu_seqlens_kv=ends(key_lengths),
        max_seqlen_q=max(text_lengths),
        max_seqlen_kv=max(key_lengths),
        text_lengths=text_lengths,
        vision_lengths=tuple(vision_lengths),
        packed=packed,
        angles=angles,
    )
