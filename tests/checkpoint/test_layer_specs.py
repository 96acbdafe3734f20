"""Checkpoints and converted models load under either layer spec, whatever extra states their modules have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.checkpoint import checkpointer as checkpoints
from himix_megatron.checkpoint.description import Position
from himix_megatron.checkpoint.manifest import find_checkpoint
from himix_megatron.config import RunConfig, to_json
from himix_megatron.conversion.checkpoint_io import read_config
from himix_megatron.data.loading.plan import START
from himix_megatron.distributed.fused_kernels import detect
from tests.model.te_keys import RECORD, as_with_gpu, described
from tests.support.model_folders import LANGUAGE, make_language, make_tower
from tests.support.ranks import run_ranks
from tools import conversions, convert


class Stateful(torch.nn.Module):
    """Has an extra state, and no parameters, as Transformer Engine's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.put: list[Any] = []

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([1, 2], dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        self.put.append(state)


def test_only_extra_states_may_be_missing() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), Stateful())
    weights = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3)}
    checkpoints.put_weights(module, weights)
    assert torch.equal(module[0].weight, torch.ones(3, 2))
    assert module[1].put == []
    for wrong, named in (
        ({"0.weight": weights["0.weight"]}, r"weights do not fit Sequential: missing: 0\.bias"),
        (weights | {"2.weight": torch.ones(1)}, r"superfluous: 2\.weight"),
        (weights | {"0.bias": torch.ones(4)}, r"size mismatch for 0\.bias"),
    ):
        with pytest.raises(RuntimeError, match=named):
            checkpoints.put_weights(module, wrong)


def test_the_torch_spec_covers_what_the_te_spec_describes() -> None:
    """But for the extra states, which are not saved."""
    recorded = json.loads(RECORD.read_text())["keys"]
    wanted = {key: shape for key, shape in recorded.items() if shape is not None}
    assert len(recorded) - len(wanted) == 7
    (found,) = run_ranks(described, 1, "torch", start_gloo=False)
    assert {key: shape for key, shape in found.items() if shape is not None} == wanted


@pytest.mark.skipif(not detect().transformer_engine, reason=detect().transformer_engine_reason)
def test_the_record_of_the_te_spec_is_up_to_date() -> None:
    (found,) = run_ranks(described, 1, "te", start_gloo=False)
    assert found == json.loads(RECORD.read_text())["keys"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("converted")
    language = make_language(room / "language", **LANGUAGE["qwen2, untied, two shards"])
    conversions.hf_to_himix(convert.HfToHimix(language=language, vision=make_tower(room / "tower"), out=room / "run"))
    return find_checkpoint(str(room / "run"))


def add_extra_states(model: Any) -> None:
    """Give a model of the torch spec what Transformer Engine's has beyond it."""
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.core = Stateful()


def leave(model: Any) -> None:
    pass


def make_moments(optimizer: Any) -> None:
    """A step whose gradients are zero moves nothing, and leaves the optimizer with all of its state."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()


def load_and_save(checkpoint: Path, run: Path, attention: str, change: Callable[[Any], None], old_way: bool) -> dict[str, Any]:
    """Load a checkpoint into a model, and save that, twice: as weights of a fresh run, and to continue from.

    `old_way`: save extra states too, as was done once. Returns: the model's parameters.
    """
    from himix_megatron.checkpoint.run_lock import acquire
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.model.himix_model import build_model_chunks, unwrap_model
    from himix_megatron.model.towers import build_tower
    from himix_megatron.training.optimizer import build_optimizer

    config = replace(read_config(checkpoint), run=RunConfig(dir=str(run)))
    config = replace(config, model=replace(config.model, layer_spec=attention))
    run.mkdir()
    (run / "config.json").write_text(to_json(config))
    topology = init_distributed(config.parallel, seed=1)
    tower = build_tower(config.vision, seed=1, dtype=torch.float32)
    kernels = detect()
    with as_with_gpu(attention):
        model_chunks = build_model_chunks(config, kernels, topology, tower)
    change(unwrap_model(model_chunks[0]))
    own = checkpoints.Checkpoints(config, model_chunks, build_optimizer(config, model_chunks), tower, acquire(run))
    own.load_weights(checkpoint)
    make_moments(own.optimizer)
    assert own._checkpoint_bytes() > 0
    if old_way:
        checkpoints._EXTRA_STATE = "nothing ends like this"
    own.save(Position(step=1, place=START, data={}))
    own.finish()
    checkpoints._EXTRA_STATE = "_extra_state"
    for parameter in unwrap_model(model_chunks[0]).parameters():
        parameter.data.zero_()
    assert own.restore(run / "checkpoints" / "step-00000001").step == 1
    own.close()
    # As bytes, which a rank can hand on; the type is in them.
    weights = {name: tensor.detach().clone().numpy() for name, tensor in unwrap_model(model_chunks[0]).named_parameters()}
    shutdown_distributed()
    return weights


def keys(checkpoint: Path) -> set[str]:
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def same(weights: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return weights.keys() == wanted.keys() and all(weights[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_modules_with_extra_states_read_and_write_checkpoints_without(converted: Path, tmp_path: Path) -> None:
    (plain,) = run_ranks(load_and_save, 1, converted, tmp_path / "plain", "torch", leave, False, start_gloo=False)
    (more,) = run_ranks(load_and_save, 1, converted, tmp_path / "more", "torch", add_extra_states, False, start_gloo=False)
    assert same(more, plain)
    saved = tmp_path / "more" / "checkpoints" / "step-00000001"
    assert not [key for key in keys(converted) | keys(saved) if "_extra_state" in key]
    (back,) = run_ranks(load_and_save, 1, saved, tmp_path / "back", "torch", leave, False, start_gloo=False)
    assert same(back, plain)


def test_an_old_checkpoint_with_extra_states_still_loads(converted: Path, tmp_path: Path) -> None:
    (old,) = run_ranks(load_and_save, 1, converted, tmp_path / "old", "torch", add_extra_states, True, start_gloo=False)
    saved = tmp_path / "old" / "checkpoints" / "step-00000001"
    assert [key for key in keys(saved) if "core_attention.core._extra_state" in key]
    (plain,) = run_ranks(load_and_save, 1, saved, tmp_path / "plain", "torch", leave, False, start_gloo=False)
    assert same(plain, old)


@pytest.mark.skipif(not detect().transformer_engine, reason=detect().transformer_engine_reason)
def test_weights_go_from_spec_to_spec_bit_for_bit(converted: Path, tmp_path: Path) -> None:
    """Converted, then Transformer Engine's and torch's by turns (in memory they name norms differently)."""
    found, source = [], converted
    for number, attention in enumerate(("te", "torch", "te", "torch")):
        run = tmp_path / f"{number}"
        found += run_ranks(load_and_save, 1, source, run, attention, leave, False, start_gloo=False)
        source = run / "checkpoints" / "step-00000001"
    assert same(found[2], found[0])
    assert same(found[3], found[1])
    assert len(found[0]) == len(found[1]) > 20
    assert any(weights.any() for weights in found[0].values())
    assert keys(source) == keys(tmp_path / "0" / "checkpoints" / "step-00000001")
