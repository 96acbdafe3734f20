"""What breaks on a GPU only, a step that mixes devices or that makes the host wait, is found without one: see rehearsal.py.

Budget of a training step: the host waits for the device once in this project's code, whatever the number of layers and
micro-batches, and in megatron-core's where `MEGATRON` says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from himix_megatron.config import METHODS, Config
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.small_runs import native, small_config

from .rehearsal import KERNELS, Kernel, Rehearsal, Wait, rehearse, rehearsing

OWN = ("himix_megatron/training/train_step.py", "count")
MEGATRON = {
    "0.16.1": {
        ("megatron/core/distributed/finalize_model_grads.py", 495): "whether any token had a loss",
        ("megatron/core/optimizer/clip_grads.py", 133): "the gradient's norm",
    },
    # Not where Transformer Engine's kernels are: the norm stays on the device.
    "0.19.2": {("megatron/core/optimizer/clip_grads.py", 138): "the gradient's norm"},
}
"""Once a step each."""
ALIGN: dict[str, Any] = {"parts": ("vision_kv",)}
INSTRUCT: dict[str, Any] = {"parts": ("language", "vision_kv")}
TOWER: dict[str, Any] = {"parts": ("language", "vision_kv", "tower")}
PACKED = {"packed": True}
SHAPES = {"shapes": True}
"""Images of different sizes."""
GRAPHS = {"packed": True, "cuda_graphs": "on"}
WIDE = {"head_dim": 64}
"""Attention is in Triton; else it is flash attention, or Transformer Engine's."""
TENSOR, PIPELINE, DATA = {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"distributed_optimizer": True}
IN_TEXT = INSTRUCT | SHAPES | PIPELINE | {"method": "tokens"}
"""The second stage gets no features."""
NUM_LAYERS = NUM_MICRO_BATCHES = 2


def config_for(
    *,
    packed: bool = False,
    shapes: bool = False,
    cuda_graphs: Any = "off",
    head_dim: int | None = None,
    layer_spec: Any = "torch",
    method: str = "himix",
    **options: Any,
) -> Config:
    """Two layers; steps of two micro-batches of two samples on each data rank."""
    config = small_config(Path("none"), Path("none"), precision="bf16", **options)
    config = native(config) if shapes else config
    model = dataclasses.replace(config.model, num_layers=NUM_LAYERS, head_dim=head_dim, layer_spec=layer_spec)
    data = dataclasses.replace(config.data, max_text_tokens=24)
    train = dataclasses.replace(config.train, cuda_graphs=cuda_graphs)
    if packed:
        data = dataclasses.replace(data, pack_max_text_tokens=24, pack_max_vision_tokens=16)
        train = dataclasses.replace(train, global_batch_samples=None, global_batch_packs=4, micro_batch_samples=1)
    return dataclasses.replace(config, model=model, data=data, train=train, injection=METHODS[method](model))


def waits_of(mode: Rehearsal, case: dict[str, Any], rank: int = 0, world_size: int = 1) -> list[Wait]:
    """Of the case's step, in which each kernel in Triton is started as often as it should be."""
    waits = rehearse(mode, config_for(**case), rank, world_size)
    passes = NUM_LAYERS * NUM_MICRO_BATCHES if "head_dim" in case else 0
    # The queries of a frozen decoder's first layer need no gradient.
    of_queries = passes // NUM_LAYERS * (NUM_LAYERS - ("language" not in case["parts"]))
    assert mode.started == Counter(dict.fromkeys(KERNELS, passes) | {"_backward_of_queries": of_queries}), (case, mode.started)
    return waits


def waits_of_all() -> list[tuple[str, list[Wait]]]:
    """For `run_ranks` on 2 ranks. The waits of each case: of this rank in each layout, and of runs of one rank."""
    rank = int(os.environ["RANK"])
    alone = (ALIGN, INSTRUCT | GRAPHS) if rank == 0 else (ALIGN | PACKED, INSTRUCT, TOWER)
    cases = [(case, 0, 1) for case in alone]
    divided = (ALIGN | TENSOR, ALIGN | PIPELINE, INSTRUCT | PACKED | PIPELINE, ALIGN | SHAPES | PIPELINE, IN_TEXT)
    in_triton = (ALIGN | DATA | WIDE, INSTRUCT | GRAPHS | DATA | WIDE, INSTRUCT | PACKED | TENSOR | WIDE)
    cases += [(case, rank, 2) for case in (*divided, *in_triton)]
    with rehearsing() as mode:
        return [(f"{case} rank {number}", waits_of(mode, case, number, size)) for case, number, size in cases]


