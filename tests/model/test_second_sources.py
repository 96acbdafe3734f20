"""Methods that others have published code for compute what that code computes.

With transformers the other side runs here, on random weights; of the authors' code there are numbers in tests/data/methods.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from himix_megatron.config import METHODS, Config, ModelConfig, VisionConfig
from himix_megatron.conversion.huggingface import language_config, language_settings, rope_scaling
from himix_megatron.data.loading.batch import NO_LOSS
from himix_megatron.model.towers import build_tower
from tests.support import ROOT
from tests.support.ranks import run_ranks
from tests.support.second_sources import (
    Outcome,
    Places,
    Texts,
    drawn,
    fill,
    golden_places,
    llava_places,
    mllama_layers,
    mllama_places,
    our_outcomes,
    relative,
    run_config,
    to_ours,
    to_theirs,
    transformers_outcome,
)

LOGITS_LIMIT = LOSS_LIMIT = 2e-5
RELATIVE_LIMIT = 1e-5
VOCABULARY, IMAGE = 48, 47
"""IMAGE: the token that stands for an image, or for one of its vision tokens, in transformers' texts."""
VISION = VisionConfig(
    tower="tiny", image_size=3, patch_size=1, hidden_size=32, num_layers=2, num_attention_heads=1, ffn_hidden_size=1
)
"""9 vision tokens an image; the features are given, and the tower plays no part."""


def language(num_layers: int, **choices: Any) -> ModelConfig:
    return ModelConfig(
        family="llama", num_layers=num_layers, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2,
        vocab_size=VOCABULARY, layer_spec="torch", **choices,
    )  # fmt: skip


def of_transformers(model: ModelConfig) -> dict[str, Any]:
    """Its settings, by the names of transformers."""
    rope = {"rope_type": "default", "rope_theta": model.rope_theta} | (rope_scaling(model) or {})
    return language_settings(model) | {"rope_parameters": rope, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}


def compute(*cases: tuple[Config, dict[str, Tensor], Texts]) -> list[Outcome]:
    """Our models, on a rank of their own."""
    found: list[Outcome] = run_ranks(our_outcomes, 1, cases, start_gloo=False)[0]
    return found


def check(found: Outcome, wanted: Outcome, real: Tensor, places: Places, model: ModelConfig) -> None:
    """Logits where there is a token (`real`), the loss, and each gradient of ours; those of one number each, where much cancels
    out, as one."""
    assert (found.logits - wanted.logits)[real].abs().max() <= LOGITS_LIMIT
    assert abs(found.loss - wanted.loss) <= LOSS_LIMIT
    gradients = to_theirs(found.gradients, places, model)
    others = {name: wanted.gradients[name][: len(own)] for name, own in gradients.items()}
    if gates := [name for name, own in gradients.items() if own.numel() == 1]:
        for side in (gradients, others):
            side["gates"] = torch.cat([side.pop(name) for name in gates])
    differences = {name: relative(own, others[name]) for name, own in gradients.items()}
    assert max(differences.values()) <= RELATIVE_LIMIT, max(differences, key=differences.__getitem__)


def test_presets_inject_in_the_published_layers() -> None:
    published = {("vica", 32): (0, 1, 7, 8, 9, 10, 11, 14), ("mplug_owl3", 28): (6, 14, 22, 25), ("tokens", 32): ()}
    for (method, num_layers), layers in published.items():
        assert METHODS[method](language(num_layers)).injecting_layers(num_layers) == layers
    _, blocks = mllama_layers(language(32), METHODS["llama3_2_vision"](language(32)))
    assert list(blocks.values()) == transformers.MllamaTextConfig().cross_attention_layers


