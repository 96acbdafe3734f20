"""Fused kernels are recognised by what is called; a package that merely bears the name changes nothing but a log line.

Each case is a process of its own, with packages written for it in front of the module path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from himix_megatron.distributed import fused_kernels
from tests.support import ROOT

REPORT = """
import gc, json, sys
gc.disable()  # a process of two seconds instead of four
from himix_megatron.distributed import cpu_backend, fused_kernels
cpu_backend.activate_if_needed()
found = fused_kernels.detect(has_gpu={has_gpu})
fused_kernels.patch_megatron(found)
import megatron.core.jit, megatron.core.optimizer as optimizer, megatron.core.timers
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import transformer_block
print(json.dumps(dict(
    te=found.transformer_engine, mcore_has_te="transformer_engine.pytorch" in sys.modules,
    adam=found.fused_adam, fusion=found.accumulation_fusion, reasons=found.reasons(),
    mcore_adam=optimizer.Adam.__module__, mcore_is_torch=optimizer.USING_PYTORCH_OPTIMIZER,
    mcore_norm=clip_grads.l2_norm_impl.__module__, mcore_fusion=layers._grad_accum_fusion_available,
    mcore_has_apex=transformer_block.HAVE_APEX,
    mcore_compiles=megatron.core.jit.jit_fuser.__name__, mcore_timers=hasattr(megatron.core.timers, "SummaryWriter"),
    unused=[name for name in ("tensorboard", "multistorageclient") if name in sys.modules],
    hidden=[name for name in ("torch.utils.tensorboard", "multistorageclient") if name in sys.modules],
)))
"""

NVIDIA_APEX = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": "import torch.optim as o\nclass FusedAdam(o.AdamW): ...\nclass FusedSGD(o.SGD): ...",
    "apex/multi_tensor_apply.py": "def multi_tensor_applier(op, buffer, lists, *args): return op(buffer, lists, *args)",
    "amp_C.py": "def multi_tensor_adam(): ...\ndef multi_tensor_l2norm(): ...\ndef multi_tensor_scale(): ...",
    "fused_weight_gradient_mlp_cuda.py": "def wgrad_gemm_accum_fp32(): ...\ndef wgrad_gemm_accum_fp16(): ...",
}
# The Pyramid toolkit fails like this without Pyramid; with it, other failures than an ImportError are as likely.
NAMESAKE = {"apex/__init__.py": "raise RuntimeError('this is a web toolkit')", "apex/views.py": ""}


def report(folder: Path, files: dict[str, str], *, has_gpu: bool) -> dict[str, Any]:
    """What a fresh process finds with these files in front of its module path."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", REPORT.format(has_gpu=has_gpu)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_namesake_of_apex_is_named_and_not_imported(tmp_path: Path) -> None:
    found = report(tmp_path, NAMESAKE, has_gpu=False)
    assert found["adam"] == "torch"
    assert found["reasons"][0] == ("apex found, but it is not NVIDIA Apex (no apex.optimizers.FusedAdam): using torch AdamW")
    assert found["mcore_is_torch"]
    assert found["mcore_adam"].startswith("torch.optim")
    assert not found["mcore_has_apex"]
    # Nor is what megatron-core imports and nothing here uses, and whoever imports that later finds it.
    assert found["unused"] == found["hidden"] == []
    assert found["mcore_timers"]
    assert found["mcore_compiles"] == ("noop_decorator" if not torch.cuda.is_available() else "compile")


def test_a_folder_called_apex_is_no_apex(tmp_path: Path) -> None:
    """A clone of NVIDIA's repository beside the program imports as an empty namespace package."""
    found = report(tmp_path, {"apex/setup.py": "", "apex/apex/optimizers/__init__.py": ""}, has_gpu=True)
    assert found["adam"] == "torch"
    assert "not NVIDIA Apex" in found["reasons"][0]
    assert not found["mcore_has_apex"]


def test_apex_without_its_extensions_is_left_alone(tmp_path: Path) -> None:
    """Its FusedAdam imports, and raises when it is built."""
    files = {name: text for name, text in NVIDIA_APEX.items() if "/" in name}
    found = report(tmp_path, files, has_gpu=True)
    assert found["adam"] == "torch"
    assert found["mcore_is_torch"]
    assert found["reasons"][0] == "apex found, but without its CUDA extensions (no module amp_C): using torch AdamW"


