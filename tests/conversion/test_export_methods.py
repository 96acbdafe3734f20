"""Exported folders of every method that is a cache of keys answer as our model does, wherever images stand in the text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from himix_megatron.config import METHODS, Config, InjectionConfig
from himix_megatron.conversion.export.folder import export
from himix_megatron.conversion.export.parity import load_exported
from himix_megatron.data.images.decode import decode
from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import ByteTokenizer
from himix_megatron.inference.generator import Prompt
from tests.data.test_chat_template import family, folders, hostile_talk  # noqa: F401  (fixtures)
from tests.support.data_fixtures import encoded, picture
from tests.support.exported_models import export_random, processor_of, random_config
from tests.support.injection_points import CHOICES
from tests.support.ranks import run_ranks

Exported = tuple[Path, float, float, list[list[int]]]
PRESETS = ("himix", "saisa", "vica", "mplug_owl3")
OTHERS: dict[str, InjectionConfig] = {
    "the latest image, side by side, in layers 1 and 3": InjectionConfig(
        visibility="latest", reduce="merge", every_layers=2, position="rotary_image"
    ),
    "learned positions, the mean, an MLP per layer": InjectionConfig(
        position="learned", reduce="pool", adapter="per_layer", norm="none", layers=(0, 3)
    ),
    "all images at their positions": InjectionConfig(position="rotary", adapter="shared", keys_values="text", norm="own"),
}


def drawn(number: int) -> InjectionConfig:
    """A random point of one softmax."""
    draw = random.Random(f"exported {number}")
    while True:
        layers = tuple(sorted(draw.sample(range(4), draw.randint(1, 3))))
        with contextlib.suppress(ValueError):
            injection = InjectionConfig(layers=layers, **{name: draw.choice(values) for name, values in CHOICES.items()})
            injection.check(random_config(num_layers=4).model, random_config().vision)
            return injection


OTHERS |= {f"drawn {number}": drawn(number) for number in range(3)}


def configuration(name: str) -> Config:
    """4 layers, and 3 x 3 vision tokens an image."""
    number = [*PRESETS, *OTHERS].index(name)
    sizes: dict[str, Any] = {"family": ("qwen2", "llama")[number % 2], "num_layers": 4, "side": 24}
    sizes["text_only_vision"] = "zero_image" if number % 3 == 0 else "none"
    injection = OTHERS[name] if name in OTHERS else METHODS[name](random_config(**sizes).model)
    return random_config(injection=injection, **sizes)


TALKS: list[tuple[list[str], int]] = [
    (["<image>\nWhat?"], 1),
    (["Compare\n<image>\nwith <image>, in many more words"], 2),
    (["Nothing to see"], 0),
    (["  A text before it, at last <image>"], 1),
    (["Which one?"], 2),
    (["Two<image><image> in ünïcode <image>"], 3),
    (["What is <image>?", "A thing.", "And <image>\n\nbehind it?"], 2),
]
"""What is said, user first, and the number of images."""


def as_turns(said: list[str]) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(said)]


def prompts_of(config: Config) -> list[Prompt]:
    """As evaluation makes them."""
    found = []
    for said, count in TALKS:
        talk = {"conversations": chat_template.with_marks(as_turns(said), count)}
        text = chat_template.prompt(talk, ByteTokenizer(), config.data.template, len(said) // 2)
        seen = tuple(np.asarray(decode(encoded(picture(k), "PNG"), config.vision)) for k in range(count))
        found.append(Prompt(text.ids, seen, text.image_places))
    return found


def given(processor: Any, talks: list[tuple[list[str], int]]) -> Any:
    """The exported processor's inputs."""
    messages = [[{"role": ("user", "assistant")[k % 2], "content": value} for k, value in enumerate(said)] for said, _ in talks]
    return processor(conversation=messages, images=[[picture(k) for k in range(count)] for _, count in talks])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Each point's folder, the largest differences of logits and answers, and our answers."""
    out = {name: tmp_path_factory.mktemp("exported") / "folder" for name in (*PRESETS, *OTHERS)}
    jobs = [(configuration(name), out[name], prompts_of(configuration(name))) for name in out]
    found = run_ranks(export_all, 1, jobs, start_gloo=False)[0]
    return {name: (out[name], *outcome) for name, outcome in zip(out, found, strict=True)}


def export_all(jobs: list[tuple[Config, Path, list[Prompt]]]) -> list[Any]:
    return [export_random(*job) for job in jobs]


@pytest.mark.parametrize("name", [*PRESETS, *OTHERS])
def test_logits_and_answers_equal_ours(exported: dict[str, Exported], name: str) -> None:
    out, logits, preference, answers = exported[name]
    assert logits <= 2e-5
    assert preference == 0
    model, processor = load_exported(out), processor_of(out)
    inputs = given(processor, TALKS)
    assert ("image_places" in inputs) == configuration(name).injection.needs_places
    options = {"max_new_tokens": 12, "eos_token_id": -1}
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    assert together == answers
    again = model.generate(**inputs, **options, use_cache=False)[:, inputs["input_ids"].shape[1] :].tolist()
    assert again == answers
    assert len(set(map(tuple, answers))) > 3