def places(waits: list[Wait]) -> Counter[tuple[str, Any]]:
    """How often the host waits where: this project's functions, megatron-core's lines."""
    return Counter((wait.file, wait.function if wait.file.startswith("himix") else wait.line) for wait in waits)


def accepted() -> Counter[tuple[str, Any]]:
    """Of a step."""
    from megatron.core import __version__

    return Counter([OWN, *MEGATRON[__version__.split("+")[0]]])  # some wheels name their commit behind it


def test_a_step_keeps_to_the_device_and_waits_once() -> None:
    for name, waits in itertools.chain(*run_ranks(waits_of_all, 2, start_gloo=False)):
        assert places(waits) == accepted(), f"{name}: {'; '.join(map(str, waits))}"


def test_what_is_on_the_device_already_is_not_pinned_again() -> None:
    from himix_megatron.model.stage_input import to_device

    there = torch.zeros(3, device="meta")  # pinning anything but memory of the host is an error
    assert to_device(there, torch.device("meta")) is there


# ---- that it would be found ----------------------------------------------------------------------------------------


@contextmanager
def not_moved() -> Iterator[None]:
    """The layout of a micro-batch stays on the host."""
    from himix_megatron.model.attention import packed_layout

    move = packed_layout._to
    with patch.object(packed_layout, "_to", lambda _, arrays: move(torch.device("cpu"), arrays)):
        yield


