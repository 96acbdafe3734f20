"""Which optional fused kernels can be used here, and why not the others. Flows in: what is installed; out: Kernels.

Transformer Engine and NVIDIA Apex are recognised by the functions that are called, never by a package's name: the `apex`
that a package index offers is a toolkit for Pyramid web applications. megatron-core takes whichever of them imports, and ends
with any error but an ImportError; `prepare_import` and `patch_megatron` make its choice agree with `detect`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

_ADAM_NAMES = {"te": "Transformer Engine's FusedAdam", "apex": "NVIDIA Apex's FusedAdam", "torch": "torch AdamW"}
_UNUSED_IMPORTS = {
    "megatron.core.timers": "torch.utils.tensorboard",
    "megatron.core.msc_utils": "multistorageclient",
    "megatron.core.jit": None,
}
"""Modules of megatron-core that import packages which nothing here uses through them; and its `jit`, whose torch.compile of
functions that only GPUs run would import torch's compiler. On a machine without a GPU that is nearly half of the CPU time of
a start."""
_hidden_apex: str | None = None
_hidden_te: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What is usable, each with its reason as half a sentence."""

    transformer_engine: bool
    """Its layers can be built; running them also takes a CUDA device."""
    transformer_engine_reason: str
    triton: bool = False
    """Whether kernels in Triton can be compiled; running them also takes a CUDA device."""
    fused_adam: Literal["te", "apex", "torch"]
    """Whose AdamW megatron-core uses."""
    fused_adam_reason: str
    accumulation_fusion: bool
    """A linear layer adds its weight gradient straight into the fp32 sum (NVIDIA Apex's extension; on a CPU, BLAS)."""
    accumulation_fusion_reason: str

    def reasons(self) -> tuple[str, ...]:
        """One line each for the log."""
        fusion = "fused into the backward pass" if self.accumulation_fusion else "a step of its own"
        return (
            f"{self.fused_adam_reason}: using {_ADAM_NAMES[self.fused_adam]}",
            f"{self.accumulation_fusion_reason}: gradient accumulation is {fusion}",
            self.transformer_engine_reason,
        )


def prepare_import() -> None:
    """Keep megatron-core from importing an `apex` or a Transformer Engine that it could not use; runs when himix_megatron is
    imported.

    megatron-core expects an ImportError or NVIDIA's package. A namesake, or an Apex built without its CUDA extensions, may
    raise anything on import, or import well and fail when the first optimizer or norm is built. Nothing else is touched: an
    `apex` that was imported already stays. Transformer Engine says of what it misses (another version of its parts, of cuDNN, a
    module) only when it is imported, which takes seconds: that waits until megatron-core, which imports it too, is wanted.
    """
    global _hidden_apex
    if "megatron.core" not in sys.modules and not any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MegatronFinder())
    # megatron-core says this four times a rank; our one log line says which optimizer is used and why.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed", category=UserWarning)
    if "apex" not in sys.modules and (fault := _apex_fault()):
        _hidden_apex = fault
        sys.modules["apex"] = None  # type: ignore[assignment]  # from now on `import apex` is an ImportError
    if importlib.util.find_spec("transformer_engine") is not None:
        _load_torchs_cudnn()


def _load_torchs_cudnn() -> None:
    """Load all of the cuDNN that torch's wheels bring, before Transformer Engine looks for one.

    It would take the system's first where there is one. Seen with 9.14 in /lib beside torch's 9.19: either its import ends with
    an undefined symbol, or cuDNN then finds no kernels ("sublibrary loading failed"), and every attention is computed unfused,
    ten times slower, without a word. Which of the two happens depends on what torch has run before.
    """
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:  # no package nvidia at all: torch uses the system's as well
        return
    for folder in (spec.submodule_search_locations or []) if spec else []:
        os.environ.setdefault("CUDNN_HOME", folder)  # what Transformer Engine asks first
        for library in sorted(Path(folder, "lib").glob("libcudnn*.so.*")):
            # What cannot be loaded is for torch and Transformer Engine to say.
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def hidden_apex() -> str | None:
    """Why an `apex` that is installed was kept from being imported; None if none was."""
    return _hidden_apex


class _MegatronFinder:
    """Among Python's finders of modules: acts when modules of megatron-core are imported for the first time."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Called for each module that is imported for the first time."""
        if name == "megatron.core":
            _hide_unusable_transformer_engine()
        if name not in _UNUSED_IMPORTS or (spec := importlib.machinery.PathFinder.find_spec(name, path)) is None:
            return None
        assert spec.loader is not None
        spec.loader.exec_module = functools.partial(  # type: ignore[method-assign]
            _without_unused_imports, spec.loader.exec_module, _UNUSED_IMPORTS[name]
        )
        return spec


def _without_unused_imports(execute: Callable[[ModuleType], None], unused: str | None, module: ModuleType) -> None:
    """Execute one of the modules of `_UNUSED_IMPORTS`."""
    if unused is None or unused in sys.modules:
        execute(module)
    else:
        sys.modules[unused] = None  # type: ignore[assignment]
        try:
            execute(module)
        finally:
            del sys.modules[unused]
    if module.__name__ == "megatron.core.jit":
        import torch

        if not torch.cuda.is_available():
            module.disable_jit_fuser()


