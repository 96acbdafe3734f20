"""Every image keeps its place in the text, from the dataset to the layout of a micro-batch: packed, cut, at any stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.data.loading.loader import ReadSpec, StepReader
from himix_megatron.data.loading.plan import Datasets, SamplingPlan, TrainingLength
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.distributed import cpu_backend
from tests.support.data_fixtures import VISION, data_config, encoded, make, picture, row

cpu_backend.activate_if_needed()

from himix_megatron.model.attention.packed_layout import ImageInText, make_layout  # noqa: E402
from himix_megatron.model.stage_input import stage_inputs  # noqa: E402

NATIVE = replace(VISION, tower="tiny_native", image_size=32)
SIZES = {"a.jpg": (20, 20), "b.jpg": (70, 9), "c.jpg": (8, 30)}
"""4, 8 and 3 patches in their own aspect."""
TOKENS = {"a.jpg": 4, "b.jpg": 8, "c.jpg": 3}
CUT = 40
# Images, turns and places. The tiny template writes one token before the conversation and one before and behind each text, and
# a text of bytes has a token for each letter.
CASES: list[tuple[list[str], tuple[str, ...], list[int]]] = [
    (["a.jpg"], ("<image>\nWhat?", "It."), [2]),
    (["b.jpg"], ("Left <image>right?", "It."), [2 + len("Left ")]),
    (["c.jpg"], ("What?\n<image>", "It."), [2 + len("What?")]),
    (["a.jpg", "b.jpg"], ("<image><image>Same?", "No."), [2, 2]),
    (["b.jpg", "a.jpg", "c.jpg"], ("<image>\nOr <image> or <image>", "No."), [2, 2 + len("Or "), 2 + len("Or  or")]),
    (["c.jpg", "b.jpg"], ("<image>\nOne?", "Un.", "And <image>?", "Deux."), [2, 1 + 10 + 1 + len("And ")]),
    (["a.jpg"], ("Draw", "See <image>here"), [2 + len("Draw") + 1 + len("See ")]),
    (["a.jpg", "c.jpg"], ("<image>" + "x" * 30, "y" * 20 + "<image>z"), [2, CUT]),
    ([], ("Nothing?", "No."), []),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    (folder / "images").mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / "images" / name).write_bytes(encoded(picture(number, size), "JPEG"))
    rows = [row(number, images or None, *turns, marks=0) for number, (images, turns, _) in enumerate(CASES)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return make(folder / "shards", folder / "rows.json", folder / "images").path


def layouts(folder: Path, vision: Any, packing: dict[str, int], texts: bool, without: int) -> dict[int, list[ImageInText]]:
    """Each row's images as a stage's layouts have them, of one step over the whole set."""
    config = data_config(max_text_tokens=CUT, **packing)
    datasets = Datasets([ShardDataset(folder)], config, vision)
    packs = len(SamplingPlan(datasets, config, seed=5, global_batch=1, images_without=without).window(0, 0))
    plan = SamplingPlan(datasets, config, seed=5, global_batch=packs, images_without=without)
    reader = StepReader(plan, vision_config=vision, micro_batch=1 if packing else 3, reads=ReadSpec(texts=texts))
    batch = reader[next(plan.steps(TrainingLength(1, None)))]
    assert not batch.bad_keys
    features = torch.zeros(sum(batch.images.tokens), 8)
    found: dict[int, list[ImageInText]] = {}
    for micro_batch, given in zip(batch.micro_batches, stage_inputs(batch, features, torch.device("cpu")), strict=True):
        layout = make_layout(given.text_ids, given.packed_lengths, given.image_table, lambda n: torch.zeros(n, 1, 1, 4))
        assert layout.vision_lengths == tuple(given.image_table.sample_tokens())
        for sample, key in enumerate(micro_batch.keys):
            found[int(key[-9:])] = [image for image in layout.images if image.sample == sample]
    return found


@pytest.mark.parametrize("texts", [True, False], ids=["a stage with text", "a stage without"])
@pytest.mark.parametrize("packing", [{}, {"pack_max_text_tokens": 90, "pack_max_vision_tokens": 32}], ids=["rows", "packed"])
@pytest.mark.parametrize("vision", [VISION, NATIVE], ids=["fixed", "native"])
def test_images_arrive_with_sample_order_and_place(folder: Path, vision: Any, packing: dict[str, int], texts: bool) -> None:
    found = layouts(folder, vision, packing, texts, without=0)
    assert len(found) == len(CASES)
    for number, (names, _, places) in enumerate(CASES):
        assert [(image.order, image.place) for image in found[number]] == list(enumerate(places)), CASES[number]
        wanted = [4 if vision is VISION else TOKENS[name] for name in names]
        assert [image.num_tokens for image in found[number]] == wanted, CASES[number]


def test_the_image_that_stands_for_none_is_before_the_text(folder: Path) -> None:
    found = layouts(folder, NATIVE, {"pack_max_text_tokens": 90, "pack_max_vision_tokens": 32}, texts=True, without=1)
    assert [(image.order, image.place, image.num_tokens) for image in found[len(CASES) - 1]] == [(0, 0, 16)]
