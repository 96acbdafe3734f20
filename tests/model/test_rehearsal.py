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
from typing import Any
from unittest.mock import patch

import pytest
import torch

from himix_megatron.config import Config
from tests.distributed import run_ranks
from tests.model.rehearsal import Wait, rehearse, rehearsing
from tests.runs import small_config

OWN = ("himix_megatron/steps.py", "count")
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
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"distributed_optimizer": True},
)
NUM_LAYERS = NUM_MICRO_BATCHES = 2


def config_for(*, packed: bool = False, **options: Any) -> Config:
    """Two layers; steps of two micro-batches of two samples on each data rank."""
    config = small_config(Path("none"), Path("none"), precision="bf16", **options)
    data, train = dataclasses.replace(config.data, max_text_tokens=24), config.train
    if packed:
        data = dataclasses.replace(data, pack_text_tokens=24, pack_images=4)
        train = dataclasses.replace(train, global_batch_samples=None, global_batch_packs=4, micro_batch_samples=1)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=NUM_LAYERS), data=data, train=train)


def waits_of_all() -> list[tuple[str, list[Wait]]]:
    """For `run_ranks` on 2 ranks. The waits of each case: of this rank in each layout, and of runs of one rank."""
    rank = int(os.environ["RANK"])
    alone = (ALIGN, INSTRUCT | PACKED) if rank == 0 else (ALIGN | PACKED, INSTRUCT, TOWER)
    cases = [(case, 0, 1) for case in alone]
    cases += [(case | layout, rank, 2) for layout in LAYOUTS for case in (ALIGN, INSTRUCT | PACKED)]
    with rehearsing() as mode:
        return [(f"{case} rank {number}", rehearse(mode, config_for(**case), number, size)) for case, number, size in cases]


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


# ---- that it would be found ----------------------------------------------------------------------------------------


@contextmanager
def not_moved() -> Iterator[None]:
    """The layout of a micro-batch stays on the host."""
    from himix_megatron.model import layout

    move = layout._to
    with patch.object(layout, "_to", lambda _, arrays: move(torch.device("cpu"), arrays)):
        yield


@contextmanager
def reads_in_attention() -> Iterator[None]:
    """Each layer looks at a number."""
    from himix_megatron.model.attention_backends import TorchMixtureAttention

    attend = TorchMixtureAttention.forward

    def forward(self: Any, query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        assert query.sum().item() is not None
        return attend(self, query, *others, **named)

    with patch.object(TorchMixtureAttention, "forward", forward):
        yield


@contextmanager
def reads_in_loss() -> Iterator[None]:
    """Each micro-batch's loss asks whether it has tokens."""
    from himix_megatron.model import himix

    plain = himix.token_losses

    def token_losses(hidden: torch.Tensor, labels: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        assert bool((labels >= 0).any())
        return plain(hidden, labels, *others, **named)

    with patch.object(himix, "token_losses", token_losses):
        yield


@contextmanager
def finds_labels() -> Iterator[None]:
    """The loss looks for the tokens that count."""
    from himix_megatron.model import himix

    plain = himix.token_losses
    with patch.object(himix, "token_losses", lambda *given, labelled, **named: plain(*given, labelled=None, **named)):
        yield


@contextmanager
def not_pinned() -> Iterator[None]:
    """The images come from ordinary memory."""
    from himix_megatron import steps

    with patch.object(steps, "pinned", lambda batch: batch):
        yield


MISTAKES: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "not moved": not_moved,
    "reads in attention": reads_in_attention,
    "reads in loss": reads_in_loss,
    "finds labels": finds_labels,
    "not pinned": not_pinned,
}


def with_mistakes() -> dict[str, list[Wait] | str]:
    """For `run_ranks`. What is found of each mistake: waits, or an error."""
    found: dict[str, list[Wait] | str] = {}
    with rehearsing() as mode:
        for name, mistake in MISTAKES.items():
            try:
                with mistake():
                    found[name] = rehearse(mode, config_for(**ALIGN), 0, 1)
            except (RuntimeError, AssertionError):
                found[name] = traceback.format_exc()
                mode.leave()
    return found


def test_mistakes_are_found_with_their_places() -> None:
    found = run_ranks(with_mistakes, 1, start_gloo=False)[0]
    more = {name: places(waits) - accepted() for name, waits in found.items() if not isinstance(waits, str)}
    each_layer, each_micro_batch = NUM_LAYERS * NUM_MICRO_BATCHES, NUM_MICRO_BATCHES
    assert more.pop("none") == Counter()
    assert more.pop("reads in attention") == {("himix_megatron/model/mixture_attention.py", "forward"): each_layer}
    assert more.pop("reads in loss") == {("himix_megatron/model/himix.py", "_postprocess"): each_micro_batch}
    assert more.pop("not pinned") == {("himix_megatron/model/encoder.py", "encode"): 2}
    assert not more
    assert re.search("same device|two different devices", found["not moved"])  # as versions of torch say it
    assert "himix_megatron/model/layout.py" in found["not moved"]
    assert "aten.nonzero.default at himix_megatron/loss.py" in found["finds labels"]


# ---- Transformer Engine's layers -----------------------------------------------------------------------------------


def test_transformer_engines_layers_are_called_as_recorded() -> None:
    root, environment = Path(__file__).parents[2], {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.model.te_stand_in"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    passes = NUM_LAYERS * NUM_MICRO_BATCHES * 2  # of two steps
    for case, waits, calls in json.loads(done.stdout.splitlines()[-1]):
        assert places([Wait(*wait) for wait in waits]) == accepted(), f"{case}: {waits}"
        forward = {name: number for name, number in calls.items() if not name.endswith("__init__")}
        assert forward == {
            "LayerNormLinear.forward": 2 * passes,  # queries, keys and values; gate and up
            "attention.rope.apply_rotary_pos_emb": 2 * passes,
            "DotProductAttention.forward": passes,
            "Linear.forward": 2 * passes,
            "ops.SwiGLU.forward": passes,
            "RMSNorm.forward": passes // NUM_LAYERS,
            "cross_entropy.parallel_cross_entropy": passes // NUM_LAYERS,
        }, case


def test_a_call_that_does_not_fit_the_record_is_an_error() -> None:
    from tests.model.te_stand_in import Linear

    with pytest.raises(TypeError, match=r"pytorch\.Linear\.__init__.*got an unexpected keyword argument 'width'"):
        Linear(in_features=1, out_features=1, width=1)
