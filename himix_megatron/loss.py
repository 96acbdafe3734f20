"""The loss: summed over the answer tokens of the global batch, divided by their number.

Flows in: per-token losses of a micro-batch; out: what megatron-core's schedules add up over micro-batches, and over data
ranks (`calculate_per_token_loss`). Data parallelism, gradient accumulation and padding therefore change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def answer_loss(labels: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one micro-batch, in the form of mcore's loss functions.

    Args:
        labels: int64[B, S], -100 for no loss.
        losses: float[B, S], 0 where the label is -100.
    Returns:
        the summed loss (its gradient is taken), the number of answer tokens (int32), and both as float64[2] to report.
    """
    total = losses.float().sum()
    num_tokens = (labels >= 0).sum().to(torch.int32)
    return total, num_tokens, torch.stack((total.detach().double(), num_tokens.double()))