def test_the_contract_of_apex_is_enough_to_use_it(tmp_path: Path) -> None:
    found = report(tmp_path, NVIDIA_APEX, has_gpu=True)
    assert found["adam"] == "apex"
    assert found["mcore_adam"] == "apex.optimizers"
    assert found["mcore_norm"] == "amp_C"
    assert found["fusion"]
    assert found["mcore_fusion"]
    assert found["reasons"][0] == "NVIDIA Apex found: using NVIDIA Apex's FusedAdam"


def test_apex_is_not_used_without_a_cuda_device(tmp_path: Path) -> None:
    """megatron-core would take it, and fail in the first step."""
    found = report(tmp_path, NVIDIA_APEX, has_gpu=False)
    assert found["adam"] == "torch"
    assert found["mcore_is_torch"]
    assert found["mcore_adam"].startswith("torch.optim")
    assert found["mcore_norm"] == "himix_megatron.distributed.fused_kernels"
    assert found["reasons"][0] == "no CUDA device: using torch AdamW"
    assert found["reasons"][1].startswith("no CUDA device, where BLAS adds in place: gradient accumulation is fused")


def test_an_extension_without_the_function_or_that_does_not_load_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    without = {**NVIDIA_APEX, "fused_weight_gradient_mlp_cuda.py": "def wgrad_gemm_accum_fp16(): ..."}
    found = report(tmp_path / "old", without, has_gpu=True)
    assert not found["fusion"]
    assert found["reasons"][1].startswith("no fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32")

    (tmp_path / "other").mkdir()
    broken = {**NVIDIA_APEX, "amp_C.py": "raise ImportError('undefined symbol: _ZN3c10')"}
    found = report(tmp_path / "other", broken, has_gpu=True)
    assert found["adam"] == "torch"
    assert "module amp_C does not load: undefined symbol" in found["reasons"][0]
    assert found["mcore_is_torch"], "megatron-core took an optimizer whose extension does not load"


ENGINE = {
    "transformer_engine/__init__.py": "try:\n    from . import pytorch\nexcept ImportError:\n    pass",
    "transformer_engine/part.py": "",
}
"""The real one also leaves an ImportError of its PyTorch part to whoever asks for that."""
BROKEN_ENGINES = {
    "raise AssertionError('versions: 2.20 and 2.19')": "AssertionError: versions: 2.20 and 2.19",
    "raise RuntimeError('cuDNN 9.12 or newer\\nis wanted')": "RuntimeError: cuDNN 9.12 or newer is wanted",
    "import ctypes; ctypes.CDLL('libnowhere.so')": "libnowhere.so: cannot open shared object file",
    "import transformer_engine.part, no_such_dependency.part": "it needs no_such_dependency, which is not installed",
}


@pytest.mark.parametrize(
    ("error", "has_gpu"), [*((error, True) for error in BROKEN_ENGINES), (next(iter(BROKEN_ENGINES)), False)]
)
def test_a_transformer_engine_that_does_not_load_is_named_and_hidden(tmp_path: Path, error: str, has_gpu: bool) -> None:
    """megatron-core would end with whatever it raises, though it is not asked for."""
    found = report(tmp_path, {**ENGINE, "transformer_engine/pytorch.py": error}, has_gpu=has_gpu)
    assert not found["te"]
    assert not found["mcore_has_te"]
    assert found["adam"] == "torch"
    told = found["reasons"][2]
    assert told.startswith("Transformer Engine cannot be used (module transformer_engine.pytorch does not load: ")
    assert BROKEN_ENGINES[error] in told
    if has_gpu:
        assert BROKEN_ENGINES[error] in found["reasons"][0]


