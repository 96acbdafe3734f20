"""Settings in megatron-core's terms: what cannot run here is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from himix_megatron.adapter import ddp_config, optimizer_config, text_multiple
from himix_megatron.config import Config
from himix_megatron.start import prepare
from pipelines.recipes import RECIPES
from tests.runs import small_config


def test_fp8_is_refused_where_it_cannot_run(mixed_dataset: Path, tmp_path: Path) -> None:
    config = small_config(mixed_dataset, tmp_path, parts=("vision_kv",), precision="bf16")
    config = replace(config, train=replace(config.train, fp8="hybrid"))
    with pytest.raises(ValueError, match=r"train\.fp8 is hybrid, which is Transformer Engine's, but .*: use --train\.fp8 none"):
        prepare(config, 1)
    with pytest.raises(ValueError, match=r"train\.fp8 is hybrid, .* use --train\.precision bf16"):
        replace(config.train, precision="fp32")


def test_texts_are_padded_to_what_their_products_need() -> None:
    def multiple(fp8: str, **layout: object) -> int:
        config = RECIPES["llama3_2_1b_align"]()
        return text_multiple(replace(config, train=replace(config.train, fp8=fp8), parallel=replace(config.parallel, **layout)))

    assert multiple("none", tensor=2) == 1
    assert multiple("none", tensor=2, sequence=True) == 2
    assert multiple("hybrid", tensor=2, sequence=True) == 32


@pytest.mark.parametrize(("overlap", "wanted"), [("auto", torch.cuda.is_available()), ("on", True), ("off", False)])
def test_communication_overlaps_the_passes_where_there_is_a_gpu(overlap: str, wanted: bool) -> None:
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