# ---- the authors' code -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """A file of tests/data/methods."""

    config: Config
    places: Places
    tensors: dict[str, Tensor]

    @staticmethod
    def read(method: str) -> Golden:
        file = ROOT / "tests" / "data" / "methods" / f"{method}.safetensors"
        with safe_open(file, framework="pt") as opened:
            sizes, described = (json.loads(opened.metadata()[name]) for name in ("config", "method"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        model = replace(language_config({**sizes, "model_type": sizes["family"]}, file), layer_spec="torch")
        injection = replace(METHODS[described["method"]](model), layers=tuple(described.get("layers", ())))
        vision = replace(VISION, hidden_size=tensors["vision"].shape[-1])
        return Golden(run_config(model, vision, injection), golden_places(model, injection), tensors)

    def starting_with(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}

    def case(self) -> tuple[Config, dict[str, Tensor], Texts]:
        given = self.tensors
        texts = Texts(
            ids=given["input_ids"],
            answers=given["answers"].bool(),
            lengths=(given["input_ids"].shape[1],) * 2,
            places=tuple(map(tuple, given["places"].tolist())),
            features=given["vision"].flatten(0, 2),
        )
        return self.config, to_ours(self.starting_with("weight."), self.places, self.config.model), texts


GOLDEN = ("saisa", "vica", "mplug_owl3")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return dict(zip(GOLDEN, compute(*(Golden.read(method).case() for method in GOLDEN)), strict=True))


@pytest.mark.parametrize("method", GOLDEN)
def test_a_method_agrees_with_public_code_for_it(method: str, outcomes: dict[str, Outcome]) -> None:
    golden, found = Golden.read(method), outcomes[method]
    assert relative(found.logits, golden.tensors["logits"]) <= RELATIVE_LIMIT
    assert found.loss == pytest.approx(float(golden.tensors["loss"]), rel=RELATIVE_LIMIT)
    gradients, wanted = to_theirs(found.gradients, golden.places, golden.config.model), golden.starting_with("grad.")
    assert len(wanted) >= 10
    differences = {name: relative(gradients[name], gradient) for name, gradient in wanted.items()}
    assert max(differences.values()) <= RELATIVE_LIMIT, max(differences, key=differences.__getitem__)


# ---- Llama-3.2-Vision --------------------------------------------------------------------------------------------------

SEEING = ((0, 6), (0, 5, 5))
BLIND_AT_FIRST = ((3, 8), (2, 2, 7))
"""Places of the images of two texts of 12 tokens."""
EVERYWHERE = torch.ones(2, 12, dtype=torch.bool)


def mllama_texts(places: tuple[tuple[int, ...], ...]) -> tuple[Texts, list[list[list[int]]]]:
    """Texts, and for each image the text tokens that see it, from the first to behind the last.

    In the first text a token stands for each image, as in theirs, and the ranges are those of their processor. There the first
    of two such tokens that are neighbours does not see the second image; the second text has none, and sees both at once.
    """
    from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, IMAGE, (2, 12), generator=generator)
    ids[0, list(places[0])] = IMAGE
    answers = torch.zeros(2, 12, dtype=torch.bool)
    answers[0, 5:], answers[1, 7:] = True, True
    features = torch.randn(sum(map(len, places)) * 9, 32, generator=generator)
    following = [{*places[1], 12} - set(range(place + 1)) for place in places[1]]
    by_hand = [[place, min(later)] for place, later in zip(places[1], following, strict=True)]
    return Texts(ids, answers, (12, 12), places, features), [get_cross_attention_token_mask(ids[0].tolist(), IMAGE), by_hand]


def mllama_outcome(theirs: Any, texts: Texts, ranges: list[list[list[int]]], *, as_meta: bool) -> Outcome:
    """Theirs on the texts. `as_meta`: what Meta's code does beyond it: attention of text that sees no image is 0."""
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention, _prepare_cross_attention_mask
    from transformers.models.mllama.processing_mllama import convert_sparse_cross_attention_mask_to_dense

    tiles = [[1] * len(own) for own in ranges]
    dense = convert_sparse_cross_attention_mask_to_dense(ranges, tiles, max_num_tiles=1, length=texts.ids.shape[1])
    mask, sees_B1S1 = _prepare_cross_attention_mask(torch.from_numpy(dense), 9, torch.float32)
    of_text = torch.split(texts.features, [9 * len(own) for own in texts.places])
    states = torch.nn.utils.rnn.pad_sequence(list(of_text), batch_first=True)
    hooks = [
        module.register_forward_hook(lambda _, __, output: (output[0] * sees_B1S1[:, 0], output[1]))
        for module in theirs.modules()
        if as_meta and isinstance(module, MllamaTextCrossAttention)
    ]
    theirs.zero_grad()
    found = transformers_outcome(
        theirs, texts.labels, input_ids=texts.ids, cross_attention_states=states, cross_attention_mask=mask,
        full_text_row_masked_out_mask=sees_B1S1,
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    return found


@dataclass(frozen=True)
class Mllama:
    """Two blocks in 8 layers: theirs, and what ours with the same weights makes of both pairs of texts."""

    places: Places
    theirs: Any
    ours: dict[Any, Outcome]


MLLAMA = language(8, rope_theta=500000.0, rope_scaling_factor=8.0)


@pytest.fixture(scope="module")
def mllama() -> Mllama:
    injection = METHODS["llama3_2_vision"](MLLAMA)
    _, blocks = mllama_layers(MLLAMA, injection)
    assert blocks == {3: 3, 7: 8}
    numbers = {"num_hidden_layers": 10, "cross_attention_layers": list(blocks.values())}
    theirs = transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**of_transformers(MLLAMA) | numbers)).eval()
    places = mllama_places(MLLAMA, injection)
    given = {name: tensor[:VOCABULARY] if "embed" in name else tensor for name, tensor in theirs.state_dict().items()}
    weights = drawn({name: tensor.shape for name, tensor in to_ours(given, places, MLLAMA).items()}, seed=1)
    fill(theirs, to_theirs(weights, places, MLLAMA))
    config = run_config(MLLAMA, VISION, injection)
    both = (SEEING, BLIND_AT_FIRST)
    found = compute(*((config, weights, mllama_texts(of_images)[0]) for of_images in both))
    return Mllama(places, theirs, dict(zip(both, found, strict=True)))


