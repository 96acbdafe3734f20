"""The loss: summed over the answer tokens of the global batch, divided by their number.

Flows in: the last layer's states and the labels; then the per-token losses of a micro-batch; out: what megatron-core's
schedules add up over micro-batches, and over data ranks (`calculate_per_token_loss`). Data parallelism, gradient accumulation
and padding therefore change nothing.

Logits are the largest tensor of a small decoder: 152,000 of them for each token, 600 KB in fp32, against 3.5 KB of state. So
only tokens with a label go through the head. Where Transformer Engine's cross-entropy can be used, which reads each logit once
for the loss and writes the gradient in its place, they do so once (12 bytes of traffic a logit in bf16); elsewhere a chunk at a
time, whose logits are computed again in the backward pass.

Shape letters: S text tokens, B rows, H width, M tokens with a label, W vocabulary of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..costs.memory import CHUNK_LOGITS, GPU_CHUNK_LOGITS, MAX_LOGITS


def chunk_tokens(num_tokens: int, num_logits: int, *, keeps: bool, on_gpu: bool) -> int:
    """Tokens with a label that go through the head at a time; all of them where nothing is computed twice.

    Args: num_logits: of one token on this rank; keeps: whether the cross-entropy can write its gradient over the logits.
    """
    if keeps and num_tokens * num_logits <= MAX_LOGITS:
        return max(1, num_tokens)
    return max(1, (MAX_LOGITS // 8 if keeps else GPU_CHUNK_LOGITS if on_gpu else CHUNK_LOGITS) // num_logits)


def token_losses(
    hidden_SBH: Tensor,
    labels_BS: Tensor,
    losses_of: Callable[[Tensor, Tensor], Tensor],
    num_logits: int,
    *,
    labelled: Tensor | None = None,
    keeps: bool = False,
) -> Tensor:
    """float32[B, S] cross-entropy; 0 where the label is -100.

    Args:
        hidden_SBH: all tokens' states, on every tensor rank.
        losses_of: the head and the cross-entropy: states float[m, 1, H] and labels int64[m, 1] to losses float[m, 1].
        num_logits: W, of one token on this rank.
        labelled: int64[M], which of the B * S labels count, where the host knows; others may be among them if their label is
            -100 and `losses_of` gives 0 for it. None: found here, for which the host waits for a GPU.
        keeps: as in `chunk_tokens`.
    """
    if labelled is None:
        labelled = (labels_BS.flatten() >= 0).nonzero()[:, 0]
    num_rows, num_text = labels_BS.shape
    states_M = labelled % num_text * num_rows + labelled // num_text  # where they lie in [S, B]
    hidden_MH, labels_M = hidden_SBH.flatten(0, 1).index_select(0, states_M), labels_BS.flatten()[labelled]
    chunk = chunk_tokens(len(labelled), num_logits, keeps=keeps, on_gpu=not hidden_SBH.is_cpu)
    if keeps and len(labelled) and chunk >= len(labelled):
        losses_M = losses_of(hidden_MH[:, None], labels_M[:, None])
    else:
        # Without any label one empty chunk still runs: its weights get a gradient of zero, and tensor ranks keep step.
        losses_M = torch.cat(
            [
                checkpoint(losses_of, hidden[:, None], labels[:, None], use_reentrant=False, preserve_rng_state=False)
                for hidden, labels in zip(torch.split(hidden_MH, chunk), torch.split(labels_M, chunk), strict=True)
            ]
        )
    losses = torch.zeros(labels_BS.numel(), dtype=torch.float32, device=labels_BS.device)
    return losses.scatter_add(0, labelled, losses_M[:, 0].float()).view(labels_BS.shape)


def answer_loss(
    labels: Tensor, losses: Tensor, *, token_sources: Tensor | None = None, num_sources: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one micro-batch, in the form of mcore's loss functions.

    Args:
        labels: int64[B, S], -100 for no loss.
        losses: float[B, S], 0 where the label is -100.
        token_sources: int64[B, S], the dataset of each token, 0 to num_sources - 1.
    Returns:
        the summed loss (its gradient is taken), the number of answer tokens (int32), and to report, as float64[2 + 2 x
        num_sources], both, and then both for each dataset.
    """
    counted = labels >= 0
    total = losses.float().sum()
    num_tokens = counted.sum().to(torch.int32)
    report = torch.stack((total.detach().double(), num_tokens.double()))
    if token_sources is not None:
        both = torch.stack((losses.detach().double(), counted.double()), dim=-1).flatten(0, 1)
        apart = both.new_zeros(num_sources, 2).index_add_(0, token_sources.flatten(), both)
        report = torch.cat((report, apart.flatten()))
    return total, num_tokens, report