def test_it_is_not_imported_before_megatron_core_is(tmp_path: Path) -> None:
    """It takes seconds: a program that only prints its flags does not wait for it."""
    for name, text in {**ENGINE, "transformer_engine/pytorch.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import sys, himix_megatron, himix_megatron.config; print('transformer_engine' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


CUDNN = ("libcudnn.so.9", "libcudnn_graph.so.9")
LIBRARIES = {f"nvidia/cudnn/lib/{name}": "" for name in CUDNN} | {"nvidia/__init__.py": "", "nvidia/cudnn/__init__.py": ""}
LOADED = """
import ctypes, json, os, sys
from pathlib import Path
loaded, load = [], ctypes.CDLL
def record(name, mode=0, *args, **kwargs):
    if "cudnn" not in str(name):
        return load(name, mode, *args, **kwargs)
    loaded.append([str(name), mode == ctypes.RTLD_GLOBAL, "transformer_engine" in sys.modules])
    if "graph" in str(name):
        raise OSError("no such symbol")  # nothing to stop at
ctypes.CDLL = record
import himix_megatron
before = list(loaded)
import megatron.core
from himix_megatron.distributed import fused_kernels
usable = fused_kernels.detect(has_gpu=True).transformer_engine
print(json.dumps([before, loaded[len(before):], os.environ.get("CUDNN_HOME"), usable]))
"""
MEGATRON = {"megatron/core/__init__.py": ""}
USABLE_ENGINE = "class Linear: ...\nLayerNormLinear = DotProductAttention = RMSNorm = Linear\nimport ctypes, os\n"
USABLE_ENGINE += "ctypes.CDLL(os.environ['CUDNN_HOME'] + '/lib/libcudnn.so.9')"


def loaded_cudnn(folder: Path, files: dict[str, str], **environment: str) -> tuple[list[Any], list[Any], str | None, bool]:
    """Of a process that imports an empty megatron-core: which of cuDNN's libraries were loaded when this project had been
    imported, and which after that; CUDNN_HOME; whether Transformer Engine can be used."""
    for name, text in {**MEGATRON, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    env = {name: text for name, text in os.environ.items() if name != "CUDNN_HOME"}
    env |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", **environment}
    command = [sys.executable, "-c", LOADED]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: tuple[list[Any], list[Any], str | None, bool] = tuple(json.loads(done.stdout.splitlines()[-1]))
    return found


def test_transformer_engine_finds_torchs_own_cudnn(tmp_path: Path) -> None:
    """And not the system's, of which it would take parts beside torch's."""
    own = tmp_path / "nvidia" / "cudnn"
    engine = {**ENGINE, "transformer_engine/pytorch.py": USABLE_ENGINE}
    before, after, home, usable = loaded_cudnn(tmp_path, {**LIBRARIES, **engine})
    assert [name for name, *_ in before] == [str(own / "lib" / name) for name in CUDNN]
    assert all(is_global and not is_late for _, is_global, is_late in before), before
    assert home == str(own)
    assert {name for name, *_ in after} == {str(own / "lib" / CUDNN[0])}, "Transformer Engine asked for another"
    assert usable


def test_cudnn_is_left_alone_where_nothing_asks_for_it(tmp_path: Path) -> None:
    assert loaded_cudnn(tmp_path, LIBRARIES) == ([], [], None, False)


def test_a_cudnn_of_the_users_choice_stays_the_first_that_transformer_engine_asks_for(tmp_path: Path) -> None:
    files = LIBRARIES | ENGINE | {"transformer_engine/pytorch.py": USABLE_ENGINE}
    assert loaded_cudnn(tmp_path, files, CUDNN_HOME="/chosen")[2] == "/chosen"


def test_torch_is_imported_before_transformer_engine(tmp_path: Path) -> None:
    """torch loads libraries of its wheels, like NCCL's, that Transformer Engine is linked with and does not find by itself."""
    needs_torch = (
        "import sys\nif 'torch' not in sys.modules:\n    raise OSError('libnccl.so.2: cannot open shared object file')\n"
    )
    engine = {**ENGINE, "transformer_engine/pytorch.py": needs_torch + USABLE_ENGINE}
    assert loaded_cudnn(tmp_path, engine, CUDNN_HOME="/chosen")[3]


@pytest.mark.parametrize(
    ("theirs", "said"), [((9, 19, 0), "found"), ((9, 14, 0), "found, but with cuDNN 9.14.0 beside torch's 9.19.0")]
)
def test_another_cudnn_than_torchs_is_said(theirs: tuple[int, int, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91900)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    utils = ModuleType("transformer_engine.pytorch.utils")
    utils.get_cudnn_version = lambda: theirs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    assert fused_kernels._found(True).startswith(f"Transformer Engine {said}")
    assert fused_kernels._found(False) == "Transformer Engine found"
