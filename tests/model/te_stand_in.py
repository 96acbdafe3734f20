"""Stands for Transformer Engine where it is not installed: shapes alone, and every call checked against recorded signatures.

    python -m tests.model.te_stand_in        rehearses steps on its layers, and prints what was called and where the host waits

Modules that nobody of ours uses exist, because megatron-core imports them, and hold empty classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from .te_signatures import RECORD, recorded

ROOT = "transformer_engine"
CALLS: Counter[str] = Counter()
"""How often each was called."""


def checked(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function whose calls must fit the signature recorded under this name, and which gets them by the names there."""
    signature = recorded()[f"{ROOT}.pytorch.{name}"]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            CALLS[name] += 1
            try:
                given = dict(signature.bind(*args, **kwargs).arguments)
            except TypeError as error:
                raise TypeError(f"{ROOT}.pytorch.{name}{signature}: {error}") from error
            for parameter in signature.parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given.update(given.pop(parameter.name, {}))
            return function(**given)

        call.__signature__ = signature  # type: ignore[attr-defined]  # what `inspect` tells of the real one
        return call

    return decorate


class _Linear(torch.nn.Module):
    def _make(self, given: dict[str, Any]) -> None:
        super().__init__()
        ranks, mode = given["tp_size"], given["parallel_mode"]
        rows, columns = given["out_features"], given["in_features"]
        rows, columns = (rows // ranks, columns) if mode == "column" else (rows, columns // ranks)
        place = {"dtype": given["params_dtype"], "device": given["device"]}
        self.weight = torch.nn.Parameter(torch.empty(rows, columns, **place))
        self.bias = torch.nn.Parameter(torch.empty(rows, **place)) if given["bias"] else None
        given["init_method"](self.weight)
        self.ranks = ranks if given["sequence_parallel"] else 1
        self.parallel_mode, self.gives_bias = mode, given["return_bias"]
        self.fuse_wgrad_accumulation = given["fuse_wgrad_accumulation"]

    def _multiply(self, inp: torch.Tensor) -> Any:
        inp = torch.cat([inp] * self.ranks) if self.parallel_mode == "column" else inp
        output = F.linear(inp, self.weight, None if self.gives_bias else self.bias)
        output = output.chunk(self.ranks)[0] if self.parallel_mode == "row" else output
        return (output, self.bias) if self.gives_bias else output


class Linear(_Linear):
    @checked("Linear.__init__")
    def __init__(self, **given: Any) -> None:
        self._make(given)

    @checked("Linear.forward")
    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._multiply(inp)


class LayerNormLinear(_Linear):
    @checked("LayerNormLinear.__init__")
    def __init__(self, **given: Any) -> None:
        assert given["normalization"] == "RMSNorm", given
        assert not given["return_layernorm_output"], given
        self._make(given)
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(given["in_features"], dtype=given["params_dtype"], device=given["device"])
        )
        self.layer_norm_weight.sequence_parallel = given["sequence_parallel"]  # type: ignore[attr-defined]

    @checked("LayerNormLinear.forward")
    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        return self._multiply(F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight))


class RMSNorm(torch.nn.Module):
    @checked("RMSNorm.__init__")
    def __init__(self, normalized_shape: Any = None, hidden_size: Any = None, **given: Any) -> None:
        super().__init__()
        place = {"dtype": given.get("params_dtype") or given.get("dtype"), "device": given.get("device")}
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, **place))
        self.weight.sequence_parallel = given.get("sequence_parallel")  # type: ignore[attr-defined]

    @checked("RMSNorm.forward")
    def forward(self, input: torch.Tensor, extra_inputs: Any = ()) -> torch.Tensor:
        return F.rms_norm(input, input.shape[-1:], self.weight)


