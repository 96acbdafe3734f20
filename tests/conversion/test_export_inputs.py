"""What an exported folder makes of words and pictures is what training made of them."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from himix_megatron.conversion.export.folder import export
from himix_megatron.conversion.export.tokenizer import write_tokenizer
from himix_megatron.data.images.decode import decode
from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import BYTE_SPECIAL, ByteTokenizer
from tests.data.test_chat_template import family, folders  # noqa: F401  (fixtures)
from tests.data.test_image_file import STORED
from tests.support.data_fixtures import VISION, encoded, picture
from tests.support.exported_models import processor_of, random_config

# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    out = tmp_path_factory.mktemp("bytes")
    assert write_tokenizer("bytes", "tiny", out) == {"bos_token_id": 256, "eos_token_id": [259], "pad_token_id": 259}
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
        wanted = chat_template.prompt(talk, ours, template, number - 1)
        found = processor(conversation=messages[:-1])["input_ids"][0]
        assert found.tolist() == wanted.tolist()
        whole = processor.encode(processor.apply_chat_template(messages))
        assert whole == chat_template.encode(talk, ours, template, 10_000).ids.tolist()
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == sorted(set(chat_template.end_of_turn(ours, template)))


def random_folder(out: Path, template: str, tokenizer: str) -> None:
    """Everything but weights."""
    config = random_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template=template, tokenizer=tokenizer))
    export({"model.embed_tokens.weight": torch.zeros(2, 2)}, config, out)


def test_messages_the_model_never_saw_are_refused(tmp_path: Path) -> None:
    random_folder(tmp_path / "out", "tiny", "bytes")
    processor = processor_of(tmp_path / "out")
    for roles in (["system", "user"], ["user", "user"], ["assistant"]):
        with pytest.raises(Exception, match="take turns"):
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
