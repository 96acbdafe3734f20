"""RMSNorm and SwiGLU written for CPUs, in few passes over memory and with their own backward passes.

Flows in: hidden states; out: hidden states. Both stand where megatron-core builds a norm and an activation. On a CPU torch
composes each of them, and its gradient, of many operations, which cost more time than the arithmetic. On a GPU the norm is
torch's own.

Shape letters: H width of the hidden states, F inner width of the MLP.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in the form megatron-core builds, marked for sequence parallelism (mcore's torch norms refuse it)."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Each tensor rank sees a part of the text: megatron-core sums the weight's gradient over them.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """float[..., H]. On a CPU torch has no kernel for it, and would compose it, and its gradient, of many passes."""
        if not hidden.is_cpu or hidden.dtype not in (torch.float32, torch.float64):
            return super().forward(hidden)
        normed: Tensor = _RMSNorm.apply(hidden, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class _RMSNorm(torch.autograd.Function):
    """y = w * x / rms(x). With r = 1 / rms(x) and p = dy * x: dw = p^T r, dx = r * w * dy - x * (p w) * r^3 / H."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        width, epsilon = _number(hidden.shape[-1], hidden.dtype), _number(eps, hidden.dtype)
        inverse = norm.mul_(norm).div_(width).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return torch.mul(hidden, inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, inverse = ctx.saved_tensors
        products = torch.mul(grad, hidden).flatten(0, -2)
        of_weight = products.t().mv(inverse.view(-1)) if ctx.needs_input_grad[1] else None
        along = products.mv(weight).view_as(inverse).mul_(inverse.pow(3)).div_(_number(-hidden.shape[-1], hidden.dtype))
        return torch.mul(grad, weight).mul_(inverse).addcmul_(hidden, along), of_weight, None


@functools.cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor: torch casts each number that comes as Python's, four calls of the host's."""
    return torch.tensor(value, dtype=dtype)


_ROWS = 32
"""Of one pass of SwiGLU's gradient: 600 KB in fp32 at Qwen2-0.5B's width."""


class SwiGLU(torch.nn.Module):
    """silu(gate) * up, in the place of megatron-core's MLP for an activation that takes both halves; keeps its input alone.

    mcore's own, where it may not compile, makes nine passes over tensors of this size and keeps two more of them.
    """

    def __init__(self, config: Any):
        """Nothing to keep: there are no parameters."""
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """float[..., 2F] to float[..., F]."""
        activated: Tensor = _SwiGLU.apply(gate_and_up)  # type: ignore[no-untyped-call]
        return activated

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing for a checkpoint; megatron-core asks each part of its MLP."""
        return {}


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        grads = torch.empty_like(gate_and_up)
        # A few rows at a time: what is in between stays in the cache, and in one piece of memory.
        room = grad.new_empty(_ROWS, grad.shape[-1])
        rows = (x.reshape(-1, x.shape[-1]).split(_ROWS) for x in (gate_and_up, grad, grads))
        for own, of_out, of_own in zip(*rows, strict=True):
            (gate, up), (of_gate, of_up) = own.chunk(2, -1), of_own.chunk(2, -1)
            between = room[: len(own)]
            torch.mul(torch.ops.aten.silu.out(gate, out=between), of_out, out=of_up)
            torch.ops.aten.silu_backward.grad_input(torch.mul(of_out, up, out=between), gate, grad_input=of_gate)
        return grads
