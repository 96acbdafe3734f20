"""One pass over micro-batches through megatron-core's schedules: what training, validation and generation share.

Flows in: this rank's model chunks and, per micro-batch, text and images; out: what the last stage reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ..runtime.failpoints import failpoint
from .loss import answer_loss
from .micro_batch_graphs import MicroBatchGraphs
from .stage_input import StageInput


def run_losses(
    model_chunks: list[DistributedDataParallel],
    inputs: Sequence[StageInput],
    *,
    forward_only: bool,
    graphs: MicroBatchGraphs | None = None,
) -> list[Tensor]:
    """Forward, and backward unless `forward_only`, over micro-batches of equal shape.

    Args: graphs: run forward and backward as CUDA graphs; on one pipeline stage.
    Returns: on the last stage per micro-batch what `answer_loss` reports; elsewhere nothing.
    """
    return _run(model_chunks, inputs, _loss, forward_only=forward_only, graphs=None if forward_only else graphs)


def run_logits(
    model_chunks: list[DistributedDataParallel], inputs: Sequence[StageInput], take: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """Forward without labels. `take(micro_batch, logits float[B, S, vocab/TP])` says what to keep.

    Returns: on the last stage what was kept, per micro-batch; elsewhere nothing.
    """
    numbers = iter(range(len(inputs)))
    return _run(
        model_chunks, inputs, lambda _: lambda logits, non_loss_data: take(next(numbers), logits), forward_only=True, raw=True
    )


def _loss(given: StageInput) -> Callable[[Tensor], Any]:
    assert given.labels is not None
    return partial(answer_loss, given.labels, token_sources=given.token_sources, num_sources=given.num_sources)


def _run(
    model_chunks: list[DistributedDataParallel],
    inputs: Sequence[StageInput],
    report: Callable[[StageInput], Callable[..., Any]],
    *,
    forward_only: bool,
    raw: bool = False,
    graphs: MicroBatchGraphs | None = None,
) -> list[Tensor]:
    def forward_step(iterator: Iterator[StageInput], model_chunk: DistributedDataParallel) -> tuple[Tensor, Any]:
        given = next(iterator)
        if not forward_only:
            failpoint("step/forward", progress=True)
        if graphs is not None:
            loss = graphs.run(given, lambda own, losses: report(own)(losses))
            failpoint("step/backward", progress=True)
            # Its backward pass is done: what the schedule goes back through is this number alone.
            return loss[0].requires_grad_(), lambda total: (total, *loss[1:])
        output = given.through(model_chunk)
        if output.requires_grad:
            output.register_hook(lambda _: failpoint("step/backward", progress=True))  # type: ignore[no-untyped-call]
        return output, report(given)

    num_samples, length = inputs[0].text_ids.shape
    reported: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(inputs) for _ in model_chunks],
        model=model_chunks,
        num_microbatches=len(inputs),
        seq_length=length,
        micro_batch_size=num_samples,
        forward_only=forward_only,
        collect_non_loss_data=raw,
    )
    return reported
