"""Every image keeps its place in the text, from the dataset to the layout of a micro-batch: packed, cut, at any stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from himix_megatron.config import METHODS, Config
from himix_megatron.data.loading.batch import StepBatch
from himix_megatron.data.loading.loader import ReadSpec, StepReader
from himix_megatron.data.loading.plan import Datasets, SamplingPlan, TrainingLength
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import load_tokenizer
from himix_megatron.distributed import cpu_backend
from tests.support.data_fixtures import VISION, data_config, encoded, make, picture, row
from tests.support.small_runs import small_config

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


def config_of(vision: Any, **choices: Any) -> Config:
    config = small_config(Path("unused"), Path("unused"), parts=("vision_kv",))
    return replace(config, vision=vision, injection=replace(config.injection, **choices))


def whole_set(folder: Path, vision: Any, packing: dict[str, int], texts: bool, without: int = 0) -> StepBatch:
    """One step over all rows."""
    config = data_config(max_text_tokens=CUT, **packing)
    datasets = Datasets([ShardDataset(folder)], config, vision)
    packs = len(SamplingPlan(datasets, config, seed=5, global_batch=1, images_without=without).window(0, 0))
    plan = SamplingPlan(datasets, config, seed=5, global_batch=packs, images_without=without)
    reader = StepReader(plan, vision_config=vision, micro_batch=1 if packing else 3, reads=ReadSpec(texts=texts))
    batch = reader[next(plan.steps(TrainingLength(1, None)))]
    assert not batch.bad_keys
    return batch


def layouts(folder: Path, vision: Any, packing: dict[str, int], texts: bool, without: int) -> dict[int, list[ImageInText]]:
    """Each row's images as a stage's layouts have them, of one step over the whole set."""
    batch = whole_set(folder, vision, packing, texts, without)
    features = torch.zeros(sum(batch.images.tokens), 8)
    inputs = stage_inputs(batch, features, config_of(vision), torch.device("cpu"))
    found: dict[int, list[ImageInText]] = {}
    for micro_batch, given in zip(batch.micro_batches, inputs, strict=True):
        assert given.vision_rows is None
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


# ---- vision in the text's sequence -------------------------------------------------------------------------------------

PACKED = {"pack_max_text_tokens": 90, "pack_max_vision_tokens": 32}
TOKENS_AFTER = {"none": TOKENS, "pool": {"a.jpg": 1, "b.jpg": 4, "c.jpg": 2}}
"""Of 2x2, 1x8 and 3x1 patches."""


def by_hand(number: int, tokens: dict[str, int], first: int) -> list[tuple[int, int, int]]:
    """Of one row (id or 0, label, which vision token of the micro-batch or -1), one entry a token of its sequence."""
    names, turns, places = CASES[number]
    text = chat_template.encode(row(number, None, *turns), load_tokenizer("bytes"), "tiny", CUT)
    sequence: list[tuple[int, int, int]] = []
    for i in range(len(text.ids) + 1):
        for name, place in zip(names, places, strict=True):
            if place == i:
                for _ in range(tokens[name]):
                    sequence.append((0, -100, first))
                    first += 1
        if i < len(text.ids):
            if text.loss_mask[i]:
                last_id, _, last_vision = sequence.pop()
                sequence.append((last_id, int(text.ids[i]), last_vision))
            sequence.append((int(text.ids[i]), -100, -1))
    return sequence


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize(("vision", "reduce"), [(VISION, "none"), (NATIVE, "none"), (NATIVE, "pool")])
def test_vision_stands_in_the_text_where_a_loop_puts_it(
    folder: Path, vision: Any, reduce: str, packing: dict[str, int]
) -> None:
    config = config_of(vision)
    config = replace(config, injection=replace(METHODS["tokens"](config.model), reduce=reduce))
    config = replace(config, parallel=replace(config.parallel, tensor=2, sequence=True))
    tokens = dict.fromkeys(TOKENS, 4) if vision is VISION else TOKENS_AFTER[reduce]
    batch = whole_set(folder, vision, packing, texts=True)
    sources = [tuple(int(key[-9:]) % 3 for key in part.keys) for part in batch.micro_batches]
    micro_batches = tuple(replace(part, sources=own) for part, own in zip(batch.micro_batches, sources, strict=True))
    batch = replace(batch, num_sources=3, micro_batches=micro_batches)
    features = torch.arange(float(sum(batch.images.tokens)))[:, None].expand(-1, 8)
    inputs = stage_inputs(batch, features, config, torch.device("cpu"))
    width, num_labels = inputs[0].text_ids.shape[1], 0
    assert width % 2 == 0
    assert torch.equal(torch.cat([given.images for given in inputs]), features)
    for micro_batch, given in zip(batch.micro_batches, inputs, strict=True):
        rows: list[list[tuple[int, int, int]]] = []
        wanted_sources: list[list[int]] = []
        for key, source in zip(micro_batch.keys, micro_batch.sources, strict=True):
            first = sum(entry[2] >= 0 for row in rows for entry in row)
            sequence = by_hand(int(key[-9:]), tokens, first)
            # In a row of its own a sample's padding belongs to it; a pack's to nobody.
            lasting = len(sequence) if packing else width
            if packing and rows:
                rows[0] += sequence
                wanted_sources[0] += [source] * lasting
            else:
                rows.append(sequence)
                wanted_sources.append([source] * lasting)
        lengths = [len(by_hand(int(key[-9:]), tokens, 0)) for key in micro_batch.keys]
        assert given.packed_lengths == (tuple(lengths) if packing else None)
        padded = [row + [(0, -100, -1)] * (width - len(row)) for row in rows]
        flat = [entry for row in padded for entry in row]
        assert given.text_ids.tolist() == [[entry[0] for entry in row] for row in padded]
        assert given.labels is not None
        assert given.labels.tolist() == [[entry[1] for entry in row] for row in padded]
        assert given.labelled is not None
        assert given.labelled.tolist() == [at for at, entry in enumerate(flat) if entry[1] >= 0]
        at = {entry[2]: place for place, entry in enumerate(flat) if entry[2] >= 0}
        assert given.vision_rows is not None
        assert given.vision_rows.tolist() == [at[number] for number in range(len(at))]
        assert given.token_sources is not None
        assert given.token_sources.tolist() == [row + [0] * (width - len(row)) for row in wanted_sources]
        num_labels += len(given.labelled)
        assert given.image_table == micro_batch.images
    assert num_labels == sum(sum(micro_batch.answer_tokens()) for micro_batch in batch.micro_batches)
    # Somewhere a vision token predicts the answer behind it.
    predicts = [(given.labels.flatten()[given.vision_rows] >= 0).any() for given in inputs if given.labels is not None]
    assert any(predicts)


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["rows", "packed"])
def test_a_stage_without_text_knows_where_vision_stands_in_it(folder: Path, packing: dict[str, int]) -> None:
    config = config_of(NATIVE)
    config = replace(config, injection=METHODS["tokens"](config.model))
    found = []
    for texts in (True, False):
        batch = whole_set(folder, NATIVE, packing, texts)
        found.append(stage_inputs(batch, torch.empty(0, 8), config, torch.device("cpu")))  # no features either
    for with_text, without in zip(*found, strict=True):
        assert (with_text.text_ids.shape, with_text.packed_lengths) == (without.text_ids.shape, without.packed_lengths)
        assert with_text.vision_rows is not None
        assert without.vision_rows is not None
        assert torch.equal(with_text.vision_rows, without.vision_rows)
        assert not without.text_ids.any()
        assert len(without.images) == 0
