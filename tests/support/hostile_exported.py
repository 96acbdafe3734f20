"""Inputs for the exported processor and model that no honest caller gives. In: a random generator; out: a call to try."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support import hostile_json
from tests.support.data_fixtures import encoded, picture

PICTURES: dict[str, Callable[[], Any]] = {
    "a picture": picture,
    "bytes": lambda: encoded(picture(), "PNG"),
    "an array": lambda: np.zeros((20, 30, 3), np.uint8),
    "floats": lambda: np.full((20, 30, 3), np.nan),
    "3x20x30": lambda: np.zeros((3, 20, 30), np.uint8),
    "no pixel": lambda: np.zeros((0, 0, 3), np.uint8),
    "a tensor": lambda: torch.zeros(3, 20, 20),
    "CMYK": lambda: picture().convert("CMYK"),
    "1x20000": lambda: Image.new("RGB", (1, 20_000)),
    "TIFF": lambda: encoded(picture(), "TIFF"),
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "cut": lambda: encoded(picture(), "PNG")[:100],
    "empty": lambda: b"",
    "a bomb": lambda: encoded(Image.new("1", (20_000, 20_000)), "PNG"),
    "a closed port": lambda: "http://127.0.0.1:9/a.png",
    "another scheme": lambda: "file:///etc/hostname",
    "a missing file": lambda: "missing.png",
    "/dev/zero": lambda: "/dev/zero",
    "a FIFO": lambda: (Path("tmp/fifo").exists() or os.mkfifo("tmp/fifo"), "tmp/fifo")[1],
    "a folder": lambda: Path.cwd(),
    "None": lambda: None,
    "a number": lambda: 7,
}
TALK: list[Any] = [
    {"role": "user", "content": [{"type": "image", "image": "{picture 0}"}, {"type": "text", "text": "Which colour?"}]},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "And <image> now?"},
]
OPTIONS: tuple[dict[str, Any], ...] = (
    *(
        {},
        {},
        {},
        {"return_tensors": "np"},
        {"return_tensors": "nothing"},
        {"padding": "max_length", "max_length": -1},
        {"truncation": True},
    ),
    *({"padding_side": "middle"}, {"add_generation_prompt": None}, {"videos": [1]}, {"max_length": 10**30}),
)


@functools.cache
def loaded(folder: Path) -> tuple[Any, Any]:
    """Processor and model, as a user gets them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)
    return processor, AutoModelForImageTextToText.from_pretrained(str(folder), trust_remote_code=True).eval()


def attack(draw: random.Random, folder: Path) -> tuple[str, Callable[[], Any]]:
    """What is tried, in words and as a call."""
    processor, model = loaded(folder)
    kind = draw.choice(["talk", "talk", "pictures", "pictures", "forward", "forward", "generate"])
    if kind == "talk":
        return _talk(draw, processor)
    if kind == "pictures":
        names = [draw.choice(list(PICTURES)) for _ in range(draw.choice([0, 1, 1, 2, 5]))]
        shape = draw.choice(["flat", "alone", "per sample", "per sample of three", "nested"])
        text: Any = draw.choice(["<user>hi<end><assistant>", ["<image>a", "b"], [], "", "a" * 50_000, ["a", None], 5, "\ud800"])
        options = draw.choice(OPTIONS)
        return f"{shape} {names}, text {str(text)[:40]!a}, {options}", lambda: processor(
            text=text, images=_shaped(names, shape), **options
        )
    given = _inputs(processor)
    # At the others transformers' generation looks before the model does.
    names = ["pixel_values", "image_features", "image_places"]
    names += (
        ["num_images", "input_ids", "attention_mask", "labels", "position_ids", "inputs_embeds"] if kind == "forward" else []
    )
    told = [_changed(draw, given, names) for _ in range(draw.choice([1, 1, 2]))]
    if kind == "forward":
        return f"forward: {'; '.join(told)}", lambda: model(**given)
    options = draw.choice(
        [{}, {"num_beams": 3}, {"temperature": float("nan"), "do_sample": True}, {"max_new_tokens": -1}, {"use_cache": False}]
    )
    return f"generate: {'; '.join(told)}, {options}", lambda: model.generate(**given, **{"max_new_tokens": 2} | options)


def _talk(draw: random.Random, processor: Any) -> tuple[str, Callable[[], Any]]:
    talk, told = hostile_json.mutate(draw, TALK) if draw.random() < 0.8 else (TALK, [])
    name, options = draw.choice(list(PICTURES)), draw.choice(OPTIONS)

    def with_pictures(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: with_pictures(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [with_pictures(value) for value in tree]
        return PICTURES[name]() if tree == "{picture 0}" else tree

    def call() -> Any:
        return processor(conversation=with_pictures(talk), **options)

    return f"conversation: {'; '.join(told)}; {name}, {options}", call


def _shaped(names: list[str], shape: str) -> Any:
    made = [PICTURES[name]() for name in names]
    if shape == "alone":
        return made[0] if made else None
    return {"flat": made, "per sample": [[one] for one in made], "per sample of three": [made, [], made], "nested": [[made]]}[
        shape
    ]


def _inputs(processor: Any) -> dict[str, Any]:
    """Good inputs of two samples, one with a picture."""
    return dict(processor(text=["<user>a<end><assistant>", "<user>what<end><assistant>"], images=[[picture()], []]))


def _changed(draw: random.Random, given: dict[str, Any], names: Sequence[str]) -> str:
    """One input gets another shape, type or content."""
    name = draw.choice(names)
    value = given.get(name, torch.zeros(2, 5))
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    made: dict[str, Callable[[], Any]] = {
        "gone": lambda: None,
        "one dimension less": lambda: value[0],
        "one more": lambda: value[None],
        "empty": lambda: value[:0],
        "one sample": lambda: value[:1],
        "three samples": lambda: torch.cat([value, value[:1]]),
        "cut": lambda: value[..., :-1],
        "another type": lambda: value.to(draw_type),
        "negative": lambda: torch.full_like(value, -1),
        "too large": lambda: torch.full_like(value, 10**6),
        "not a number": lambda: torch.full(shape, float("nan")),
        "a list": lambda: value.tolist(),
        "text": lambda: "text",
        "strange shape": lambda: torch.zeros(odd),
    }
    if name == "input_ids":  # which of them there are, the embedding says itself, as of every model
        del made["negative"], made["too large"]
    draw_type = draw.choice([torch.uint8, torch.bool, torch.float64, torch.complex64, torch.int32, torch.float16])
    odd = draw.choice(
        [(2, 1, 3, 8, 8), (2, 1, 4, 16, 16), (2, 7), (1,), (2, 1, 4, 24), (0,), (2, 0, 3, 16, 16), (2, 3, 3, 16, 16)]
    )
    kind = draw.choice(list(made))
    try:
        changed = made[kind]()
    except (RuntimeError, IndexError, AttributeError, TypeError, ValueError):
        changed = None
    given[name] = changed
    return f"{name} {kind}"