@pytest.mark.parametrize("name", ["saisa", "mplug_owl3", "the latest image, side by side, in layers 1 and 3"])
def test_where_an_image_stands_matters(exported: dict[str, Exported], name: str) -> None:
    out = exported[name][0]
    model, inputs = load_exported(out), given(processor_of(out), TALKS)
    first = {**inputs, "image_places": torch.zeros_like(inputs["image_places"])}
    elsewhere = model(**first).logits - model(**inputs).logits
    moved = (inputs["image_places"] > 0).any(1)
    assert (elsewhere[moved][:, -1].abs().amax(-1) > 1e-3).all()
    assert not elsewhere[~moved].any()
    assert moved.tolist() == [count > 0 for _, count in TALKS]


def test_padding_beams_and_further_turns_keep_the_places(exported: dict[str, Exported]) -> None:
    from transformers import DynamicCache

    for name in ("saisa", "the latest image, side by side, in layers 1 and 3"):
        out = exported[name][0]
        model, processor = load_exported(out), processor_of(out)
        alone = [given(processor, [talk]) for talk in TALKS]
        options = {"max_new_tokens": 6, "eos_token_id": -1, "num_beams": 3}
        batch = given(processor, TALKS)
        together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()
        assert together == [model.generate(**one, **options)[0, one["input_ids"].shape[1] :].tolist() for one in alone]
        right = processor(
            conversation=[{"role": "user", "content": TALKS[1][0][0]}], images=[picture(0), picture(1)],
            padding="max_length", max_length=120, padding_side="right",
        )  # fmt: skip
        length = int(right["attention_mask"].sum())
        torch.testing.assert_close(model(**right).logits[:, :length], model(**alone[1]).logits, rtol=0, atol=2e-5)
        cache = DynamicCache()
        first = model.generate(**alone[1], past_key_values=cache, max_new_tokens=6, eos_token_id=-1)
        more = torch.cat((first, processor(text="And why?")["input_ids"]), dim=1)
        mask = torch.ones_like(more)
        kept = model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, max_new_tokens=6)
        images = {key: alone[1][key] for key in ("pixel_values", "num_images", "image_places")}
        assert torch.equal(kept, model.generate(input_ids=more, attention_mask=mask, max_new_tokens=6, **images))


def test_layers_that_inject_nothing_hold_no_vision(exported: dict[str, Exported]) -> None:
    out = exported["the latest image, side by side, in layers 1 and 3"][0]
    model = load_exported(out)
    inputs = given(processor_of(out), TALKS[:1])
    cache = model(**inputs).past_key_values
    assert len(cache.layers) == 4 + 2
    assert [layer.keys.shape[2] for layer in cache.layers] == [inputs["input_ids"].shape[1]] * 4 + [4] * 2


# ---- the processor ----------------------------------------------------------------------------------------------------


def placed_folder(out: Path, template: str = "tiny", tokenizer: str = "bytes") -> Any:
    """The processor of a model that needs places; no weights."""
    config = random_config(injection=METHODS["saisa"](random_config().model))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template=template, tokenizer=tokenizer))
    export({"model.embed_tokens.weight": torch.zeros(2, 2)}, config, out)
    return processor_of(out)


def test_images_stand_where_they_did_in_training(family: Any, folders: Any, tmp_path: Path) -> None:  # noqa: F811
    template, ours = family
    name = "bytes" if isinstance(ours, ByteTokenizer) else ours._tokenizer.name_or_path
    placed_folder(tmp_path / "first", template, str(name)).save_pretrained(tmp_path / "out")
    processor = processor_of(tmp_path / "out")
    talks = [hostile_talk(template, ours, number) for number in range(40)]
    if template != "plain":
        talks += [{"conversations": as_turns([*said, "An answer"])} for said, _ in TALKS]
    num_marks = 0
    for talk in talks:
        messages = [{"role": ("user", "assistant")[k % 2], "content": t["value"]} for k, t in enumerate(talk["conversations"])]
        wanted = chat_template.encode(talk, ours, template, 10_000)
        assert processor._encode(processor.apply_chat_template(messages)) == (wanted.ids.tolist(), wanted.image_places.tolist())
        asked = messages[:-1]
        count = sum(message["content"].count("<image>") for message in asked)
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
        images = [picture(k) for k in range(count)]
        prompt = chat_template.prompt(talk, ours, template, len(asked) // 2)
        for found in (
            processor(conversation=asked, images=images),
            processor.apply_chat_template(asked, processor_kwargs={"images": images}, **options),
        ):
            assert found["input_ids"][0].tolist() == prompt.ids.tolist(), talk
            assert found["image_places"][0, :count].tolist() == list(prompt.image_places), talk
        num_marks += count
    assert num_marks > 10


def test_image_parts_stand_where_they_are_in_the_message(tmp_path: Path) -> None:
    processor, image, pair = placed_folder(tmp_path / "out"), {"type": "image"}, [picture(1), picture(2)]
    words = [{"type": "text", "text": text} for text in ("One ", " and two ", "?")]
    wanted = processor(conversation=[{"role": "user", "content": "One <image> and two <image>?"}], images=pair)
    assert wanted["image_places"].tolist() == [[6, 15]]
    mixed = [words[0], image, words[1], {"type": "image", "image": pair[1]}, words[2]]
    for content, images in (
        ([words[0], image, words[1], image, words[2]], pair),
        ([mixed[0], {"type": "image", "image": pair[0]}, *mixed[2:]], None),
        ([image, image, {"type": "text", "text": "One <image> and two <image>?"}], pair),
    ):
        found = processor(conversation=[{"role": "user", "content": content}], images=images)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in wanted.items()}
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"2 image parts for {number} images"):
            processor(conversation=[{"role": "user", "content": [image, image]}], images=[picture()] * number)
    spelled = processor.apply_chat_template([{"role": "user", "content": "One <image> and two <image>?"}])
    with pytest.raises(ValueError, match="2 <image> marks for 1 images: wanted one for each, or none"):
        processor(text=spelled, images=pair[:1])


