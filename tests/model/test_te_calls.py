"""What is handed to Transformer Engine is what it takes, by signatures recorded from the real one; it need not be installed."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from himix_megatron.distributed import cpu_backend

cpu_backend.activate_if_needed()

from himix_megatron.distributed.fused_kernels import detect  # noqa: E402
from himix_megatron.model.attention.backends import TransformerEngineMixtureAttention  # noqa: E402
from himix_megatron.model.himix_model import HiMixModel  # noqa: E402
from himix_megatron.model.layer import TransformerEngineSwiGLU  # noqa: E402

from .te_signatures import PACKAGE, RECORD, installed, recorded  # noqa: E402
from .test_training_attention import DIM, LAYOUTS, Sizes, inputs  # noqa: E402

PYTORCH = "transformer_engine.pytorch"
Calls = dict[str, list[dict[str, Any]]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """In Transformer Engine's place one that takes what the real one takes, and notes it, by name."""
    noted: Calls = {}

    def note(name: str, *args: Any, **kwargs: Any) -> None:
        noted.setdefault(name, []).append(recorded()[f"{PYTORCH}.{name}"].bind(*args, **kwargs).arguments)

    def stand_in(name: str, outcome: Callable[..., Tensor]) -> type[nn.Module]:
        class StandIn(nn.Module):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__()
                note(f"{name}.__init__", self, *args, **kwargs)

            def forward(self, *args: Any, **kwargs: Any) -> Tensor:
                note(f"{name}.forward", self, *args, **kwargs)
                return outcome(*args)

        return StandIn

    def parallel_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
        note("cross_entropy.parallel_cross_entropy", *args, **kwargs)
        return args[1].float()

    modules = {name: ModuleType(name) for name in ("transformer_engine", PYTORCH, f"{PYTORCH}.ops", f"{PYTORCH}.cross_entropy")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            above, _, last = name.rpartition(".")
            setattr(modules[above], last, module)
    modules[PYTORCH].DotProductAttention = stand_in("DotProductAttention", lambda query, *_: query.flatten(1))
    modules[f"{PYTORCH}.ops"].SwiGLU = stand_in("ops.SwiGLU", lambda given: given.chunk(2, -1)[0])
    modules[f"{PYTORCH}.cross_entropy"].parallel_cross_entropy = parallel_cross_entropy
    return noted


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_its_attention_is_built_and_called_as_it_can_be(calls: Calls, layout: Any) -> None:
    given = inputs(layout, (4, 2), torch.float32)
    attend = TransformerEngineMixtureAttention(Sizes, layer_number=1)
    attend(*given[:4], layout)
    (built,), (called,) = calls["DotProductAttention.__init__"], calls["DotProductAttention.forward"]
    assert (built["num_attention_heads"], built["kv_channels"], built["num_gqa_groups"]) == (4, DIM, 2)
    assert built["attention_dropout"] == 0
    assert (called["qkv_format"], called["attn_mask_type"]) == ("thd", "padding_causal_bottom_right")
    assert len(called["query_layer"]) == called["cu_seqlens_q"][-1]
    assert len(called["key_layer"]) == len(called["value_layer"]) == called["cu_seqlens_kv"][-1]
    assert called["cu_seqlens_q"].dtype == called["cu_seqlens_kv"].dtype == torch.int32


def test_its_attention_is_built_for_keys_of_other_lengths_than_the_queries(calls: Calls) -> None:
    """ "self" would make masks for the keys from the queries' lengths, where it spells them out: in fp32."""
    TransformerEngineMixtureAttention(Sizes, layer_number=1)
    assert calls["DotProductAttention.__init__"][0].get("attention_type") == "cross"


def test_generation_asks_nothing_of_its_attention(calls: Calls) -> None:
    """cuDNN would build a graph for each number of keys."""
    attend = TransformerEngineMixtureAttention(Sizes, layer_number=1)
    query, key = torch.randn(1, 3, 4, DIM), torch.randn(8, 3, 2, DIM)
    attend.decode(query, key, key, attend.mixture_mask(1, 7, None, query.device))
    assert "DotProductAttention.forward" not in calls


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_its_loss_is_called_as_it_can_be(calls: Calls, num_ranks: int) -> None:
    group = SimpleNamespace(size=lambda: num_ranks)
    model: Any = SimpleNamespace(fuses_loss=True, pg_collection=SimpleNamespace(tp=group))
    HiMixModel.cross_entropy(model, torch.randn(5, 1, 8), torch.zeros(5, 1, dtype=torch.long))
    (called,) = calls["cross_entropy.parallel_cross_entropy"]
    assert called["dist_process_group"] is (None if num_ranks == 1 else group)
    assert called["overwrite_input"]
    HiMixModel.cross_entropy(model, torch.randn(5, 1, 8), torch.full((5, 1), 3))
    assert len(calls["cross_entropy.parallel_cross_entropy"]) == 2


def test_its_activation_is_called_as_it_can_be(calls: Calls) -> None:
    assert TransformerEngineSwiGLU(None)(torch.randn(3, 1, 8)).shape == (3, 1, 4)
    assert [len(calls[f"ops.SwiGLU.{name}"]) for name in ("__init__", "forward")] == [1, 1]


def test_megatron_cores_calls_for_rotary_embeddings_are_what_it_takes() -> None:
    """All of its branches, whatever the version that they are for."""
    core = find_spec("megatron.core")
    assert core is not None
    source = Path(core.submodule_search_locations[0], "extensions", "transformer_engine.py").read_text()
    made = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [node for node in made if isinstance(node.func, ast.Name) and node.func.id == "apply_rotary_pos_emb"]
    assert len(made) >= 2
    for call in made:
        taken = recorded()[f"{PYTORCH}.attention.rope.apply_rotary_pos_emb"]
        taken.bind(*call.args, **{str(keyword.arg): keyword.value for keyword in call.keywords})


@pytest.mark.parametrize("name", ["Linear", "LayerNormLinear"])
def test_its_linear_layers_can_add_gradients_to_their_sums(name: str) -> None:
    """himix_model.py sets the attribute of this name, where there is one, after they are built."""
    assert "fuse_wgrad_accumulation" in recorded()[f"{PYTORCH}.{name}.__init__"].parameters


@pytest.mark.skipif(not detect().transformer_engine, reason=detect().transformer_engine_reason)
def test_the_record_is_what_is_installed() -> None:
    if (version := metadata.version(PACKAGE)) != (of_record := json.loads(RECORD.read_text())[PACKAGE]):
        pytest.skip(f"{PACKAGE} is {version}, the record of {of_record}")
    stored = json.loads(RECORD.read_text())["callables"]
    assert stored == json.loads(json.dumps(installed()))
