"""A training step on a device that only keeps shapes: what would mix devices, or make the host wait, is found without a GPU.

Flows in: a configuration; out: every wait of the host for the device within a step, and where in the code it is.

The device is torch's Python-defined one under the name `fakegpu`; what lies there are fake tensors. Host tensors are real, with
values, as the host reads them. Ranks of a larger world are rehearsed one at a time: their groups exchange nothing. Where the
code reads a number from the device it gets a stand-in, and the place is noted. Kernels in Triton are not run: how they are
started is checked. Nothing is recorded as a CUDA graph; what would be runs as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from himix_megatron.config import Config
from himix_megatron.distributed import cpu_backend

aten = torch.ops.aten
KERNELS = ("_forward", "_row_sums", "_backward_of_keys", "_backward_of_queries")
"""Of model/attention/triton_attention.py."""


def stand_in(dtype: torch.dtype) -> Any:
    """What is read from the device."""
    return torch.ones((), dtype=dtype).item()


@dataclass(frozen=True, slots=True)
class Wait:
    """Once that the host waits for the device."""

    what: str
    file: str
    """From the package on: `himix_megatron/training/train_step.py`."""
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.what} at {self.file}:{self.line} in {self.function}"


class Rehearsal(TorchDispatchMode):
    """Within it what is on the device is fake and what is on the host is real; notes the host's waits."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.fakes = device, FakeTensorMode()
        self.waits: list[Wait] = []
        self.started: Counter[str] = Counter()
        """How often each of `KERNELS`."""
        self.in_step = False
        """Before it the host may wait."""
        self.gloo: set[str] = set()
        """Names of groups."""
        self.pinned: dict[int, torch.Tensor] = {}
        """By where their storage begins; kept, so that no other storage takes that place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        given = [x for x in flat if isinstance(x, torch.Tensor)]
        goes = any(isinstance(x, torch.device) and x.type == self.device.type for x in flat)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.note("a number is read")
            return stand_in(args[0].dtype)
        if func.namespace == "c10d":
            return self.exchange(func, args, kwargs, given)
        if not goes and not any(isinstance(x, FakeTensor) for x in given):
            return func(*args, **kwargs)
        if self.in_step:
            self.note_copies(func, args, kwargs)
        if not all(isinstance(x, FakeTensor) for x in given):
            args, kwargs = tree_map_only(torch.Tensor, self.fake, (args, kwargs))
        try:
            with self.fakes:
                return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AssertionError(f"the host waits: {self.here(str(func))}") from error

    def exchange(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        """A collective, which leaves its tensors as they are. NCCL's groups take the device's tensors, gloo's the host's."""
        groups = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.ScriptObject)]
        group = next(dist.ProcessGroup.unbox(x) for x in groups if "ProcessGroup" in x._type().qualified_name())
        wanted = "cpu" if group.group_name in self.gloo else self.device.type
        if self.in_step:
            assert {x.device.type for x in given} <= {wanted}, f"{[x.device for x in given]} in a group for {wanted}: {func}"
        on_host = tree_map_only(FakeTensor, lambda x: torch.empty(x.shape, dtype=x.dtype), (args, kwargs))
        result = func(*on_host[0], **on_host[1])
        return (args[0], *result[1:]) if isinstance(result, tuple) else result

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """It, or its image where it is real."""
        return tensor if isinstance(tensor, FakeTensor) else self.fakes.from_tensor(tensor, static_shapes=True)

    def note_copies(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note copies for which the host waits: back from the device, or of host memory that is not pinned."""
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            if self.is_there(args[0]) and any(x is not None and x.device.type == "cpu" and x.dim() for x in args[1]):
                self.note("a copy of indices in host memory")
            return
        if func is aten._to_copy.default:
            source, there = args[0], (kwargs.get("device") or args[0].device).type == self.device.type
            non_blocking = bool(kwargs.get("non_blocking"))
        elif func is aten.copy_.default:
            source, there, non_blocking = args[1], self.is_there(args[0]), len(args) > 2 and bool(args[2])
        else:
            return
        if there == self.is_there(source):
            return
        if not there:
            self.note("a copy to the host")
        elif source.untyped_storage().data_ptr() not in self.pinned:
            self.note("a copy of host memory that is not pinned")
        elif not non_blocking:
            self.note("a copy to the device that is not non_blocking")

    def is_there(self, tensor: torch.Tensor) -> bool:
        """Whether it is on the device."""
        return tensor.device.type == self.device.type

    def note(self, what: str) -> None:
        """The host waits."""
        if self.in_step:
            self.waits.append(self.here(what))

    def here(self, what: str) -> Wait:
        """The innermost line of this project's, or of megatron-core's, that is under way."""
        for frame in reversed(traceback.extract_stack()):
            for package in ("himix_megatron/", "megatron/core/"):
                if f"/{package}" in frame.filename:
                    file = package + frame.filename.rsplit(f"/{package}", 1)[1]
                    return Wait(what, file, frame.lineno or 0, frame.name)
        return Wait(what, "?", 0, "?")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stands for `Tensor.pin_memory`."""
        assert tensor.device.type == "cpu", tensor.device
        if tensor.untyped_storage().data_ptr() in self.pinned:
            return tensor
        copy = tensor.clone()
        self.pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def listed(self, tensor: torch.Tensor) -> list[Any]:
        """Stands for a fake tensor's `tolist`."""
        self.note("a list is read")
        return [stand_in(tensor.dtype)] * tensor.numel()

    def synchronise(self, *_: Any) -> None:
        """Stands for `torch.cuda.synchronize`."""
        self.note("torch.cuda.synchronize")

    def leave(self) -> None:
        """After a step that ended with an error: leave its groups."""
        from himix_megatron.distributed.topology import shutdown_distributed

        self.in_step = False
        shutdown_distributed()


