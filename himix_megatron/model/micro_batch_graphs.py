"""Forward and backward of a micro-batch as one CUDA graph: the host starts one thing instead of two thousand kernels.

Flows in: micro-batches of packed text, padded to a few sizes; out: their loss and what is reported of it, the gradients added
up in the parameters' `main_grad`. A decoder of narrow layers is bound by the host: Qwen2-0.5B's 24 layers take it twice as
long as they take an H100 at 8,192 text tokens (docs/results.md). A graph is recorded when a size comes again, so that
the first micro-batch has everything compiled and chosen; all graphs share one pool of memory, since one runs at a time.

Everything that differs between two micro-batches of one size is in tensors: what text and vision lengths decide is in the
PackedLayout's, which labels count in `labelled`. Nothing in the step may therefore depend on a number that the host reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from .attention.packed_layout import PackedLayout, Sizes, make_layout
from .himix_model import unwrap_model
from .stage_input import StageInput

Report = tuple[Tensor, Tensor, Tensor]
"""The summed loss, the number of answer tokens, and what is reported: as `loss.answer_loss` gives them."""

TEXT_MULTIPLE, VISION_MULTIPLE, LONGEST_MULTIPLE, SAMPLE_MULTIPLE, LABEL_MULTIPLE = 128, 4096, 256, 32, 512
"""What sizes are rounded up to: text and vision tokens, the vision tokens of the sample with most, samples, labels. At 18,954
vision tokens and 4,096 labels of a pack they add a percent of its work, and leave a dozen sizes of a data set."""
MAX_GRAPHS = 32
"""Rarer sizes run kernel by kernel."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: StageInput
    """Whose tensors the graph reads."""
    report: Report
    """Which it writes."""


class MicroBatchGraphs:
    """The graphs of one model chunk. Every micro-batch goes through `run`, recorded or not."""

    def __init__(self, config: Config, model_chunk: Any):
        """Nothing is recorded yet. Raises: nothing; `Config` refuses what cannot be recorded."""
        self._config, self._stage = config, model_chunk
        self._recorded: dict[Any, _Recorded] = {}
        self._seen: set[Any] = set()
        self._pool: Any = None
        self._inputs: dict[Any, Tensor] = {}

    def run(self, given: StageInput, loss_of: Callable[[StageInput, Tensor], Report]) -> Report:
        """One micro-batch, forward and backward. `loss_of`: from an input and its per-token losses."""
        padded = self.padded(given)
        size = _size(padded)
        if size in self._recorded:
            return self._replay(self._recorded[size], padded)
        if size not in self._seen or len(self._recorded) >= MAX_GRAPHS:
            self._seen.add(size)
            return self._step(padded, loss_of)
        self._recorded[size] = self._record(padded, loss_of)
        return self._replay(self._recorded[size], padded)

    def padded(self, given: StageInput) -> StageInput:
        """The same micro-batch in one of the sizes, with its PackedLayout."""
        assert given.packed_lengths is not None
        assert given.labels is not None
        assert given.labelled is not None
        num_vision = len(given.images)
        num_text, padded_vision = padded_sizes(self._config, given.text_ids.shape[1], num_vision)
        missing = num_text - given.text_ids.shape[1]
        vision_lengths = given.image_table.sample_tokens()
        text_ids = F.pad(given.text_ids, (0, missing))
        labelled = given.labelled
        extra_labels = _up(max(1, len(labelled)), LABEL_MULTIPLE) - len(labelled)
        max_text = self._config.data.max_text_tokens
        num_padding = -(-(num_text - sum(given.packed_lengths)) // max_text)
        sizes = Sizes(
            num_samples=_up(len(vision_lengths) + num_padding, SAMPLE_MULTIPLE),
            num_vision=padded_vision,
            max_text=max_text,
            max_vision=_up(max(vision_lengths), LONGEST_MULTIPLE),
        )
        rotary = unwrap_model(self._stage).rotary_pos_emb
        return replace(
            given,
            text_ids=text_ids,
            images=F.pad(given.images, (0, 0, 0, padded_vision - num_vision)),
            blank=given.blank[:0],  # features say it already
            labels=F.pad(given.labels, (0, missing), value=-100),
            # The last token of a row has nothing to predict, so no label.
            labelled=F.pad(labelled, (0, extra_labels), value=num_text - 1),
            token_sources=None if given.token_sources is None else F.pad(given.token_sources, (0, missing)),
            # A graph knows nothing of another micro-batch that is not in tensors.
            layout=replace(make_layout(text_ids, given.packed_lengths, given.image_table, rotary, sizes), images=()),
        )

    def _step(self, given: StageInput, loss_of: Callable[[StageInput, Tensor], Report]) -> Report:
        report = loss_of(given, given.through(self._stage))
        report[0].backward()  # type: ignore[no-untyped-call]
        return report[0].detach(), *report[1:]

    def _record(self, given: StageInput, loss_of: Callable[[StageInput, Tensor], Report]) -> _Recorded:
        own = _with_tensors(given, [self._kept(number, tensor) for number, tensor in enumerate(_tensors(given))])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stage.graph_stream, capture_error_mode="thread_local"):
            report = self._step(own, loss_of)
        self._pool = self._pool or graph.pool()
        return _Recorded(graph, own, report)

    def _kept(self, number: int, like: Tensor) -> Tensor:
        """A tensor for graphs to read: one for all of them whose inputs have the same shape here, since one runs at a time."""
        key = (number, like.shape, like.dtype)
        if key not in self._inputs:
            self._inputs[key] = torch.zeros_like(like)
        return self._inputs[key]

    @staticmethod
    def _replay(recorded: _Recorded, given: StageInput) -> Report:
        for own, new in zip(_tensors(recorded.given), _tensors(given), strict=True):
            own.copy_(new)
        recorded.graph.replay()
        total, num_tokens, reported = (tensor.clone() for tensor in recorded.report)
        return total, num_tokens, reported


def padded_sizes(config: Config, num_text: int, num_vision: int) -> tuple[int, int]:
    """The numbers of text and vision tokens that a micro-batch with these numbers is padded to."""
    num_text = _up(max(num_text, config.data.pack_max_text_tokens or 0), TEXT_MULTIPLE)
    return num_text, _up(max(1, num_vision), VISION_MULTIPLE)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _size(given: StageInput) -> tuple[Any, ...]:
    """What two micro-batches must share to be run by one graph: shapes, and the numbers that kernels are started with."""
    layout = given.layout
    assert layout is not None
    return *(tensor.shape for tensor in _tensors(given)), layout.max_seqlen_q, layout.max_seqlen_kv, layout.num_keys


def _tensors(given: StageInput) -> list[Tensor]:
    """All tensors of an input and its PackedLayout, in a fixed order."""
    parts = (given, given.layout)
    found = [getattr(part, item.name) for part in parts for item in fields(part)]  # type: ignore[arg-type]
    return [value for value in found if isinstance(value, Tensor)]


def _with_tensors(given: StageInput, tensors: list[Tensor]) -> StageInput:
    """The same with other tensors, in the order of `_tensors`."""
    rest = iter(tensors)

    def taken(part: StageInput | PackedLayout) -> dict[str, Any]:
        return {item.name: next(rest) for item in fields(part) if isinstance(getattr(part, item.name), Tensor)}

    assert given.layout is not None
    own = replace(given, **taken(given))
    return replace(own, layout=replace(given.layout, **taken(given.layout)))
