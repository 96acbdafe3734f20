"""Settings in megatron-core's terms: what cannot run here is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from himix_megatron.config import Config, from_json, to_json
from himix_megatron.distributed.fused_kernels import detect
from himix_megatron.distributed.megatron_config import (
    attention_core,
    check_fp8,
    check_graphs,
    ddp_config,
    has_fused_loss,
    kernel_lines,
    optimizer_config,
    overlaps,
    text_multiple,
    transformer_config,
)
from himix_megatron.training.data_setup import prepare_inputs
from pipelines.recipes import RECIPES
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config


def test_fp8_is_refused_where_it_cannot_run(mixed_dataset: Path, tmp_path: Path) -> None:
    config = small_config(mixed_dataset, tmp_path, parts=("vision_kv",), precision="bf16")
    config = replace(config, train=replace(config.train, fp8="tensorwise"))
    with pytest.raises(ValueError, match=r"fp8 is tensorwise, which is Transformer Engine's, but .*: use --train\.fp8 none"):
        prepare_inputs(config, 1)
    with pytest.raises(ValueError, match=r"train\.fp8 is tensorwise, .* use --train\.precision bf16"):
        replace(config.train, precision="fp32")


WITH_TE = replace(
    detect(False), transformer_engine=True, transformer_engine_reason="Transformer Engine found"
)  # as if, wherever this runs


def refusal(fp8: Any, *, capability: tuple[int, int] | None, cuda: str = "13.0", layer_spec: Any = "te", **model: Any) -> str:
    """Why FP8 cannot be used on such a GPU (None: there is none); empty if it can."""
    recipe = RECIPES["llama3_2_1b_align"]()
    config = replace(recipe, model=replace(recipe.model, layer_spec=layer_spec, **model), train=replace(recipe.train, fp8=fp8))
    with (
        patch("torch.cuda.is_available", return_value=capability is not None),
        patch("torch.cuda.get_device_capability", return_value=capability),
        patch("torch.version.cuda", cuda),
    ):
        try:
            check_fp8(config, WITH_TE)
        except ValueError as error:
            return str(error)
    return ""


def test_fp8_is_judged_by_the_gpu_and_the_widths() -> None:
    for fp8 in ("tensorwise", "blockwise"):
        assert refusal(fp8, capability=(9, 0)) == ""
        assert "there is no GPU with FP8 here" in refusal(fp8, capability=(8, 0))
        assert "there is no GPU with FP8 here" in refusal(fp8, capability=None)
        assert "but model.layer_spec is torch, or there is no CUDA device" in refusal(
            fp8, capability=(9, 0), layer_spec="torch"
        )
        assert "but model.ffn_hidden_size / parallel.tensor is 8200" in refusal(fp8, capability=(9, 0), ffn_hidden_size=8200)
    assert refusal("tensorwise", capability=(8, 9), cuda="12.4") == ""
    for capability, cuda in (((9, 0), "12.8"), ((8, 9), "13.0")):
        told = refusal("blockwise", capability=capability, cuda=cuda)
        assert f"here they are {capability[0]}.{capability[1]} and {cuda}: use --train.fp8 tensorwise" in told


@pytest.mark.parametrize(
    ("fp8", "wanted"), [("none", None), ("tensorwise", ("hybrid", "tensorwise")), ("blockwise", ("e4m3", "blockwise"))]
)
def test_fp8_keeps_no_state(fp8: Any, wanted: tuple[str, str] | None) -> None:
    """Delayed scaling, megatron-core's default, keeps one that Transformer Engine does not load."""
    config = RECIPES["llama3_2_1b_align"]()
    found = transformer_config(replace(config, train=replace(config.train, fp8=fp8)), detect(False))
    assert (found.fp8 and (found.fp8, found.fp8_recipe)) == wanted
    assert not found.fp8_param
    assert not found.fp8_dot_product_attention


