"""Does the exported folder compute what our model does? One fixed input through both.

Flows in: the folder, and our logits and answers on `fixed_input`; out: the largest differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import Config
from ...data.loading.image_table import ImageTable
from ...inference.generator import Answerer, Prompt
from ...model.schedule import run_logits
from ...model.stage_input import StageInput

NUM_NEW_TOKENS = 8
"""Of each answer."""


@dataclass(frozen=True, slots=True)
class FixedInput:
    """Three samples: of one image, of two and of none, with texts of different lengths."""

    text_ids: Tensor
    """int64[B, S], right-padded with 0."""
    text_lengths: Tensor
    """int64[B]."""
    pixels: Tensor
    """uint8[K, 3, H, W], in the order of the samples."""
    images_per_sample: tuple[int, ...]
    image_places: tuple[tuple[int, ...], ...] = ((4,), (0, 7), ())
    """Of each sample: text tokens before each image."""

    def pixels_of(self, sample: int) -> Tensor:
        """uint8[images, 3, H, W]."""
        return torch.split(self.pixels, list(self.images_per_sample))[sample]


def fixed_input(config: Config) -> FixedInput:
    """The same for two runs of one vocabulary and image size."""
    random = torch.Generator().manual_seed(20)
    lengths = torch.tensor([9, 12, 5])
    ids = torch.randint(config.model.vocab_size, (3, 12), generator=random)
    ids = ids.masked_fill(torch.arange(12) >= lengths[:, None], 0)
    size = config.vision.image_size
    pixels = torch.randint(256, (3, 3, size, size), generator=random, dtype=torch.uint8)
    return FixedInput(ids, lengths, pixels, (1, 2, 0))


@torch.no_grad()
def himix_outcome(answerer: Answerer, given: FixedInput) -> tuple[Tensor, list[list[int]]]:
    """Our own logits, float[B, S, vocab], and answers, of a model that is whole on this rank."""
    model, device = answerer.config.model, answerer.topology.device
    counts = tuple(max(count, model.images_without) for count in given.images_per_sample)
    blank = torch.tensor([k >= own for own, all_ in zip(given.images_per_sample, counts, strict=True) for k in range(all_)])
    pixels = given.pixels.new_zeros(len(blank), *given.pixels.shape[1:])
    pixels[~blank] = given.pixels
    vision = answerer.config.vision
    places = [own or (0,) * count for own, count in zip(given.image_places, counts, strict=True)]
    images = ImageTable.of(vision, [[vision.blank_size] * count for count in counts], places)
    features = answerer.encoder.encode(pixels, blank, images)
    inputs = StageInput(given.text_ids.to(device), features, blank.to(device), images)
    (logits,) = run_logits(answerer.model_chunks, [inputs], lambda _, logits: logits)
    prompts = [
        Prompt(ids[:length].numpy(), tuple(given.pixels_of(sample).numpy()), given.image_places[sample])
        for sample, (ids, length) in enumerate(zip(given.text_ids, given.text_lengths, strict=True))
    ]
    return logits[..., : model.vocab_size].cpu(), answerer.answer(prompts, (), NUM_NEW_TOKENS)


@torch.no_grad()
def parity(out: Path, config: Config, given: FixedInput, logits: Tensor, answers: list[list[int]]) -> tuple[float, float]:
    """The largest difference between our logits of a fixed input and the exported folder's; and by how much its logits prefer
    another token than that of our answers, up to the first such token of each.

    The folder is loaded as a user would, by transformers with the code that lies in it; padding is compared nowhere.
    Raises: ValueError if the folder's weights are not those that its code wants.
    """
    model = load_exported(out).float()
    most = max(given.images_per_sample)
    pixels = torch.zeros(len(given.images_per_sample), most, *given.pixels.shape[1:])
    places = torch.tensor([[*own, *[0] * (most - len(own))] for own in given.image_places])
    mean, std = torch.tensor([config.vision.pixel_mean, config.vision.pixel_std]).view(2, 3, 1, 1)
    for sample, count in enumerate(given.images_per_sample):
        pixels[sample, :count] = (given.pixels_of(sample).float() / 255 - mean) / std
    real = torch.arange(given.text_ids.shape[1]) < given.text_lengths[:, None]
    images = {"pixel_values": pixels, "num_images": torch.tensor(given.images_per_sample), "image_places": places}
    theirs = model(given.text_ids, attention_mask=real.long(), **images).logits
    model.generation_config.eos_token_id = None  # as long as ours
    preferred = [0.0]
    for sample, (length, answer) in enumerate(zip(given.text_lengths.tolist(), answers, strict=True)):
        own = {name: tensor[sample : sample + 1] for name, tensor in images.items()}
        found = model.generate(
            given.text_ids[sample : sample + 1, :length], **own, max_new_tokens=NUM_NEW_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        gaps = (float(step[0].max() - step[0, token]) for token, step in zip(answer, found.logits, strict=True))
        preferred.append(next((gap for gap in gaps if gap != 0), 0.0))
    return float((theirs.float() - logits.float().cpu())[real].abs().max()), max(preferred)


def load_exported(out: Path) -> Any:
    """The folder's model. Raises: ValueError if weights are missing, left over or of another shape."""
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(
        str(out), trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{out}: {kind.replace('_', ' ')} {sorted(map(str, report[kind]))[:3]}")
    return model.eval()