@contextmanager
def reads_in_attention() -> Iterator[None]:
    """Each layer looks at a number."""
    from himix_megatron.model.attention.backends import TorchMixtureAttention

    attend = TorchMixtureAttention.forward

    def forward(self: Any, query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        assert query.sum().item() is not None
        return attend(self, query, *others, **named)

    with patch.object(TorchMixtureAttention, "forward", forward):
        yield


@contextmanager
def reads_in_loss() -> Iterator[None]:
    """Each micro-batch's loss asks whether it has tokens."""
    from himix_megatron.model import himix_model

    plain = himix_model.token_losses

    def token_losses(hidden: torch.Tensor, labels: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        assert bool((labels >= 0).any())
        return plain(hidden, labels, *others, **named)

    with patch.object(himix_model, "token_losses", token_losses):
        yield


@contextmanager
def finds_labels() -> Iterator[None]:
    """The loss looks for the tokens that count."""
    from himix_megatron.model import himix_model

    plain = himix_model.token_losses
    with patch.object(himix_model, "token_losses", lambda *given, labelled, **named: plain(*given, labelled=None, **named)):
        yield


@contextmanager
def not_pinned() -> Iterator[None]:
    """The images come from ordinary memory."""
    from himix_megatron.training import train_step

    with patch.object(train_step, "pinned", lambda batch: batch):
        yield


@contextmanager
def reads_in_triton() -> Iterator[None]:
    """Each layer looks at a number before it starts a kernel."""
    from himix_megatron.model.attention import triton_attention

    attend = triton_attention.forward
    with patch.object(triton_attention, "forward", lambda query, *others: (query.sum().item(), attend(query, *others))[1]):
        yield


@contextmanager
def samples_on_host() -> Iterator[None]:
    """Where samples lie, which only kernels in Triton read, stays on the host."""
    from himix_megatron.model import himix_model

    def make_layout(*given: Any, **named: Any) -> Any:
        layout = plain(*given, **named)
        return dataclasses.replace(layout, samples=torch.zeros(layout.samples.shape, dtype=torch.int32))

    plain = himix_model.make_layout
    with patch.object(himix_model, "make_layout", make_layout):
        yield


@contextmanager
def pads_from_host() -> Iterator[None]:
    """What a micro-batch is padded with comes from the host."""
    from himix_megatron.model import micro_batch_graphs

    pad = torch.nn.functional.pad
    own = SimpleNamespace(pad=lambda given, by, **named: pad(given, by, **named) + torch.zeros(1))
    with patch.object(micro_batch_graphs, "F", own):
        yield


MISTAKES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "none": (nullcontext, ALIGN),
    "not moved": (not_moved, ALIGN),
    "reads in attention": (reads_in_attention, ALIGN),
    "reads in loss": (reads_in_loss, ALIGN),
    "finds labels": (finds_labels, ALIGN),
    "not pinned": (not_pinned, ALIGN),
    "reads in triton": (reads_in_triton, ALIGN | WIDE),
    "samples on host": (samples_on_host, ALIGN | WIDE),
    "pads from host": (pads_from_host, ALIGN | GRAPHS),
}
"""And in which case."""


def with_mistakes() -> dict[str, list[Wait] | str]:
    """For `run_ranks`. What is found of each mistake: waits, or an error."""
    found: dict[str, list[Wait] | str] = {}
    with rehearsing() as mode:
        for name, (mistake, case) in MISTAKES.items():
            try:
                with mistake():
                    found[name] = waits_of(mode, case)
            except (RuntimeError, AssertionError):
                found[name] = traceback.format_exc()
                mode.leave()
    return found


def test_mistakes_are_found_with_their_places() -> None:
    found = run_ranks(with_mistakes, 1, start_gloo=False)[0]
    more = {name: places(waits) - accepted() for name, waits in found.items() if not isinstance(waits, str)}
    each_layer, each_micro_batch = NUM_LAYERS * NUM_MICRO_BATCHES, NUM_MICRO_BATCHES
    assert more.pop("none") == Counter()
    assert more.pop("reads in attention") == {("himix_megatron/model/attention/mixture_attention.py", "_mix"): each_layer}
    assert more.pop("reads in loss") == {("himix_megatron/model/himix_model.py", "_postprocess"): each_micro_batch}
    assert more.pop("reads in triton") == {("himix_megatron/model/attention/triton_attention.py", "forward"): each_layer}
    assert more.pop("not pinned") == {("himix_megatron/model/vision_encoder.py", "encode"): 1}
    assert not more
    for name, place in (("not moved", "himix_megatron/model/attention/packed_layout.py"), ("pads from host", "in padded")):
        assert re.search("same device|two different devices", found[name])  # as versions of torch say it
        assert place in found[name]
    assert "aten.nonzero.default at himix_megatron/model/loss.py" in found["finds labels"]
    assert "AssertionError: _forward: samples_at is tensor(" in found["samples on host"]


def test_a_kernel_is_started_as_it_is_written() -> None:
    def copy(from_at: Any, size: Any, M: Any) -> None: ...

    kernel, given = Kernel(Rehearsal(torch.device("cpu")), copy), torch.ones(1)
    kernel[(1, 2)](given, 4, M=16, num_warps=4)
    with pytest.raises(AssertionError, match="copy: from_at is tensor"):
        kernel[(1,)](given.to("meta"), 4, M=16)
    with pytest.raises(AssertionError, match="copy: size is tensor"):
        kernel[(1,)](given, given.sum(), M=16)
    with pytest.raises(AssertionError, match=r"copy: \(tensor"):
        kernel[(given.sum(),)]
    with pytest.raises(TypeError, match="missing a required argument: 'M'"):
        kernel[(1,)](given, 4, N=16)


# ---- Transformer Engine's layers -----------------------------------------------------------------------------------


def test_transformer_engines_layers_are_called_as_recorded() -> None:
    root, environment = ROOT, {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.model.te_stand_in"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    passes = NUM_LAYERS * NUM_MICRO_BATCHES * 2  # of two steps
    for case, waits, calls in json.loads(done.stdout.splitlines()[-1]):
        assert places([Wait(*wait) for wait in waits]) == accepted(), f"{case}: {waits}"
        forward = {name: number for name, number in calls.items() if not name.endswith("__init__")}
        assert forward.pop("DotProductAttention.forward", 0) == (0 if "head_dim" in case else passes), case
        assert forward == {
            "LayerNormLinear.forward": 2 * passes,  # queries, keys and values; gate and up
            "attention.rope.apply_rotary_pos_emb": 2 * passes,
            "Linear.forward": 2 * passes,
            "ops.SwiGLU.forward": passes,
            "RMSNorm.forward": passes // NUM_LAYERS,
            "cross_entropy.parallel_cross_entropy": passes // NUM_LAYERS,
        }, case


def test_a_call_that_does_not_fit_the_record_is_an_error() -> None:
    from .te_stand_in import Linear

    with pytest.raises(TypeError, match=r"pytorch\.Linear\.__init__.*got an unexpected keyword argument 'width'"):
        Linear(in_features=1, out_features=1, width=1)