class DotProductAttention(torch.nn.Module):
    @checked("DotProductAttention.__init__")
    def __init__(self, **given: Any) -> None:
        super().__init__()

    @checked("DotProductAttention.forward")
    def forward(
        self, query_layer: torch.Tensor, key_layer: torch.Tensor, value_layer: torch.Tensor, **given: Any
    ) -> torch.Tensor:
        assert given["cu_seqlens_q"].dtype == given["cu_seqlens_kv"].dtype == torch.int32, given
        assert all(x.is_contiguous() for x in (query_layer, key_layer, value_layer))
        assert all(type(given[name]) is int for name in ("max_seqlen_q", "max_seqlen_kv")), given
        ends = (given["cu_seqlens_q"].sum() + given["cu_seqlens_kv"].sum()).to(query_layer.dtype)
        return (query_layer * ((key_layer * value_layer).mean() + ends)).flatten(1)


class SwiGLU(torch.nn.Module):
    @checked("ops.SwiGLU.__init__")
    def __init__(self, **_: Any) -> None:
        super().__init__()

    @checked("ops.SwiGLU.forward")
    def forward(self, input: torch.Tensor, extra_inputs: Any = ()) -> torch.Tensor:
        gate, up = input.chunk(2, -1)
        return F.silu(gate) * up


@checked("cross_entropy.parallel_cross_entropy")
def parallel_cross_entropy(inp: torch.Tensor, target: torch.Tensor, **given: Any) -> torch.Tensor:
    """float32, of the target's shape."""
    assert inp.numel(), "it refuses an empty input"
    return inp.float().logsumexp(-1) - inp.gather(-1, target.clamp(min=0)[..., None])[..., 0].float()


@checked("attention.rope.apply_rotary_pos_emb")
def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor, **given: Any) -> torch.Tensor:
    """The same shape; the angles are float32[S, 1, 1, D]."""
    assert freqs.dtype == torch.float32, freqs.dtype
    assert freqs.shape == (t.shape[0], 1, 1, t.shape[-1]), (t.shape, freqs.shape)
    return t * freqs.sum().to(t.dtype)


KNOWN: dict[str, Any] = {
    "pytorch.Linear": Linear,
    "pytorch.LayerNormLinear": LayerNormLinear,
    "pytorch.RMSNorm": RMSNorm,
    "pytorch.DotProductAttention": DotProductAttention,
    "pytorch.ops.SwiGLU": SwiGLU,
    "pytorch.cross_entropy.parallel_cross_entropy": parallel_cross_entropy,
    # Not of the record: megatron-core calls them by place.
    "pytorch.attention._SplitAlongDim": types.SimpleNamespace(apply=lambda x, dim, sizes: torch.split(x, sizes, dim)),
    "pytorch.cpu_offload.get_cpu_offload_context": lambda *_, **__: (contextlib.nullcontext(), None),
    "pytorch.attention.rope.apply_rotary_pos_emb": apply_rotary_pos_emb,
}


class _Empty(type):
    """Classes whose methods may be named, not called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Module(types.ModuleType):
    """A module of the package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        found = KNOWN.get(path.removeprefix(f"{ROOT}."))
        if found is None:
            # What is in small letters is a module, or a function that nobody calls.
            found = importlib.import_module(path) if name.islower() else _Empty(name, (), {})
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.split(".")[0] == ROOT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Module(spec.name)
        module.__dict__["__version__"] = json.loads(RECORD.read_text())["transformer-engine"]
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def main() -> None:
    """In a process of its own: megatron-core asks once, when it is imported, whether there is Transformer Engine."""
    sys.meta_path.insert(0, _Finder())
    from .rehearsal import rehearsing
    from .test_rehearsal import ALIGN, GRAPHS, INSTRUCT, PACKED, TENSOR, WIDE, waits_of

    found = []
    with rehearsing(transformer_engine=True) as mode:
        for case, ranks in ((ALIGN, 1), (INSTRUCT | PACKED, 1), (INSTRUCT | TENSOR, 2), (INSTRUCT | GRAPHS | WIDE, 1)):
            CALLS.clear()
            waits = waits_of(mode, case | {"layer_spec": "te"}, ranks - 1, ranks)
            found.append((str(case), [dataclasses.astuple(wait) for wait in waits], dict(CALLS)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
