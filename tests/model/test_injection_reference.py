"""The reference that every way of vision into the decoder is held against: its two forms agree, and HiMix is the authors'."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from himix_megatron.config import METHODS, ModelConfig
from himix_megatron.conversion.authors_layout import from_authors, to_authors
from tests.support import ROOT
from tests.support.injection_points import CHOICES, PARTS, Case, point_case, preset_case
from tests.support.injection_reference import IGNORED, PRESETS, Image, Outcome, Sample, drawn_weights, outcome
from tools.compare_reference import Arguments, configuration, read

FILES = sorted((ROOT / "tests" / "data" / "reference").glob("*.safetensors"))


def random_features(case: Case) -> list[list[Tensor]]:
    """Of each sample's images."""
    generator = torch.Generator().manual_seed(case.seed)
    width = case.config.vision.feature_width
    return [[torch.randn(i.rows * i.columns, width, generator=generator) for i in s.images] for s in case.samples]


def largest_difference(found: Outcome, wanted: Outcome) -> float:
    """Of logits, loss and all gradients, absolute."""
    assert found.gradients.keys() == wanted.gradients.keys()
    pairs = [(torch.tensor(found.loss), torch.tensor(wanted.loss)), *zip(found.logits, wanted.logits, strict=True)]
    pairs += [(found.gradients[name], wanted.gradients[name]) for name in wanted.gradients]
    pairs += zip(found.of_features, wanted.of_features, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("method", METHODS)
def test_the_general_form_is_each_methods_own_equations(method: str, packed: bool) -> None:
    case = preset_case(method, packed=packed)
    given = (case.config, drawn_weights(case.config, case.seed), case.samples, random_features(case))
    own, general = outcome(*given, PRESETS[method]), outcome(*given)
    assert largest_difference(general, own) < 1e-12
    assert all(float(gradient.norm()) > 1e-6 for gradient in own.gradients.values()), "nothing hides behind a zero"


@pytest.mark.slow  # reading a model's sizes imports transformers
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_himix_is_the_authors(file: str) -> None:
    reference = read(file)  # type: ignore[arg-type]
    config = configuration(Arguments(file=file), reference)  # type: ignore[arg-type]
    model: ModelConfig = config.model
    ids, labels, mask = (reference.tensors[name] for name in ("input_ids", "labels", "attention_mask"))
    lengths = mask.sum(1).tolist()
    samples = [
        Sample(tuple(ids[row, :n].tolist()), (*labels[row, 1:n].tolist(), IGNORED), (Image(1, vision.shape[0], 0),))
        for row, (n, vision) in enumerate(zip(lengths, reference.tensors["vision"], strict=True))
    ]
    weights = {on_disk(name): tensor for name, tensor in from_authors(reference.weights, model).items()}
    found = outcome(config, weights, samples, [[vision] for vision in reference.tensors["vision"]])
    for row, logits in enumerate(found.logits):
        assert (logits - reference.tensors["logits"][row, : len(logits)]).abs().max() < 1e-5
    assert found.loss == pytest.approx(float(reference.tensors["loss"]), abs=1e-6)
    gradients = to_authors({in_memory(name): gradient for name, gradient in found.gradients.items()}, model)
    for name, wanted in reference.gradients.items():
        assert (gradients[name] - wanted).norm() < 2e-6 * wanted.norm(), name


def on_disk(name: str) -> str:
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def in_memory(name: str) -> str:
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def test_random_points_reach_every_choice() -> None:
    seen: Counter[tuple[str, object]] = Counter()
    for number in range(60):
        case = point_case(1, number)
        injection = case.config.injection
        seen.update((name, getattr(injection, name)) for name in ("fusion", *CHOICES))
        seen.update([("layers", bool(injection.layers)), ("every", injection.every_layers > 1)])
        seen.update([("levels", len(case.config.vision.levels)), ("tower", case.config.vision.tower)])
        seen.update([("parts", case.config.train.trainable_parts)])
        seen.update(("images", min(len(sample.images), 3)) for sample in case.samples)
    wanted = {(name, value) for name, values in CHOICES.items() for value in values}
    wanted |= {("fusion", fusion) for fusion in ("joint", "separate", "block", "tokens")}
    wanted |= {("layers", True), ("every", True), *(("levels", n) for n in (1, 2, 3)), *(("images", n) for n in range(4))}
    wanted |= {("parts", parts) for parts in PARTS}
    assert not wanted - seen.keys()
    assert point_case(1, 0) == point_case(1, 0) != point_case(2, 0)


def test_random_points_have_a_gradient_everywhere() -> None:
    for number in range(10):
        case = point_case(2, number)
        found = outcome(case.config, drawn_weights(case.config, 1), case.samples, random_features(case))
        hidden = [name for name, gradient in found.gradients.items() if not float(gradient.norm())]
        assert not hidden, (case.name, case.config.injection, hidden)


def test_samples_tell_choices_apart() -> None:
    """Choices with the same weights: what one of them computes must not pass for another."""
    case = preset_case("latest_window", packed=True)
    sample = Sample((5, 6, 7, 8), (6, 7, 8, IGNORED), (Image(2, 2, 1), Image(1, 2, 1), Image(1, 1, 3)))
    weights, features = drawn_weights(case.config, 1), [torch.randn(n, 32) for n in (4, 2, 1)]
    seen = []
    for visibility, position, local_text, norm in itertools.product(
        CHOICES["visibility"], ("none", "rotary", "rotary_image"), CHOICES["local_text"], ("input", "none")
    ):
        injection = replace(case.config.injection, visibility=visibility, position=position, local_text=local_text, norm=norm)
        seen.append(outcome(replace(case.config, injection=injection), weights, [sample], [features]).logits[0])
    apart = [float((a - b).abs().max()) for a, b in itertools.combinations(seen, 2)]
    assert min(apart) > 1e-3


def test_an_image_behind_the_last_token_changes_nothing_unless_all_see_it() -> None:
    case = preset_case("mplug_owl3", packed=True)
    sample = Sample((5, 6, 7), (6, 7, IGNORED), (Image(2, 2, 1), Image(1, 2, 3)))
    alone = replace(sample, images=sample.images[:1])
    weights, features = drawn_weights(case.config, 1), [torch.randn(4, 32), torch.randn(2, 32)]
    for visibility, same in (("earlier", True), ("latest", True), ("all", False)):
        injection = replace(case.config.injection, visibility=visibility)
        config = replace(case.config, injection=injection)
        both = outcome(config, weights, [sample], [features])
        one = outcome(config, weights, [alone], [features[:1]])
        assert (largest_difference(one, replace(both, of_features=both.of_features[:1])) < 1e-12) == same