@pytest.mark.parametrize("wrong", [torch.tensor([[-1]]), torch.tensor([[1.5]]), torch.tensor([[1, 2]]), torch.tensor([1])])
def test_places_that_are_none_are_one_line(exported: dict[str, Exported], wrong: torch.Tensor) -> None:
    out = exported["saisa"][0]
    inputs = given(processor_of(out), TALKS[:1])
    with pytest.raises(ValueError, match=r"image_places is .*: wanted") as caught:
        load_exported(out)(**{**inputs, "image_places": wrong})
    assert "\n" not in str(caught.value)


# ---- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("latest_window", r"injection\.fusion is separate: modeling_himix\.py computes one softmax"),
        ("llama3_2_vision", r"injection\.fusion is block: "),
        ("tokens", r"injection\.fusion is tokens: these weights are LLaVA's"),
    ],
)
def test_other_methods_are_refused_by_name(method: str, wanted: str, tmp_path: Path) -> None:
    config = random_config(injection=METHODS[method](random_config().model))
    with pytest.raises(ValueError, match=wanted) as caught:
        export({}, config, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_several_hidden_states_are_refused_by_name(tmp_path: Path) -> None:
    config = random_config()
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, feature_layers=(-1, -2)))
    with pytest.raises(ValueError, match=r"vision\.feature_layers names 2 hidden states: modeling_himix\.py takes one"):
        export({}, config, tmp_path / "out")


def test_a_folder_from_before_there_were_methods_is_himixs(tmp_path: Path) -> None:
    from transformers import AutoConfig

    export({"model.embed_tokens.weight": torch.zeros(2, 2)}, random_config(), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    settings = json.loads(file.read_text())
    wanted = settings.pop("injection")
    file.write_text(json.dumps(settings))
    found = AutoConfig.from_pretrained(str(tmp_path / "out"), trust_remote_code=True)
    assert found.injection == wanted
    assert found.injecting_layers == [0, 1]


# ---- with the tools of transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["saisa", "mplug_owl3", "learned positions, the mean, an MLP per layer"])
def test_it_can_be_trained_on(exported: dict[str, Exported], name: str) -> None:
    out = exported[name][0]
    loaded, inputs = load_exported(out).train(), given(processor_of(out), TALKS)
    whole = loaded(**inputs, labels=inputs["input_ids"])
    loaded.gradient_checkpointing_enable()
    again = loaded(**inputs, labels=inputs["input_ids"], use_cache=False)
    assert again.loss.item() == pytest.approx(whole.loss.item())
    again.loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_pipeline_knows_where_the_pictures_are(exported: dict[str, Exported]) -> None:
    from transformers import pipeline

    out, model = exported["saisa"][0], load_exported(exported["saisa"][0])
    ask = pipeline("image-text-to-text", model=model, processor=processor_of(out), device="cpu")
    shown, text = {"type": "image", "image": picture(0)}, {"type": "text", "text": "Before or behind?"}
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 12, "eos_token_id": -1}}
    found = [
        ask(text=[{"role": "user", "content": list(parts)}], **options)[0]["generated_text"]
        for parts in ((shown, text), (text, shown))
    ]
    for answer, question in zip(found, ("<image>Before or behind?", "Before or behind?<image>"), strict=True):
        inputs = given(processor_of(out), [([question], 1)])
        wanted = processor_of(out).answers(model.generate(**inputs, max_new_tokens=12, eos_token_id=-1), inputs)
        assert answer.strip() == wanted[0]
    assert found[0] != found[1]
