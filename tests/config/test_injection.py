"""The choices of how vision enters the decoder: what contradicts itself is one line that says what to write instead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from himix_megatron.config import METHODS, Config, InjectionConfig, ParallelConfig, from_json, to_json
from himix_megatron.distributed.megatron_config import check_optimizer
from pipelines.cli import parse
from pipelines.recipes import RECIPES, TINY, tiny_align


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_every_method(recipe: str, method: str) -> None:
    config = parse([recipe, "--method", method])
    assert config.injection == METHODS[method](config.model)
    assert from_json(to_json(config)) == config


def test_himix_is_the_default() -> None:
    assert METHODS["himix"](TINY) == InjectionConfig() == tiny_align().injection


PUBLISHED = {"vica": (32, (0, 1, 7, 8, 9, 10, 11, 14)), "mplug_owl3": (28, (6, 14, 22, 25))}


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_published_layers_come_out_at_the_published_depth(method: str) -> None:
    num_layers, layers = PUBLISHED[method]
    assert METHODS[method](replace(TINY, num_layers=num_layers)).injecting_layers(num_layers) == layers


MISTAKES = {
    "--method nothing": "--method is nothing: wanted one of himix, saisa",
    "--method tokens --injection.visibility all": "where vision is read as text is: use --injection.visibility earlier",
    "--method tokens --injection.layers 1": "injection.layers is 1, but injection.fusion is tokens, .* no --injection.layers",
    "--method tokens --injection.gate tanh": "adds nothing that could have a gate: use --injection.gate none",
    "--injection.fusion separate": "would disturb the text unless gated: use --injection.gate tanh or zero",
    "--injection.fusion block --injection.norm none": "has gates that start at 0: use --injection.gate tanh",
    "--injection.local-text": "injection.local_text is on, .* use no --injection.local-text",
    "--injection.layers 2 1": "injection.layers is 2 1: wanted rising numbers",
    "--injection.layers 1 --injection.every-layers 2": "are both given: choose one",
    "--injection.layers 4": "names layer 4, but model.num_layers is 4, and they count from 0",
    "--injection.every-layers 5": "no layer would inject",
    "--injection.keys-values text --vision.hidden-size 64": "use --injection.adapter shared or per_layer",
    "--vision.feature-layers -1 -2 --injection.layers 1": "2 hidden states for 1 injecting layers",
    "--vision.feature-layers -1 -3": "vision.feature_layers is -3: wanted -2 to -1",
    "--method tokens --vision.feature-layers -2 -1": "takes one hidden state of the tower",
    "--method vica --parallel.pipeline 2 --parallel.overlap on": "vision's shared parts train: .* --parallel.overlap auto",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_contradiction_is_one_line_with_its_remedy(words: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[words]) as mistake:
        parse(["tiny_align", *words.split()])
    assert "\n" not in str(mistake.value)


def test_one_way_of_naming_layers_takes_the_place_of_the_other() -> None:
    assert parse(["tiny_align", "--method", "vica", "--injection.every-layers", "2"]).injection.layers == ()
    assert parse(["tiny_align", "--method", "llama3_2_vision", "--injection.layers", "1", "2"]).injection.every_layers == 1


def with_layout(method: str, **parallel: int | bool) -> Config:
    config = tiny_align()
    return replace(config, injection=METHODS[method](config.model), parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["tokens", "vica", "llama3_2_vision"])
def test_a_distributed_optimizer_needs_something_to_train_on_every_stage(method: str) -> None:
    with pytest.raises(ValueError, match=r"nothing trains on pipeline stage [01], which takes up no vision: use"):
        check_optimizer(with_layout(method, pipeline=2, distributed_optimizer=True))
    check_optimizer(with_layout(method, pipeline=2))
    check_optimizer(with_layout("himix", pipeline=2, distributed_optimizer=True))


def test_gradients_that_are_summed_over_replicas_are_not_reduced_before() -> None:
    assert with_layout("vica", pipeline=2).sums_replicas
    assert not with_layout("vica").sums_replicas, "one chunk has them alone"
    assert not with_layout("himix", pipeline=2).sums_replicas