class Kernel:
    """Stands for one in Triton: it may be started as that one is, and does nothing."""

    def __init__(self, mode: Rehearsal, function: Callable[..., Any]) -> None:
        self.mode, self.name, self.signature = mode, function.__name__, inspect.signature(function)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(type(size) is int for size in grid), f"{self.name}: {grid}"
        return self.start

    def start(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
        """Tensors on the device, by their names, and numbers of the host."""
        for name, value in self.signature.bind(*args, **kwargs).arguments.items():
            fits = self.mode.is_there(value) if name.endswith("_at") else type(value) in (int, float)
            assert fits, f"{self.name}: {name} is {value!r}"
        self.mode.started[self.name] += 1


def triton_attention() -> Any:
    """The module. Where Triton is not installed it alone gets a stand-in: torch would take that for the real one."""
    name = "himix_megatron.model.attention.triton_attention"
    if name in sys.modules or importlib.util.find_spec("triton"):
        return importlib.import_module(name)
    triton: Any = ModuleType("triton")
    triton.language = ModuleType("triton.language")
    triton.jit, triton.cdiv = lambda function: SimpleNamespace(fn=function), lambda number, by: -(-number // by)
    modules = {"triton": triton, "triton.language": triton.language}
    sys.modules.update(modules)
    try:
        return importlib.import_module(name)
    finally:
        for given in modules:
            del sys.modules[given]


_known: list[Any] = []
"""What torch calls back; it does not keep them alive by itself."""


def fake_gpu() -> torch.device:
    """The device, made known to torch in this process."""
    from torch.utils import backend_registration

    class Backend(backend_registration._DummyBackendModule):  # type: ignore[misc]
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    if not _known:
        _known.extend((Backend(), backend_registration._DummyPrivateUse1Hook(), backend_registration._DummyDeviceGuard()))
        backend_registration._setup_privateuseone_for_python_backend("fakegpu", *_known)
    return torch.device("fakegpu", 0)


def moved(module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
    """Stands for `Module._apply`, which exchanges fake parameters in place, and cannot where something else knows them."""
    for child in module.children() if recurse else ():
        moved(child, fn)
    for name, old in module._parameters.items():
        with torch.no_grad():
            new = old if old is None else fn(old)
        if new is not old and old is not None:
            module._parameters[name] = own = torch.nn.Parameter(new, old.requires_grad)
            own.__dict__.update({key: value for key, value in old.__dict__.items() if key not in own.__dict__})
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


@contextmanager
def rehearsing(*, transformer_engine: bool = False) -> Iterator[Rehearsal]:
    """This process has a GPU, or so it seems; and Transformer Engine's layers, where a stand-in for them is installed."""
    from himix_megatron.distributed import fused_kernels, topology
    from himix_megatron.model import micro_batch_graphs

    device = fake_gpu()
    cpu_backend.activate(device)
    mode, attention = Rehearsal(device), triton_attention()
    plain_group, backend = dist.new_group, f"cpu:fake,{device.type}:fake"

    def join(launch: Any, *_: Any) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        mode.gloo.clear()
        dist.init_process_group(backend, store=FakeStore(), rank=launch.rank, world_size=launch.world_size)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        group = plain_group(*args, **{**kwargs, "backend": backend})
        if kwargs.get("backend") == "gloo" and group != dist.GroupMember.NON_GROUP_MEMBER:
            mode.gloo.add(group.group_name)
        return group

    usable = fused_kernels.Kernels(
        transformer_engine=transformer_engine, transformer_engine_reason="rehearsal", triton=True,
        fused_adam="torch", fused_adam_reason="rehearsal",
        accumulation_fusion=False, accumulation_fusion_reason="rehearsal",
    )  # fmt: skip
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),  # for which attention in Triton is chosen
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (topology, "_device", lambda launch: device),
            (topology, "_join", join),
            (fused_kernels, "detect", lambda *_: usable),
            (dist, "new_group", new_group),
            (dist.distributed_c10d, "new_group", new_group),
            (dist.ProcessGroup, "_has_hooks", lambda self: False),  # it would warn of each group
            (torch.Tensor, "pin_memory", lambda self: mode.pin(self)),
            (torch.cuda, "synchronize", mode.synchronise),
            (torch.nn.Module, "_apply", moved),
            (FakeTensor, "tolist", lambda self: mode.listed(self)),
            (torch._dynamo.config, "disable", True),
            (micro_batch_graphs, "MAX_GRAPHS", 0),
            *((attention, name, Kernel(mode, getattr(attention, name).fn)) for name in KERNELS),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch.object(FakeTensorMode, "__deepcopy__", lambda self, _: self, create=True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # torch.tensor(..., device=...) makes its tensor on the host, and then copies it before our eyes.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(mode)
        yield mode


def rehearse(mode: Rehearsal, config: Config, rank: int, world_size: int, steps: int = 2) -> list[Wait]:
    """Train so many steps as this rank. Returns: the waits of the last; in the first, things that stay are made and copied."""
    from himix_megatron.distributed import fused_kernels
    from himix_megatron.distributed.launch import Launch
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.resilience.loss_guard import UPDATE
    from himix_megatron.training.builder import build_components
    from himix_megatron.training.train_step import synced_batches, train_step

    launch = Launch(kind="torchrun", rank=rank, world_size=world_size, local_rank=0, host="", port=0)
    topology = init_distributed(config.parallel, seed=1, launch=launch)
    start: Any = SimpleNamespace(
        kernels=fused_kernels.detect(), features=(), held_out=None, held_out_features=(), run_lock=None, ranks=None
    )
    run = build_components(config, start, topology)
    batches = [step_batch(config, topology, number) for number in range(steps)]
    request: Any = SimpleNamespace(stop_requested=False, is_agreed=False)
    coming = synced_batches(run, batches, request)
    for number in range(steps):
        mode.waits.clear()
        mode.started.clear()
        mode.in_step = number > 0
        batch, images = next(coming)
        train_step(config, run, batch, images, lambda loss, finite: UPDATE)
    mode.in_step = False
    waits = list(mode.waits)
    assert run.prefetcher.drain(5)
    shutdown_distributed()
    return waits


def step_batch(config: Config, topology: Any, number: int) -> Any:
    """Two micro-batches of two samples, with two images and one."""
    import numpy as np

    from himix_megatron.data.loading.batch import StepBatch, collate
    from himix_megatron.data.loading.image_table import ImageTable, blank_pixels, image_share
    from himix_megatron.data.loading.plan import START
    from himix_megatron.data.text.chat_template import EncodedText
    from himix_megatron.training.data_setup import reads_of

    def text(length: int) -> EncodedText:
        return EncodedText(np.arange(length), np.arange(length) > length // 2, False, np.zeros(0, np.int64))

    packed, vision = config.data.packs, config.vision
    images = ImageTable.of(vision, [[vision.input_size(40, 20), vision.blank_size], [vision.input_size(20, 40)]])
    micro_batches = tuple(
        collate([text(12), text(8)], [12, 8], images, ["a", "b"], [0, 0], 24 if packed else 12, packed=packed) for _ in range(2)
    )
    reads = reads_of(config, topology)
    whole = ImageTable.joined([images, images])
    share = image_share(whole, vision, reads.image_rank, reads.image_size)
    return StepBatch(
        step=number,
        micro_batches=micro_batches,
        blank=torch.zeros(6, dtype=torch.bool),
        pixels=blank_pixels(whole.images_of(share), vision),
        bad_keys=(),
        after=START,
        is_last=False,
        num_samples=4 * topology.data_size,
    )
