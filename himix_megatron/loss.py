"""The loss: summed over the answer tokens of the global batch, divided by their number.

Flows in: the last layer's states and the labels; then the per-token losses of a micro-batch; out: what megatron-core's
schedules add up over micro-batches, and over data ranks (`calculate_per_token_loss`). Data parallelism, gradient accumulation
and padding therefore change nothing.

Logits are the largest tensor of a small decoder: 152,000 of them for each token, 600 KB in fp32, beside 3.5 KB of state. So
only tokens with a label go through the head, a chunk at a time, and a chunk's logits are computed again in the backward pass.

Shape letters: S text tokens, B rows, H width, M tokens with a label, W vocabulary of this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**26
"""Most logits of a rank that exist at once: 256 MiB in fp32."""


def token_losses(
    hidden_SBH: Tensor, labels_BS: Tensor, losses_of: Callable[[Tensor, Tensor], Tensor], num_logits: int
) -> Tensor:
    """float32[B, S] cross-entropy; 0 where the label is -100.

    Args:
        hidden_SBH: all tokens' states, on every tensor rank.
        losses_of: the head and the cross-entropy: states float[m, 1, H] and labels int64[m, 1] to losses float[m, 1].
        num_logits: W, of one token on this rank.
    """
    rows, columns = (labels_BS >= 0).nonzero(as_tuple=True)
    hidden_MH, labels_M = hidden_SBH[columns, rows], labels_BS[rows, columns]
    chunk = max(1, CHUNK_LOGITS // num_logits)
    # Without any label one empty chunk still runs: its weights get a gradient of zero, and tensor ranks keep step.
    losses_M = torch.cat(
        [
            checkpoint(losses_of, hidden[:, None], labels[:, None], use_reentrant=False, preserve_rng_state=False)
            for hidden, labels in zip(torch.split(hidden_MH, chunk), torch.split(labels_M, chunk), strict=True)
        ]
    )
    losses = torch.zeros(labels_BS.shape, dtype=torch.float32, device=labels_BS.device)
    return losses.index_put((rows, columns), losses_M[:, 0].float())


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