def test_a_stored_run_with_delayed_scaling_is_read_as_tensorwise() -> None:
    config = RECIPES["llama3_2_1b_align"]()
    old = to_json(replace(config, train=replace(config.train, fp8="hybrid")))  # type: ignore[arg-type]
    old = old.replace('"layer_spec"', '"attention"')
    assert from_json(old) == replace(config, train=replace(config.train, fp8="tensorwise"))


def answers_in(config: Config) -> tuple[Any, ...]:
    """What an Answerer makes of a run's settings, and an answer of its."""
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.inference.generator import Answerer, Prompt
    from himix_megatron.model.himix_model import unwrap_model

    topology = init_distributed(config.parallel, seed=1)
    answerer = Answerer(config, detect(), topology)
    (answer,) = answerer.answer([Prompt(np.arange(5), ())], (), 2)
    shutdown_distributed()
    return answerer.config.train.fp8, unwrap_model(answerer.model_chunks[0]).config.fp8, len(answer)


def test_runs_in_fp8_answer_in_bf16(mixed_dataset: Path, tmp_path: Path) -> None:
    """One row is too few for FP8, and a machine without it can answer."""
    config = small_config(mixed_dataset, tmp_path, parts=("vision_kv",), precision="bf16")
    config = replace(config, train=replace(config.train, fp8="tensorwise"))
    assert run_ranks(answers_in, 1, config, start_gloo=False) == [("none", None, 2)]


def test_texts_are_padded_to_what_their_products_need() -> None:
    def multiple(fp8: str, **layout: object) -> int:
        config = RECIPES["llama3_2_1b_align"]()
        return text_multiple(replace(config, train=replace(config.train, fp8=fp8), parallel=replace(config.parallel, **layout)))

    assert multiple("none", tensor=2) == 1
    assert multiple("none", tensor=2, sequence=True) == 2
    assert multiple("tensorwise", tensor=2) == multiple("blockwise", tensor=2) == 16
    assert multiple("tensorwise", tensor=2, sequence=True) == 32
    assert multiple("blockwise", tensor=2, sequence=True) == 256


@pytest.mark.parametrize(("overlap", "always"), [("auto", None), ("on", True), ("off", False)])
def test_communication_overlaps_the_passes_where_there_is_a_gpu(overlap: str, always: bool | None) -> None:
    wanted = torch.cuda.is_available() if always is None else always

    def settings(distributed: bool) -> Config:
        config = RECIPES["llama3_2_1b_align"]()
        return replace(config, parallel=replace(config.parallel, overlap=overlap, distributed_optimizer=distributed))

    for distributed in (True, False):
        ddp, optimizer = ddp_config(settings(distributed)), optimizer_config(settings(distributed))
        assert ddp.grad_reduce_in_fp32
        assert ddp.overlap_grad_reduce == wanted
        # Only a distributed optimizer leaves parameters in parts.
        assert ddp.overlap_param_gather == optimizer.overlap_param_gather == (wanted and distributed)


