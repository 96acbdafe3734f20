"""The doctor's findings on software and files: packages, GPUs and kernels, Slurm, datasets, towers, tokenizers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from himix_megatron.distributed import fused_kernels as kernels
from himix_megatron.runtime import typed_json
from tools.doctor.finding import Finding

INSTALL = "make setup, or pip install with constraints.txt (docs/installation.md)"
MODULES = {"megatron-core": "megatron.core", "ray": "ray", "tensorboard": "torch.utils.tensorboard"}
"""Packages with a finding of their own, and the module that must load."""
FEWEST = (3, 11)
"""The oldest Python that is supported."""


def findings() -> Iterator[Finding]:
    """All findings but those on named files."""
    yield python()
    yield from packages(metadata.requires("himix-megatron") or [])
    yield from torch_and_gpus()
    yield from fused_kernels()
    yield slurm()
    yield browser()


def python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """The version of this interpreter."""
    text = f"Python {version[0]}.{version[1]}, {sys.executable}"
    if version < FEWEST:
        return Finding("python", "broken", text, f"install {FEWEST[0]}.{FEWEST[1]} or newer", needed=True)
    return Finding("python", "ok", text)


def packages(requirements: list[str]) -> Iterator[Finding]:
    """Whether every dependency is installed in a supported version."""
    fine, wrong = [], []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, wanted {requirement.specifier}")
        elif requirement.name in MODULES:
            yield _imports(requirement.name, version, str(requirement.specifier))
        else:
            fine.append(requirement.name)
    if wrong or not requirements:
        detail = "; ".join(wrong) or "himix-megatron itself is not installed"
        yield Finding("packages", "broken", detail, INSTALL, needed=True)
    else:
        yield Finding("packages", "ok", f"{len(fine)} more in supported versions")


def _imports(package: str, version: str, wanted: str) -> Finding:
    """Whether a package that is installed also loads."""
    try:
        importlib.import_module(MODULES[package])
    except (ImportError, OSError) as error:
        detail = f"{version} does not load: {' '.join(str(error).split())[:160]}"
        return Finding(package, "broken", detail, INSTALL, needed=package != "ray")
    return Finding(package, "ok", f"{version}, wanted {wanted}")


# ---- torch, GPUs, kernels ----------------------------------------------------------------------------------------------


def torch_and_gpus() -> Iterator[Finding]:
    """torch, its devices and its backends."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        yield Finding("torch", "broken", " ".join(str(error).split())[:160], INSTALL, needed=True)
        return
    yield Finding(
        "torch", "ok", f"{torch.__version__}, {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'for CPUs'}"
    )
    driver = nvidia_driver()
    if not torch.cuda.is_available():
        if driver is None:
            yield Finding("gpu", "missing", "no NVIDIA driver: training runs on the CPU, at the size of the tiny recipes")
        else:
            remedy = "install a CUDA build of torch" if torch.version.cuda is None else "is the driver as new as CUDA wants?"
            yield Finding("gpu", "broken", f"driver {driver} is here, but torch sees no device", remedy, needed=True)
    else:
        for index in range(torch.cuda.device_count()):
            yield gpu(index, driver)
    if not dist.is_available() or not dist.is_gloo_available():
        yield Finding("gloo", "broken", "this torch has none", INSTALL, needed=True)
    if dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available():
        yield Finding("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        needed = torch.cuda.is_available()
        yield Finding("nccl", "broken" if needed else "missing", "not in this torch, or no GPU: gloo on CPUs", needed=needed)


def gpu(index: int, driver: str | None) -> Finding:
    """One device, with a product computed on it."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}"
    try:
        free, _ = torch.cuda.mem_get_info(index)
        ones = torch.ones(256, 256, dtype=torch.bfloat16, device=f"cuda:{index}")
        right = bool(((ones @ ones) == 256).all())
    except RuntimeError as error:
        detail = f"{text} does not compute: {str(error).splitlines()[0][:120]}"
        return Finding(f"gpu {index}", "broken", detail, "nvidia-smi tells more", needed=True)
    if not right:
        return Finding(f"gpu {index}", "broken", f"{text} multiplies wrongly", "take it out of service", needed=True)
    if free < 0.9 * properties.total_memory:
        return Finding(f"gpu {index}", "warning", f"{text}, but {free / 2**30:.0f} GiB free", "nvidia-smi names who uses it")
    return Finding(f"gpu {index}", "ok", text)


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Its version, from the kernel or nvidia-smi; None: there is no driver."""
    try:
        found = re.search(r"Kernel Module(?: +for \S+)? +([\d.]+)", file.read_text())
    except OSError:
        found = None
    if found:
        return found[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        if said:
            return said[0]
    return "of unknown version" if file.exists() else None


def fused_kernels() -> Iterator[Finding]:
    """Transformer Engine, Apex (and not its namesake), flash attention."""
    found = kernels.detect()
    te = found.transformer_engine_reason
    if found.transformer_engine:
        yield Finding("transformer engine", "ok", metadata.version("transformer-engine"))
    else:
        broken = "does not load" in te
        yield Finding("transformer engine", "broken" if broken else "missing", te, "docs/installation.md; without it: torch")
    if fault := kernels.hidden_apex():
        yield Finding("apex", "broken", f"{fault}; it is kept from being imported", "pip uninstall apex; docs/installation.md")
    elif importlib.util.find_spec("apex") is None:
        yield Finding("apex", "missing", "no NVIDIA Apex: no fused AdamW of its own, no fused gradient accumulation")
    else:
        yield Finding("apex", "ok", f"NVIDIA Apex; {found.accumulation_fusion_reason}")
    yield triton_kernels(found)
    yield Finding("optimizer", "ok", f"{found.fused_adam_reason}: {found.fused_adam}")
    try:
        flash = importlib.import_module("flash_attn")
        yield Finding("flash attention", "ok", str(flash.__version__))
    except ModuleNotFoundError:
        yield Finding("flash attention", "missing", "cuDNN's in Transformer Engine, or torch's own, serve")
    except (ImportError, OSError) as error:
        detail = f"does not load: {' '.join(str(error).split())[:160]}"
        yield Finding("flash attention", "broken", detail, "build it for this torch, or uninstall it")


def triton_kernels(found: kernels.Kernels) -> Finding:
    """Whether Triton compiles this project's attention here: that takes a C compiler and Python's headers, not Triton alone."""
    if not found.triton:
        return Finding("triton", "missing", "no Triton: attention is Transformer Engine's or torch's")
    import torch

    version = metadata.version("triton")
    if not torch.cuda.is_available():
        return Finding("triton", "ok", f"{version}; no GPU to compile its kernels for")
    try:
        _attend_in_triton()
    except Exception as error:  # whatever a compiler, a linker or a driver says
        detail = f"{version} does not compile: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return Finding("triton", "broken", detail, "install a C compiler and Python's headers (Debian: gcc python3-dev)")
    return Finding("triton", "ok", f"{version} compiles the attention")


def _attend_in_triton() -> None:
    import torch

    from himix_megatron.data.loading.image_table import ImageTable
    from himix_megatron.model.attention.packed_layout import make_layout
    from himix_megatron.model.attention.triton_attention import triton_attention

    query, key, value, vision = (
        torch.ones(4, 1, 2, 64, dtype=torch.bfloat16, device="cuda"),
        *(torch.ones(4, 1, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)),
        torch.ones(8, 1, 2, 64, dtype=torch.bfloat16, device="cuda"),
    )
    ids = torch.zeros(1, 4, dtype=torch.long, device="cuda")
    images = ImageTable.of_features([[8]])
    layout = make_layout(ids, [4], images, lambda length: torch.zeros(length, 1, 1, 64, device="cuda"))
    mixed = triton_attention(query, key, value, vision, layout, 0.125)
    if not bool((mixed == 1).all()):  # values that are all one, however they are weighted
        raise ValueError("attention over ones is not one")


# ---- programs --------------------------------------------------------------------------------------------------------


def slurm() -> Finding:
    """Whether jobs can be submitted."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if len(missing) == 3:
        return Finding("slurm", "missing", "not installed: start ranks with torchrun")
    if missing:
        return Finding("slurm", "broken", f"no {' and no '.join(missing)}", "install Slurm's client programs")
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return Finding("slurm", "broken", "scontrol ping did not answer within 20 s", "is this a login node?")
    words = " ".join((done.stdout + done.stderr).split())
    if " is UP" not in words:
        return Finding("slurm", "broken", f"installed, but no controller answers: {words[:120]}", "SLURM_CONF, or a login node")
    states = subprocess.run(["sinfo", "-h", "-o", "%D %T"], capture_output=True, text=True, timeout=20, check=False).stdout
    return Finding("slurm", "ok", f"controller is up; nodes: {', '.join(states.split(chr(10))[:-1]) or 'none'}")


def browser() -> Finding:
    """The browser that tests of TensorBoard's pages use."""
    found = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if found and shutil.which("chromedriver"):
        return Finding("browser", "ok", f"{found}, with chromedriver (for the tests of TensorBoard's pages)")
    return Finding("browser", "missing", "no Chromium with chromedriver: the tests of TensorBoard's pages skip")


# ---- files -----------------------------------------------------------------------------------------------------------


def dataset(location: str) -> Finding:
    """A shard dataset, shallowly: manifest, sizes of the files, first and last sample against their checksums."""
    from himix_megatron.data.errors import BadSampleError
    from himix_megatron.data.shards.reader import DamagedShardError, ShardDataset

    deep = f"python -m tools.inspect_shards {location} --verify"
    try:
        data = ShardDataset(location)
        for number in {0, len(data) - 1} if len(data) else set[int]():
            data.sample(number)
    except (ValueError, OSError) as error:
        return Finding("dataset", "broken", " ".join(str(error).split())[:240], needed=True)
    except (DamagedShardError, BadSampleError) as error:
        return Finding("dataset", "broken", f"{location}: {' '.join(str(error).split())[:160]}", deep, needed=True)
    shards = len(data.manifest.shards)
    return Finding("dataset", "ok", f"{location}: {len(data)} samples in {shards} shards (every byte: {deep})")


def tower(folder: Path) -> Finding:
    """A folder of a vision tower."""
    config = folder / "config.json"
    if not config.is_file() or not list(folder.glob("*.safetensors")):
        lacks = "config.json" if not config.is_file() else "*.safetensors"
        return Finding("tower", "broken", f"{folder} has no {lacks}", "docs/data.md says where towers are from", needed=True)
    try:
        kind = typed_json.read_object(config).get("model_type", "of unknown type")
    except ValueError as error:
        return Finding("tower", "broken", str(error), "docs/data.md says where towers are from", needed=True)
    return Finding("tower", "ok", f"{folder}: {kind}")


def tokenizer(folder: str, vocab_size: int | None) -> Finding:
    """A folder of a tokenizer, and whether the model has a row for each of its tokens."""
    from himix_megatron.data.text.tokenizer import load_tokenizer

    try:
        loaded = load_tokenizer(folder)
    except ValueError as error:
        return Finding("tokenizer", "broken", " ".join(str(error).split())[:200], "docs/data.md", needed=True)
    if vocab_size is not None and loaded.vocab_size > vocab_size:
        detail = f"{folder} has {loaded.vocab_size} tokens, the model {vocab_size}"
        return Finding("tokenizer", "broken", detail, "it is another model's: --tokenizer DIR", needed=True)
    return Finding("tokenizer", "ok", f"{folder}: {loaded.vocab_size} tokens")
