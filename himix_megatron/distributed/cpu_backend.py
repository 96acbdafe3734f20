"""Lets the real Megatron-core run on CPU and gloo, so that every layout can be tried on a laptop.

Megatron-core asks for CUDA by name. `activate_if_needed` redirects each such request to the CPU, and does nothing on a machine
that has an accelerator; the rest of the project knows nothing of it. Call it before the first import of `megatron.core`.
`activate` redirects to any device, such as a rehearsal's, which only keeps shapes.

| what Megatron-core asks for | what it gets |
|---|---|
| `torch.zeros(..., device="cuda")`, `.cuda()` | the device: ten factories are wrapped, those that it calls with a device |
| `tensor.type()` as a key, `"torch.cuda.FloatTensor"` | that name, when the caller is Megatron-core; the true one elsewhere |
| `torch.cuda.current_device()`, `synchronize()`, streams, events | the device, and nothing: a CPU works in order |
| CUDA's random state | the CPU's generator |
| Apex's kernel that adds a weight's gradient into the fp32 sum | the same by BLAS |
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like", "as_tensor")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's names for what mallopt(3) sets."""
_is_active = False
_device = torch.device("cpu")
"""Where CUDA requests go."""


def activate_if_needed() -> bool:
    """Redirect megatron-core's CUDA requests to the CPU where no CUDA device is present.

    Returns: whether the redirections are in force.
    """
    if not torch.cuda.is_available() and not _is_active:
        activate(_device)
    return _is_active


def activate(device: torch.device) -> None:
    """Redirect megatron-core's CUDA requests to this device, from now on; where they go elsewhere already, too."""
    global _is_active, _device
    _device = device
    if _is_active:
        return
    _is_active = True
    _redirect_devices()
    _redirect_runtime()
    _redirect_random_state()
    _redirect_weight_gradients()
    keep_freed_memory()


def _redirect_devices() -> None:
    """`device="cuda"`, `.cuda()` and type names: schedules, optimizer and checkpoint exchange create tensors this way."""
    # `with torch.device("meta")` knows the factories by identity and lists them at first use: list the true ones now.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _elsewhere(getattr(torch, name)))
    go: Callable[..., Any] = lambda self, *_, **__: self if _device.type == "cpu" else self.to(_device)  # noqa: E731
    torch.Tensor.cuda = go  # type: ignore[method-assign]
    torch.nn.Module.cuda = go  # type: ignore[method-assign]

    # The optimizers sort parameters by the string of their type and know only 'torch.cuda.FloatTensor' and its kin.
    # Only Megatron-core gets this answer; other callers get the true one.
    plain_type = torch.Tensor.type

    @functools.wraps(plain_type)
    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        if isinstance(answer, str) and _caller_is_megatron():
            return answer.replace("torch." if _device.type == "cpu" else f"torch.{_device.type}.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]


def _elsewhere(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _device
        return factory(*args, **kwargs)

    return create


def _caller_is_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.")


class _NoStream:
    """Stands for a CUDA stream or event: everything on a CPU is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _NoStream:
        return self

    def _nothing(self, *_: Any) -> None: ...

    __exit__ = wait_stream = wait_event = record = wait = synchronize = _nothing


def _redirect_runtime() -> None:
    """Current device, synchronisation, streams: asked for around every communication."""
    cuda: Any = torch.cuda
    # Used as a device throughout; the true answer would be an index, and asking raises without a driver.
    cuda.current_device = lambda: _device
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("Stream", "Event"):
        setattr(cuda, name, _NoStream)
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, _NoStream)


def _redirect_random_state() -> None:
    """Megatron-core's tracker of random states (weight initialisation, dropout) uses the CPU's generator instead."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    import megatron.core.tensor_parallel.random as tracker  # after the redirections above: it captures device names

    tracker._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _redirect_weight_gradients() -> None:
    """NVIDIA Apex's kernel adds a weight gradient straight into the fp32 sum; here BLAS does. Without it each gradient is
    written, and read again to be added: a third of the time of a product over few tokens."""
    import megatron.core.tensor_parallel.layers as layers

    def add_product(tokens_TI: torch.Tensor, grad_TO: torch.Tensor, total_OI: torch.Tensor) -> None:
        if tokens_TI.dtype == total_OI.dtype:
            total_OI.addmm_(grad_TO.t(), tokens_TI)
        else:
            total_OI.add_(grad_TO.t() @ tokens_TI)

    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=add_product, wgrad_gemm_accum_fp16=add_product)
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = kernel, True


def keep_freed_memory() -> None:
    """Where the C library is glibc, let it keep freed blocks for the next step. By default it gives those above 128 KB back to
    the kernel, which clears them page by page when they are asked for again: 8 % of a decoder's training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # glibc's own limit; larger blocks still go back
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
