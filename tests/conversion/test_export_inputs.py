"""What an exported folder makes of words and pictures is what training made of them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from himix_megatron.conversion.export.folder import export
from himix_megatron.conversion.export.tokenizer import write_tokenizer
from himix_megatron.data.images import image_file
from himix_megatron.data.images.decode import decode
from himix_megatron.data.ingest.sources.base import MAX_SAMPLE_BYTES
from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import BYTE_SPECIAL, ByteTokenizer
from tests.data.test_chat_template import family, folders, hostile_talk  # noqa: F401  (fixtures)
from tests.data.test_image_file import STORED
from tests.support.data_fixtures import VISION, encoded, picture
from tests.support.exported_models import processor_of, random_config

# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    out = tmp_path_factory.mktemp("bytes")
    ids = {"bos_token_id": 256, "eos_token_id": [259], "pad_token_id": 259}
    assert write_tokenizer("bytes", "tiny", out) == (ids, ["<bos>", "<user>", "<assistant>", "<end>"])
    return AutoTokenizer.from_pretrained(str(out))


def random_text(draw: random.Random) -> str:
    """Any Unicode but surrogates, with much white space."""
    letters = [
        chr(draw.choice([draw.randrange(128), draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(40)
    ]
    return "".join(draw.choice([letter, letter, " ", "\n", "  \t"]) for letter in letters)


def test_the_bytes_tokenizer_gives_the_same_ids_in_hugging_face_form(bytes_folder: Any) -> None:
    draw = random.Random(3)
    ours = ByteTokenizer()
    assert len(bytes_folder) == ours.vocab_size
    for name, token in BYTE_SPECIAL.items():
        if name.startswith("<"):
            assert bytes_folder.convert_tokens_to_ids(name) == token
    for _ in range(500):
        text = random_text(draw)
        ids = list(text.encode())
        assert bytes_folder(text, add_special_tokens=False)["input_ids"] == ids
        assert bytes_folder.decode(ids) == text
        anything = [draw.randrange(260) for _ in range(30)]  # cut characters too
        assert bytes_folder.decode(anything, skip_special_tokens=True) == ours.decode(anything)


QUESTIONS = [
    "<image>\nWhat is it?",
    "What, ünd\nwhere in 你好?<image>",
    " Is it\n<image>\n\n<image> red?  ",
    "a\n\n<image><image>b",
    "🙂",
]


def test_the_chat_template_spells_what_training_does(family: Any, folders: Any, tmp_path: Path) -> None:  # noqa: F811
    template, ours = family
    name = "bytes" if isinstance(ours, ByteTokenizer) else ours._tokenizer.name_or_path
    random_folder(tmp_path / "out", template, str(name))
    processor = processor_of(tmp_path / "out")
    captions = template == "plain"
    for number in range(1, 2 if captions else 4):
        values = [QUESTIONS[k % 5] if k % 2 == 0 else f" An ànswer {k}" for k in range(2 * number)]
        talk = {"conversations": [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]}
        messages = [{"role": ("user", "assistant")[k % 2], "content": value} for k, value in enumerate(values)]
        wanted = chat_template.prompt(talk, ours, template, number - 1).ids
        asked = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert processor.encode(asked) == wanted.tolist()
        whole = processor.encode(processor.apply_chat_template(messages))
        assert whole == chat_template.encode(talk, ours, template, 10_000).ids.tolist()
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == sorted(set(chat_template.end_of_turn(ours, template)))


def test_hostile_texts_get_the_same_ids_in_training_serving_and_export(family: Any, folders: Any, tmp_path: Path) -> None:  # noqa: F811
    """Serving asks by `chat_template.prompt`, as evaluation and generation do."""
    template, ours = family
    name = "bytes" if isinstance(ours, ByteTokenizer) else ours._tokenizer.name_or_path
    random_folder(tmp_path / "first", template, str(name))
    first = processor_of(tmp_path / "first")
    (tmp_path / "out").mkdir()
    first.save_pretrained(tmp_path / "out")
    processor = processor_of(tmp_path / "out")
    for number in range(40):
        talk = hostile_talk(template, ours, number)
        messages = [{"role": ("user", "assistant")[k % 2], "content": t["value"]} for k, t in enumerate(talk["conversations"])]
        wanted = chat_template.encode(talk, ours, template, 10_000).ids.tolist()
        assert processor.encode(processor.apply_chat_template(messages)) == wanted, talk
        asked = messages[:-1]
        marks = sum(message["content"].count("<image>") for message in asked)
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
        images = [picture(k) for k in range(marks)]
        for found in (
            processor(conversation=asked, images=images),
            processor.apply_chat_template(asked, processor_kwargs={"images": images}, **options),
        ):
            ids = chat_template.prompt(talk, ours, template, len(asked) // 2).ids
            assert found["input_ids"][0].tolist() == ids.tolist(), talk
            assert found["num_images"].tolist() == [marks]
        # Whoever hands the prompt to the tokenizer alone gets invisible characters, but no turn that a message made up.
        control = set(map(processor.tokenizer.convert_tokens_to_ids, processor.control_tokens))
        alone = processor.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert sum(token in control for token in alone) == sum(token in control for token in wanted), talk


def random_folder(out: Path, template: str, tokenizer: str) -> None:
    """Everything but weights."""
    config = random_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template=template, tokenizer=tokenizer))
    export({"model.embed_tokens.weight": torch.zeros(2, 2)}, config, out)


def test_messages_the_model_never_saw_are_refused(tmp_path: Path) -> None:
    random_folder(tmp_path / "out", "tiny", "bytes")
    processor = processor_of(tmp_path / "out")
    for roles in (["system", "user"], ["user", "user"], ["assistant"]):
        with pytest.raises(ValueError, match="take turns"):
            processor(conversation=[{"role": role, "content": "a"} for role in roles])
    with pytest.raises(ValueError, match="2 images for 3 prompts"):
        processor(text=["a", "b", "c"], images=[picture(), picture()])


def test_a_tokenizer_without_what_the_template_needs_is_refused(folders: Any, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"llama3 needs .*<\|eot_id\|>"):
        random_folder(tmp_path / "out", "llama3", str(folders["qwen2"]))
    assert not list(tmp_path.iterdir())


# ---- pictures -------------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 20 * 33).reshape(20, 33).astype(np.uint16))
    return [
        encoded(picture(1, (97, 61)), "JPEG"),
        encoded(picture(2, (30, 41)).transpose(STORED[6]), "PNG", exif=exif),
        encoded(picture(3, mode="RGBA"), "PNG"),
        encoded(picture(4, mode="P"), "PNG", transparency=3),
        encoded(picture(5, mode="LA"), "PNG"),
        encoded(picture(6, mode="CMYK"), "JPEG"),
        encoded(deep, "PNG"),
        encoded(picture(7, (200, 9)), "WEBP", lossless=True),
    ]


@pytest.mark.parametrize("resize", ["square", "crop"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pictures_become_the_same_pixels_as_in_training(resize: Any, interpolation: Any, tmp_path: Path) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    vision = dataclasses.replace(
        VISION, image_size=24, resize=resize, interpolation=interpolation, pixel_mean=mean, pixel_std=std
    )
    config = dataclasses.replace(random_config(), vision=vision)
    export({"model.embed_tokens.weight": torch.zeros(2, 2)}, config, tmp_path / "out")
    processor = processor_of(tmp_path / "out").image_processor
    means, stds = torch.tensor([mean, std]).view(2, 3, 1, 1)
    for data in pictures():
        wanted = torch.from_numpy(decode(data, vision))
        (tmp_path / "picture").write_bytes(data)
        for form in (data, str(tmp_path / "picture"), Image.open(io.BytesIO(data))):
            assert torch.equal(torch.from_numpy(processor.pixels(form)), wanted)
        found = processor([[data]])["pixel_values"][0, 0]
        assert torch.equal(found, (wanted.float() / 255 - means) / stds)


def test_what_is_a_picture_is_what_it_was_in_training(tmp_path: Path) -> None:
    random_folder(tmp_path / "out", "tiny", "bytes")
    processor = processor_of(tmp_path / "out").image_processor
    module = sys.modules[type(processor).__module__]
    assert list(module.FORMATS) == list(image_file.SUFFIXES)
    assert module.MAX_PIXELS == image_file.MAX_PIXELS
    assert set(module._PILLOW_ERRORS) == set(image_file.PILLOW_ERRORS)
    assert module.MAX_FILE_BYTES == MAX_SAMPLE_BYTES


def bad_pictures(folder: Path) -> dict[str, Any]:
    small, narrow = Image.new("L", (8, 8)), Image.new("L", (1, 1_000_000))
    os.mkfifo(folder / "fifo")
    (folder / "large").touch()
    os.truncate(folder / "large", MAX_SAMPLE_BYTES + 1)
    eps = encoded(picture(1), "EPS")
    (folder / "a.eps").write_bytes(eps)
    return {
        "eps": eps, "eps file": folder / "a.eps", "tiff": encoded(small, "TIFF"), "ico": encoded(small, "ICO"),
        "no picture": b"no picture", "nothing": b"", "cut": encoded(picture(1), "JPEG")[:300],
        "cut png": encoded(picture(1), "PNG")[:-200], "flipped": encoded(picture(1), "PNG").replace(b"IDAT", b"IDAU"),
        "fifo": folder / "fifo", "zero": "/dev/zero", "gone": "gone.png", "folder": folder, "large": folder / "large",
        "pixels": encoded(Image.new("1", (50_000, 1_001)), "PNG"), "narrow": narrow,
        "open": Image.new("1", (50_000, 1_001)), "bomb": encoded(Image.new("1", (50_000, 4_000)), "PNG"), "text": "a" * 5000,
        "url": "http://127.0.0.1:9/a.png", "file url": "file:///etc/passwd", "data url": "data:image/png;base64,AAAA",
        "floats": np.zeros((8, 8, 3)), "grey": np.zeros((8, 8), np.uint8), "number": 5, "none": None,
    }  # fmt: skip


def test_a_bad_picture_is_one_line_whatever_is_wrong_with_it(tmp_path: Path) -> None:
    vision = dataclasses.replace(VISION, image_size=64, resize="crop")
    config = dataclasses.replace(random_config(), vision=vision)
    export({"model.embed_tokens.weight": torch.zeros(2, 2)}, config, tmp_path / "out")
    processor = processor_of(tmp_path / "out")
    for name, bad in bad_pictures(tmp_path).items():
        with pytest.raises(ValueError, match=r"wanted|is no regular file|is a URL|once it is scaled") as caught:
            processor(text="a", images=[bad])
        assert " at 0x" not in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert len(str(caught.value)) < 400, name


# ---- messages and arguments -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("processor") / "out"
    random_folder(out, "tiny", "bytes")
    return processor_of(out)


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


def said(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_image_parts_without_an_image_stand_for_those_beside_them(processor: Any) -> None:
    pair = [picture(1), picture(2)]
    wanted = processor(conversation=said(*({"type": "image", "image": image} for image in pair), TEXT))
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    for found in (
        processor(conversation=said(IMAGE, IMAGE, TEXT), images=pair),
        processor.apply_chat_template(said(IMAGE, IMAGE, TEXT), processor_kwargs={"images": pair}, **options),
        processor(conversation=[{"role": "user", "content": "<image><image>What?"}], images=pair),
        processor(text="<bos><user>What?<assistant>", images=pair),
    ):
        assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in wanted.items()}
    batch = processor(conversation=[said(TEXT), said(IMAGE, TEXT)], images=[[], pair[:1]])
    assert batch["num_images"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("messages", "images", "wanted"),
    [
        (said(IMAGE, TEXT), None, "1 image parts for 0 images"),
        (said(IMAGE, IMAGE, TEXT), 1, "2 image parts for 1 images"),
        (said(IMAGE, TEXT), 2, "1 image parts for 2 images"),
        (said({"type": "image", "image": Image.new("L", (9, 9))}, TEXT), 1, "give them in one place"),
        (said({"type": "text", "text": "<image>" * 5}), 1, "5 <image> marks for 1 images"),
        ([{"role": "user", "content": "<image>\nWhat?"}], None, "1 <image> marks for 0 images"),
        *((said({"type": "image", key: "/etc/fstab"}), None, "names an image by a text") for key in ("image", "path", "url")),
        (said({"type": "image", "url": "http://127.0.0.1:9/a.png"}, TEXT), None, "names an image by a text"),
        (said({"type": "video", "video": "a.mp4"}, TEXT), None, "content of type 'video'"),
        (said({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), None, "content of type 'image_url'"),
        (said({"text": "What?"}), None, "content of type None"),
        (said({"type": "text"}), None, "content of type 'text'"),
        (said({"type": "text", "text": None}), None, "content of type 'text'"),
        (said("What?"), None, "content of type None"),
        (said(), None, "content of type None"),
        ([{"role": "user", "content": None}], None, "content of type None"),
        ([{"role": "user", "content": 5}], None, "content of type None"),
        ([{"role": "user"}], None, "content of type None"),
        ([None], None, "content of type None"),
        ([], None, "content of type None"),
        ([said(TEXT), []], None, "content of type None"),
        ({"role": "user", "content": "What?"}, None, "content of type None"),
    ],
)  # fmt: skip
def test_messages_that_say_something_else_are_refused_in_one_line(
    processor: Any, messages: Any, images: Any, wanted: str
) -> None:
    given = None if images is None else [picture(k) for k in range(images)]
    for ask in (
        lambda: processor(conversation=messages, images=given),
        lambda: processor.apply_chat_template(messages, tokenize=True, processor_kwargs={"images": given}),
    ):
        with pytest.raises(ValueError, match=wanted) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_an_argument_is_honoured_or_refused_by_name(processor: Any) -> None:
    texts = ["<bos><user>What?<assistant>", "<bos><user>And why is it there?<assistant>"]
    usual = processor(text=texts)
    ids, mask = (usual[name].tolist() for name in ("input_ids", "attention_mask"))
    missing = mask[0].count(0)
    assert ids[0][:missing] == [259] * missing
    right = processor(
        text=texts, padding_side="right", truncation=False, max_length=None, videos=None, add_special_tokens=False
    )
    assert right["input_ids"].tolist() == [ids[0][missing:] + [259] * missing, ids[1]]
    wide = processor(text=texts, padding="max_length", max_length=40)
    assert wide["input_ids"].shape == (2, 40)
    assert wide["input_ids"][1, -len(ids[1]) :].tolist() == ids[1]
    assert processor(text=texts, pad_to_multiple_of=16)["input_ids"].shape[1] % 16 == 0
    refused = {
        "truncation": True,
        "videos": ["a.mp4"],
        "stride": 5,
        "text_kwargs": {"padding": False},
        "add_special_tokens": True,
    }
    for name, value in refused.items():
        with pytest.raises(ValueError, match=f"{name}: HiMix's processor has no such arguments"):
            processor(text=texts, **{name: value})
    for text in (5, ["a", None], [5], {"a": "b"}, [], "\ud800"):
        with pytest.raises(ValueError, match="text holds something else than prompts"):
            processor(text=text)