def test_a_trainable_tower_cannot_be_summed_while_the_passes_run(mixed_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parallel\.overlap is on, but the tower trains"):
        small_config(mixed_dataset, tmp_path, parts=("tower",), overlap="on")
    assert not ddp_config(small_config(mixed_dataset, tmp_path, parts=("tower",))).overlap_grad_reduce


def core(
    head_dim: int, *, gpu: bool = True, capability: int = 9, kernels: Any = WITH_TE, precision: Any = "bf16", **model: Any
) -> str:
    """Which attention kernels such a model would be built with."""
    recipe = RECIPES["llama3_2_1b_align"]()
    config = replace(
        recipe, model=replace(recipe.model, head_dim=head_dim, **model), train=replace(recipe.train, precision=precision)
    )
    with (
        patch("torch.cuda.is_available", return_value=gpu),
        patch("torch.cuda.get_device_capability", return_value=(capability, 0)),
    ):
        return attention_core(config, kernels)


def test_attention_kernels_are_chosen_by_what_is_here_and_by_the_head_width() -> None:
    with_both, without_te = replace(WITH_TE, triton=True), replace(WITH_TE, transformer_engine=False, triton=True)
    assert [core(dim, kernels=with_both) for dim in (64, 128, 96)] == ["triton", "te", "te"]
    assert [core(dim, kernels=without_te) for dim in (64, 128, 96)] == ["triton", "triton", "flash"]
    assert core(64, kernels=with_both, precision="fp32") == "te"
    # Nothing has been measured on others than Hopper.
    assert [core(64, kernels=each, capability=8) for each in (with_both, without_te)] == ["te", "flash"]
    assert core(64, kernels=with_both, capability=8, attention_core="triton") == "triton"
    assert core(64, kernels=with_both, gpu=False) == "flash"
    assert core(128, kernels=with_both, attention_core="triton") == "triton"
    assert core(64, kernels=with_both, attention_core="flash") == "flash"
    with pytest.raises(ValueError, match=r"attention_core is te, .*: use --model\.attention-core auto"):
        core(64, kernels=without_te, attention_core="te")
    with pytest.raises(ValueError, match=r"attention_core is triton, which needs .* a head width of 64 or 128, and all"):
        core(96, kernels=with_both, attention_core="triton")


def test_the_log_says_what_a_run_is_computed_with() -> None:
    on_a_gpu = (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        patch.dict("sys.modules", {"transformer_engine.pytorch.cross_entropy": None}),  # where Triton is missing
    )
    config = RECIPES["qwen2_0_5b_instruct"]()
    without_te = replace(WITH_TE, transformer_engine=False, triton=True)
    on_cpu = "layers: torch; attention: torch's, sample by sample; cross-entropy: megatron-core's, in chunks"
    assert kernel_lines(config, detect(False))[-1] == on_cpu
    with on_a_gpu[0], on_a_gpu[1], on_a_gpu[2]:
        assert kernel_lines(config, WITH_TE)[-1].startswith("layers: te; attention: te; cross-entropy: megatron-core's")
        assert kernel_lines(config, without_te)[-1].startswith("layers: torch; attention: triton;")
        assert not has_fused_loss(WITH_TE)


def test_cuda_graphs_are_refused_where_they_cannot_be_recorded() -> None:
    recipe = RECIPES["qwen2_0_5b_instruct"]()
    data = replace(recipe.data, pack_max_text_tokens=8192, pack_max_vision_tokens=23328)
    train = replace(recipe.train, global_batch_samples=None, global_batch_packs=4, cuda_graphs="on")
    config = replace(recipe, data=data, train=train)
    with pytest.raises(ValueError, match=r"there is no GPU here: use --train\.cuda-graphs off"):
        check_graphs(config, WITH_TE)
    with patch("torch.cuda.is_available", return_value=True), patch("torch.cuda.get_device_capability", return_value=(9, 0)):
        check_graphs(config, WITH_TE)
        assert not overlaps(config)
        with pytest.raises(ValueError, match=r"use --train\.precision bf16"):
            check_graphs(replace(config, train=replace(train, precision="fp32")), WITH_TE)
        own = replace(config, model=replace(config.model, layer_spec="torch"))
        with (
            patch("himix_megatron.distributed.megatron_config.has_variable_length", return_value=False),
            pytest.raises(ValueError, match=r"use torch 2\.11 or later"),
        ):
            check_graphs(own, WITH_TE)
    for section, changes in (
        ("parallel", {"tensor": 2}),
        ("parallel", {"pipeline": 2}),
        ("parallel", {"overlap": "on"}),
        ("train", {"trainable_parts": ("vision_kv", "language", "tower")}),
        ("train", {"recompute": "full"}),
        ("train", {"fp8": "tensorwise"}),
    ):
        with pytest.raises(ValueError, match=r"train\.cuda_graphs is on, which .* does not allow: it needs "):
            replace(config, **{section: replace(getattr(config, section), **changes)})