def _hide_unusable_transformer_engine() -> None:
    global _hidden_te
    if importlib.util.find_spec("transformer_engine") is None:
        return
    import torch  # noqa: F401  # loads libraries of its wheels, like NCCL's, that Transformer Engine is linked with

    if not (fault := _fault("transformer_engine.pytorch")):
        return
    _hidden_te = fault
    # Parts of it may have been imported, and would be found though it is hidden itself.
    for name in [name for name in sys.modules if name.startswith("transformer_engine.")]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def detect(has_gpu: bool | None = None) -> Kernels:
    """Try the functions that would be called. `has_gpu` None asks torch."""
    if has_gpu is None:
        import torch  # not at the top: the package imports this module, and its settings need no torch

        has_gpu = torch.cuda.is_available()
    layers = _hidden_te or _fault("transformer_engine.pytorch", "Linear", "LayerNormLinear", "DotProductAttention", "RMSNorm")
    adam, adam_reason = _adam(has_gpu)
    fusion = _fault("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32") if has_gpu else None
    fused_by = "NVIDIA Apex's fused_weight_gradient_mlp_cuda found" if has_gpu else "no CUDA device, where BLAS adds in place"
    return Kernels(
        transformer_engine=layers is None,
        triton=_fault("triton", "jit") is None,
        transformer_engine_reason=f"Transformer Engine cannot be used ({layers})" if layers else _found(has_gpu),
        fused_adam=adam,
        fused_adam_reason=adam_reason,
        accumulation_fusion=fusion is None,
        accumulation_fusion_reason=fusion or fused_by,
    )


def _found(has_gpu: bool) -> str:
    """That Transformer Engine is here, and whether it uses another cuDNN than torch: it would fall back without a word."""
    import torch

    if has_gpu:
        # Not on the page that describes its interface: a version without it is believed.
        with contextlib.suppress(ImportError, RuntimeError):
            from transformer_engine.pytorch.utils import get_cudnn_version

            number = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
            theirs, ours = tuple(get_cudnn_version()), (number // 10_000, number % 10_000 // 100, number % 100)
            if theirs != ours:
                own, other = (".".join(map(str, version)) for version in (ours, theirs))
                return f"Transformer Engine found, but with cuDNN {other} beside torch's {own}: its attention may run unfused"
    return "Transformer Engine found"


def patch_megatron(kernels: Kernels) -> None:
    """Make megatron-core use torch's optimizer where `detect` chose it but a fused one can be imported.

    That is the case without a CUDA device, and for a fused optimizer whose extension does not load.
    """
    import torch
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    if kernels.fused_adam != "torch":
        return
    clip_grads.l2_norm_impl = _norm_of_all
    if optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam, optimizer.SGD, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = torch.optim.Adam, False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.multi_tensor_scale_tensor_impl = None  # from 0.17 on; None is what it is without Transformer Engine


def _norm_of_all(_: int, __: Any, tensor_lists: list[list[Any]], *___: Any) -> tuple[Any, None]:
    """megatron-core's own, used without fused kernels, reads the norm of each gradient back to the host."""
    import torch

    return torch.stack([torch.norm(tensor) for tensor in tensor_lists[0]]).norm()[None].float(), None


def _adam(has_gpu: bool) -> tuple[Literal["te", "apex", "torch"], str]:
    """megatron-core's own order: Transformer Engine, Apex, torch."""
    if not has_gpu:
        return "torch", _hidden_apex or "no CUDA device"
    te = _hidden_te or _fault(
        "transformer_engine.pytorch.optimizers", "FusedAdam", "multi_tensor_applier", "multi_tensor_l2norm"
    )
    if te is None:
        return "te", "Transformer Engine found"
    apex = _hidden_apex or _fault("apex.optimizers", "FusedAdam") or _fault("amp_C", "multi_tensor_adam", "multi_tensor_l2norm")
    if apex is None:
        return "apex", "NVIDIA Apex found"
    return "torch", _hidden_apex or f"neither Transformer Engine nor NVIDIA Apex can be used ({te}; {apex})"


def _apex_fault() -> str | None:
    """Why the `apex` that would be imported is of no use, judged from its files alone; None if it is, or there is none."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return "apex found, but it is not NVIDIA Apex (no apex.optimizers.FusedAdam)"
    if importlib.util.find_spec("amp_C") is None:
        return "apex found, but without its CUDA extensions (no module amp_C)"
    return None


def _fault(module: str, *names: str) -> str | None:
    """Why these names of a module cannot be used; None if they can."""
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or f"{module}.".startswith(f"{error.name}."):
            return f"no module {module}"
        return f"module {module} does not load: it needs {error.name}, which is not installed"
    except Exception as error:  # whatever a package raises that was built for another torch, CUDA, or version of its own parts
        kind = "" if isinstance(error, (ImportError, OSError)) else f"{type(error).__name__}: "
        return f"module {module} does not load: {kind}{' '.join(str(error).split())[:200]}"
    missing = [name for name in names if not hasattr(imported, name)]
    return f"no {module}.{missing[0]}" if missing else None


@functools.cache
def variable_length_arguments() -> frozenset[str]:
    """Arguments of torch's variable-length attention; none where torch has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def has_variable_length() -> bool:
    """Whether torch's variable-length attention can be causal, aligned to the bottom right; that takes a window (from 2.11)."""
    return {"window_size", "scale"} <= variable_length_arguments()