def test_llama_3_2_vision_agrees_with_transformers_where_all_text_sees_an_image(mllama: Mllama) -> None:
    wanted = mllama_outcome(mllama.theirs, *mllama_texts(SEEING), as_meta=False)
    check(mllama.ours[SEEING], wanted, EVERYWHERE, mllama.places, MLLAMA)


def test_text_before_the_first_image_differs_from_transformers_in_its_attention_alone(mllama: Mllama) -> None:
    found, texts = mllama.ours[BLIND_AT_FIRST], mllama_texts(BLIND_AT_FIRST)
    check(found, mllama_outcome(mllama.theirs, *texts, as_meta=True), EVERYWHERE, mllama.places, MLLAMA)
    other = mllama_outcome(mllama.theirs, *texts, as_meta=False)
    assert (found.logits - other.logits).abs().amax(-1)[0, :3].min() > 1e-3


# ---- LLaVA -------------------------------------------------------------------------------------------------------------

CLIP = VisionConfig(
    tower="clip", image_size=24, patch_size=8, hidden_size=24, num_layers=3, num_attention_heads=3, ffn_hidden_size=40,
    pixel_mean=(0.48, 0.45, 0.40), pixel_std=(0.26, 0.27, 0.28),
)  # fmt: skip
LLAVA_PLACES = ((0, 7), (), (4, 4, 9))
"""At the beginning, before an answer, none, side by side inside the text, and at its end."""


def llava(model: ModelConfig) -> Any:
    """transformers' model with CLIP of these sizes, all weights random."""
    vision = transformers.CLIPVisionConfig(
        image_size=24, patch_size=8, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40
    )
    text = transformers.LlamaConfig(**of_transformers(model))
    settings = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=9)
    theirs = transformers.LlavaForConditionalGeneration(settings).eval()
    theirs.load_state_dict(drawn({name: tensor.shape for name, tensor in theirs.state_dict().items()}, seed=2))
    return theirs


def with_image_tokens(texts: Texts) -> tuple[Tensor, Tensor, Tensor]:
    """ids and labels with 9 tokens where each image stands, padded on the right, and which tokens are real."""
    rows: list[Tensor] = []
    for ids, labels, length, places in zip(texts.ids, texts.labels, texts.lengths, texts.places, strict=True):
        pairs = [[int(token), int(label)] for token, label in zip(ids[:length], labels[:length], strict=True)]
        for place in reversed(places):
            pairs[place:place] = [[IMAGE, NO_LOSS]] * 9
        rows.append(torch.tensor([[*pair, 1] for pair in pairs]))
    ids, labels, real = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).unbind(-1)
    return ids, labels.masked_fill(real == 0, NO_LOSS), real


def llava_texts(features: Tensor) -> Texts:
    """Of different lengths, as a batch has them."""
    lengths = (12, 8, 9)
    ids = torch.randint(1, IMAGE, (3, 12), generator=torch.Generator().manual_seed(4))
    answers = torch.zeros(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        answers[row, 5:length] = True
    return Texts(ids, answers, lengths, LLAVA_PLACES, features)


def test_tokens_agree_with_llava_from_pixels_to_logits_and_gradients(tmp_path: Path) -> None:
    model = language(3)
    theirs, places = llava(model), llava_places(model)
    theirs.model.vision_tower.save_pretrained(tmp_path)
    pixels = torch.randint(256, (5, 3, 24, 24), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    with torch.no_grad():
        tower = build_tower(replace(CLIP, path=str(tmp_path)), seed=0, dtype=torch.float32)
        features = tower(pixels, torch.zeros(5, dtype=torch.bool)).flatten(0, 1)
    texts = llava_texts(features)
    ids, labels, real = with_image_tokens(texts)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP.pixel_mean, CLIP.pixel_std))
    wanted = transformers_outcome(theirs, labels, input_ids=ids, attention_mask=real, pixel_values=(pixels / 255 - mean) / std)
    given = {name: tensor for name, tensor in theirs.state_dict().items() if "vision_tower." not in name}
    config = run_config(model, CLIP, METHODS["tokens"](model))
    [found] = compute((config, to_ours(given, places, model), texts))
    check(found, wanted, real.bool(), places, model)
    again = to_theirs(found.weights, places, model)
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in given.items())


def test_weights_of_tokens_go_to_llava_and_come_back_bit_for_bit() -> None:
    model = language(3)
    theirs, places = llava(model), llava_places(model)

    def text_part() -> dict[str, Tensor]:
        return {name: tensor for name, tensor in theirs.state_dict().items() if "vision_tower." not in name}

    ours = drawn({name: tensor.shape for name, tensor in to_ours(text_part(), places, model).items()}, seed=6)
    fill(theirs, to_theirs(ours, places, model))
    back = to_ours(text_part(), places, model)
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
