"""Towers equal transformers'."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from himix_megatron.config import VisionConfig
from himix_megatron.model.towers import build_tower

SIZES: dict[str, Any] = {
    "image_size": 30,  # 2 pixels are left over, as with SigLIP's 384 in patches of 14
    "patch_size": 7,
    "hidden_size": 24,
    "num_layers": 4,
    "num_attention_heads": 3,
    "ffn_hidden_size": 40,
}
CLASSES = {
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
}
MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)


def _config(tower: str, **changes: Any) -> VisionConfig:
    return VisionConfig(**{"tower": tower, "pixel_mean": MEAN, "pixel_std": STD, **SIZES, **changes})


def _tiny(**changes: Any) -> VisionConfig:
    return _config("tiny", **{"image_size": 16, "patch_size": 8, "hidden_size": 12, "num_layers": 2, **changes})


def _peer(tower: str) -> transformers.PreTrainedModel:
    """transformers' model of the same sizes, every parameter random (norms and biases too)."""
    config_class, model_class = CLASSES[tower]
    torch.manual_seed(7)
    model = model_class(
        config_class(
            image_size=SIZES["image_size"],
            patch_size=SIZES["patch_size"],
            hidden_size=SIZES["hidden_size"],
            num_hidden_layers=SIZES["num_layers"],
            num_attention_heads=SIZES["num_attention_heads"],
            intermediate_size=SIZES["ffn_hidden_size"],
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def _pixels(num_images: int, config: VisionConfig, seed: int = 0) -> torch.Tensor:
    shape = (num_images, 3, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
@pytest.mark.parametrize("feature_layer", [-1, -2, -4])
@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_features_equal_transformers_hidden_states(tower: str, feature_layer: int, trains: bool, tmp_path: Path) -> None:
    peer = _peer(tower)
    peer.save_pretrained(tmp_path)
    config = _config(tower, path=str(tmp_path), feature_layer=feature_layer)
    pixels = _pixels(3, config)
    normalised = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    normalised[1] = 0
    with torch.no_grad():
        wanted = peer(normalised, output_hidden_states=True).hidden_states[feature_layer]
        built = build_tower(config, seed=0, dtype=torch.float32).requires_grad_(trains)
        got = built(pixels, torch.tensor([False, True, False]))
    wanted = wanted[:, 1:] if tower == "clip" else wanted
    assert got.shape == (3, config.max_tokens_per_image, config.hidden_size)
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_a_whole_model_folder_serves_as_well_as_its_vision_part(tower: str, tmp_path: Path) -> None:
    peer = _peer(tower)
    sizes = peer.config.to_dict()
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    whole_class = {"siglip": transformers.SiglipModel, "clip": transformers.CLIPModel}[tower]
    whole = whole_class(whole_class.config_class(text_config=text, vision_config=sizes))
    part = whole.vision_model
    part.load_state_dict({name.removeprefix("vision_model."): value for name, value in peer.state_dict().items()}, strict=False)
    whole.save_pretrained(tmp_path / "whole")
    peer.save_pretrained(tmp_path / "part")
    towers = [
        build_tower(_config(tower, path=str(tmp_path / name)), seed=0, dtype=torch.float32).state_dict()
        for name in ("whole", "part")
    ]
    assert towers[0].keys() == towers[1].keys()
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])


def test_layers_after_the_feature_layer_are_not_built() -> None:
    assert len(build_tower(_config("siglip", feature_layer=-2), seed=0, dtype=torch.float32).layers) == 3
    assert len(build_tower(_tiny(feature_layer=-1), seed=0, dtype=torch.float32).layers) == 2


@pytest.mark.parametrize("tower", ["siglip", "clip", "tiny"])
def test_every_parameter_of_a_tower_gets_a_gradient(tower: str) -> None:
    config = _tiny() if tower == "tiny" else _config(tower)
    built = build_tower(config, seed=0, dtype=torch.float32)
    built(_pixels(2, config), torch.tensor([False, False])).square().sum().backward()
    assert [name for name, parameter in built.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("tower", ["siglip", "clip", "tiny"])
def test_random_weights_depend_on_the_seed_alone_and_move_no_generator(tower: str) -> None:
    config = _tiny() if tower == "tiny" else _config(tower)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_tower(config, seed=5, dtype=torch.float32).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (build_tower(config, seed=seed, dtype=torch.float32).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_blank_image_is_zero_after_normalisation_whatever_its_pixels() -> None:
    config = _tiny()
    tower = build_tower(config, seed=0, dtype=torch.float32)
    blank = torch.tensor([True, True, False])
    features = tower(_pixels(3, config), blank)
    assert torch.equal(features[0], features[1])
    assert not torch.equal(features[0], features[2])
    assert not torch.allclose(features[0], tower(torch.zeros_like(_pixels(3, config)), ~blank)[0])


def test_a_bf16_tower_normalises_in_full_precision() -> None:
    config = _tiny(pixel_std=(0.001, 0.001, 0.001))
    tower = build_tower(config, seed=0, dtype=torch.bfloat16).bfloat16()
    pixels, blank = _pixels(1, config), torch.tensor([False])
    got = tower.normalise(pixels, blank, torch.float32)
    wanted = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / 0.001
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert tower(pixels, blank).dtype == torch.bfloat16


def _folder(tmp_path: Path) -> VisionConfig:
    _peer("siglip").save_pretrained(tmp_path)
    return _config("siglip", path=str(tmp_path))


@pytest.mark.parametrize("field", ["image_size", "patch_size", "hidden_size", "num_layers", "ffn_hidden_size"])
def test_a_folder_of_other_sizes_is_refused_by_the_name_of_the_field(field: str, tmp_path: Path) -> None:
    config = _folder(tmp_path)
    other = dataclasses.replace(config, **{field: getattr(config, field) * 3})
    with pytest.raises(ValueError, match=rf"vision\.{field} is .* use --vision\.{field.replace('_', '-')} {SIZES[field]}"):
        build_tower(other, seed=0, dtype=torch.float32)


def test_a_folder_of_another_normalisation_or_kind_or_without_weights_is_refused(tmp_path: Path) -> None:
    config = _folder(tmp_path)
    with pytest.raises(ValueError, match=r"vision\.tower is clip, but .* describes siglip"):
        build_tower(dataclasses.replace(config, tower="clip"), seed=0, dtype=torch.float32)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"vision\.pixel_mean is .*use --vision\.pixel-mean 0\.5 0\.5 0\.5"):
        build_tower(config, seed=0, dtype=torch.float32)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors in"):
        build_tower(config, seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no config\.json in"):
        build_tower(dataclasses.replace(config, path=str(tmp_path / "none")), seed=0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"[" * 90_000, "config.json: no JSON that can be read: too many lists"),
        ("preprocessor_config.json", b"[" * 90_000, "preprocessor_config.json: no JSON that can be read"),
        ("preprocessor_config.json", b'{"image_mean": 0.5}', "vision.pixel_mean is .*says 0.5"),
        ("model.safetensors", b"[" * 90_000, "model.safetensors is damaged"),
        ("model.safetensors", None, "model.safetensors is a FIFO: wanted a regular file"),
        ("preprocessor_config.json", b"[]", "preprocessor_config.json: it is a list, wanted an object"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    config = _folder(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        build_tower(config, seed=0, dtype=torch.float32)


def test_missing_weights_are_named_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = _folder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of the tower's .* layers\.1\.mlp\.fc1\.weight"):
        build_tower(config, seed=0, dtype=torch.float32)


# ---- a frozen tower ----------------------------------------------------------------------------------------------------


def _frozen(tower: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen tower of random weights, its norms and biases too."""
    built = build_tower(_config(tower), seed=seed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return built.to(dtype).requires_grad_(False)


def _features(tower: Any, num_images: int = 3) -> torch.Tensor:
    features: torch.Tensor = tower(_pixels(num_images, _config("siglip")), torch.zeros(num_images, dtype=torch.bool))
    return features.detach()


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_a_frozen_tower_knows_its_weights_by_the_same_names_after_it_ran_and_takes_others(tower: str) -> None:
    from safetensors.torch import load, save

    one, other = _frozen(tower, seed=1), _frozen(tower, seed=2)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    first, second = _features(one), _features(other)
    after = load(save(one.state_dict()))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    one.load_state_dict(other.state_dict())
    assert torch.equal(_features(one), second)
    one.load_state_dict(before, assign=True)
    assert torch.equal(_features(one), first)


def test_a_frozen_tower_still_fits_after_a_change_of_its_dtype_and_a_copy() -> None:
    tower = _frozen("siglip")
    features = _features(tower)
    copied = copy.deepcopy(tower)
    assert torch.equal(_features(copied), features)
    with torch.no_grad():
        copied.layers[0].self_attn.k_proj.weight.zero_()
    assert not torch.equal(_features(copied), features)
    assert torch.equal(_features(tower), features)
    doubled = tower.double()
    for layer in doubled.layers:
        assert layer.self_attn.v_proj.weight.dtype == torch.float64
    assert torch.equal(_features(doubled.float()), features)


def test_a_frozen_tower_in_bf16_is_as_near_to_float32_as_the_modules_are() -> None:
    wanted = _features(_frozen("siglip"))
    frozen, modules = (_features(_frozen("siglip", dtype=torch.bfloat16).requires_grad_(trains)) for trains in (False, True))
    errors = [float((features.float() - wanted).norm() / wanted.norm()) for features in (frozen, modules)]
    assert errors[0] <= 1.2 * errors[1]
    assert errors[0] <= 2e-2


@pytest.mark.requires_gpu
@pytest.mark.parametrize("tower", ["siglip", "clip"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_a_frozen_tower_on_a_gpu_equals_its_modules(tower: str, dtype: torch.dtype, most: float) -> None:
    built = _frozen(tower, dtype=dtype).cuda()
    for num_images in (3, 5, 2):
        pixels = _pixels(num_images, _config(tower)).cuda()
        blank = torch.zeros(num_images, dtype=torch.bool, device="cuda")
        frozen = built.requires_grad_(False)(pixels, blank).float()
        modules = built.requires_grad_(True)(pixels, blank).detach().float()
        assert (frozen - modules).norm() <= most * modules.norm()


def test_every_parameter_has_a_gradient_also_without_an_image() -> None:
    tower = build_tower(dataclasses.replace(_tiny(), tower="tiny_native"), seed=0, dtype=torch.float32)
    features = tower.features(torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.bool), ())
    features.sum().backward()
    assert features.shape == (0, tower.config.hidden_size)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in tower.parameters())


def test_an_image_in_its_own_aspect_is_encoded_alone_as_among_others() -> None:
    config = dataclasses.replace(_tiny(), tower="tiny_native")
    tower, draw = build_tower(config, seed=0, dtype=torch.float32), torch.Generator().manual_seed(0)
    sizes = [config.input_size(*size) for size in ((30, 10), (7, 40), (12, 12))]
    images = [torch.randint(0, 256, (3 * width * height,), dtype=torch.uint8, generator=draw) for width, height in sizes]
    blank = torch.tensor([False, False, True])
    together = tower.features(torch.cat(images), blank, sizes)
    alone = [tower.features(image, own[None], [size]) for image, own, size in zip(images, blank, sizes, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert [len(features) for features in alone] == [config.num_tokens(size) for size in sizes]
    turned = tower.features(images[0], blank[:1], [sizes[0][::-1]])
    assert not torch.allclose(turned, alone[0], atol=1e-2)  # a patch's row and column are seen
