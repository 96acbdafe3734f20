"""What generation keeps between two tokens: every layer's keys and values of the images and of the text so far.

Earlier keys play vision's part for the text that follows them: every new token sees all of them, but for the holes where a
sample has fewer, and for images that the choices hide from it. So masks and kernels are training's own, with the N of their
docstrings counting all earlier slots.

Slots: N of the images | S of the prompts, right-padded | one for each new token, the same slot in every sample. What shorter
prompts leave free stays hidden; positions (RoPE) count a sample's real tokens only. A layer that takes up no vision has no
slots for it.

Shape letters: B samples, N vision tokens, X channels of the context, S text tokens of this pass, E slots filled before it, C
all slots, L = E + S keys, G key/value heads of this rank, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import InjectionConfig
from ...config.injection import HIMIX
from ...data.loading.image_table import ImageTable
from .backends import TorchMixtureAttention

Project = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""A layer's keys and values, each float[N, B, G, D], from the context float[N, B, X] and the angles of its keys."""


@dataclass(frozen=True, slots=True)
class Masks:
    """What the text of one pass sees: bool[B or 1, 1, S, keys], True where it does."""

    joint: Tensor
    """Vision and text."""
    text: Tensor
    """Text alone."""
    seen: Tensor
    """Vision, and where the choices say so the text since the latest image."""
    blind: Tensor | None
    """bool[B or 1, 1, S, 1]: text that sees nothing of that; None: there is none such."""


class KVCache:
    """The keys and values of one micro-batch, on one pipeline stage.

    The first pass through the model takes the whole prompts, each later one a token per sample. `advance` ends a pass;
    a pass may go through several chunks of the model (interleaved pipeline).
    """

    def __init__(
        self,
        images: ImageTable,
        lengths_B: Tensor,
        num_prompt: int,
        max_new_tokens: int,
        injection: InjectionConfig = HIMIX,
    ):
        """Nothing stored yet.

        Args:
            images: of the B samples, with their vision tokens after `reduce`.
            lengths_B: int64[B], the prompts' tokens; `num_prompt`: to which they are padded.
        """
        device = lengths_B.device
        self.injection = injection
        self.sample_tokens = [0] * len(images.per_sample) if injection.in_sequence else images.sample_tokens()
        """Vision tokens of each sample."""
        self.num_vision = max(self.sample_tokens)
        self.num_earlier = self.num_vision
        """E: slots filled before this pass."""
        self.context_NBX: Tensor | None = None
        """What vision_input.py made of the features, by sample."""
        self.angles_SB1D: Tensor
        """RoPE angles of this pass's text, float[S, B or 1, 1, D]; made by `begin_pass`, as are the next two."""
        self.masks: Masks
        self._vision_angles: Tensor | None = None
        self._lengths_B = lengths_B
        self._num_prompt = num_prompt
        self.num_slots = self.num_vision + num_prompt + max_new_tokens
        text_BS = torch.arange(num_prompt, device=device) >= lengths_B[:, None]
        self._vision_padding_BN = None
        if min(self.sample_tokens) < self.num_vision:
            tokens_B1 = torch.tensor(self.sample_tokens, device=device)[:, None]
            self._vision_padding_BN = torch.arange(self.num_vision, device=device) >= tokens_B1
        self._has_holes = self._vision_padding_BN is not None or bool(text_BS.any())
        self._holes_BC = torch.zeros(len(lengths_B), self.num_slots, dtype=torch.bool, device=device)
        if self._vision_padding_BN is not None:
            self._holes_BC[:, : self.num_vision] = self._vision_padding_BN
        self._holes_BC[:, self.num_vision : self.num_vision + num_prompt] = text_BS
        self._image_BN, self._places_BN = _by_sample(images, self.sample_tokens, lengths_B)
        self._layers: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    @property
    def is_new(self) -> bool:
        """Whether this pass takes the prompts."""
        return self.num_earlier == self.num_vision

    @property
    def padding(self) -> Tensor | None:
        """bool[B, E], True for an earlier slot that the sample does not use; None: there is none such."""
        if self.is_new:
            return self._vision_padding_BN
        return self._holes_BC[:, : self.num_earlier] if self._has_holes else None

    @property
    def text_numbers(self) -> Tensor:
        """Which text token of its sample each of this pass is: int64[S, 1] for prompts, int64[1, B] for new tokens."""
        if self.is_new:
            return torch.arange(self._num_prompt, device=self._lengths_B.device)[:, None]
        return (self._lengths_B + self.num_earlier - self.num_vision - self._num_prompt)[None]

    @property
    def last(self) -> Tensor:
        """int64[B]: which of this pass's S tokens is each sample's last."""
        return self._lengths_B - 1 if self.is_new else torch.zeros_like(self._lengths_B)

    def take_context(self, context_TX: Tensor) -> None:
        """What vision_input.py made of the features, float[T, X]: kept by sample. Chunks of one stage make the same."""
        if self.context_NBX is None and not self.injection.in_sequence:
            self.context_NBX = torch.nn.utils.rnn.pad_sequence(list(torch.split(context_TX, self.sample_tokens)))

    def begin_pass(self, rotary: Callable[[int], Tensor]) -> None:
        """Find what all layers share in this pass: the angles of its text, and what it sees. `rotary`: RoPE angles float[n, 1,
        1, D] of n positions."""
        angles, numbers_SB = rotary(self.num_slots), self.text_numbers
        if self.injection.position == "rotary":
            is_before_SBN = self._places_BN[None] <= numbers_SB[..., None]
            numbers_SB = numbers_SB + (is_before_SBN & (self._image_BN >= 0)).sum(-1)
        if self.injection.position in ("rotary", "rotary_image") and self.is_new:
            numbers_BN = self._places_BN
            if self.injection.position == "rotary":
                numbers_BN = numbers_BN + torch.arange(self.num_vision, device=numbers_BN.device)
            self._vision_angles = angles[numbers_BN.t()].flatten(2, 3)
        self.angles_SB1D = angles[numbers_SB].flatten(2, 3)
        self.masks = self._masks()

    def _masks(self) -> Masks:
        num_text = self._num_prompt if self.is_new else 1
        joint = TorchMixtureAttention.mixture_mask(num_text, self.num_earlier, self.padding, self._lengths_B.device)
        vision, text = joint[..., : self.num_vision], joint[..., self.num_vision :]
        if not self.injection.needs_places and self.injection.fusion == "joint":
            return Masks(joint, text, vision, None)
        numbers_BS1 = self.text_numbers.t().expand(len(self._lengths_B), -1)[..., None]
        is_earlier_BSN = (self._places_BN[:, None] <= numbers_BS1) & (self._image_BN >= 0)[:, None]
        latest_BS1 = torch.where(is_earlier_BSN, self._places_BN[:, None], -1).amax(-1, keepdim=True) if self.num_vision else (
            torch.full_like(numbers_BS1, -1)
        )  # fmt: skip
        if self.injection.visibility == "all":
            seen = vision
        elif self.injection.visibility == "earlier":
            seen = vision & is_earlier_BSN[:, None]
        else:
            seen = vision & (is_earlier_BSN & (self._places_BN[:, None] == latest_BS1))[:, None]
        joint = _joined(seen, text)
        blind = ~seen.any(-1, keepdim=True)
        if self.injection.local_text:
            since = torch.arange(text.shape[-1], device=text.device) >= latest_BS1
            seen = _joined(seen, text & since[:, None] & ~blind)
        return Masks(joint, text, seen, blind)

    def append(self, layer: int, key_SBGD: Tensor, value_SBGD: Tensor, project_vision: Project | None) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of this pass's text. Returns: all so far, each float[L, B, G, D], this text's last.

        `project_vision`: the layer's own, called on its first pass only; None: it takes up no vision.
        """
        num_vision = 0 if project_vision is None else self.num_vision
        if (layer, False) not in self._layers:
            stored = key_SBGD.new_empty((2, self.num_slots - self.num_vision + num_vision, *key_SBGD.shape[1:]))
            self._layers[layer, False] = (stored[0], stored[1])
            if project_vision is not None:
                for slots, vision_NBGD in zip(stored, self._projected(project_vision), strict=True):
                    slots[:num_vision] = vision_NBGD
        begin = self.num_earlier - self.num_vision + num_vision
        end = begin + len(key_SBGD)
        key_CBGD, value_CBGD = self._layers[layer, False]
        key_CBGD[begin:end] = key_SBGD
        value_CBGD[begin:end] = value_SBGD
        return key_CBGD[:end], value_CBGD[:end]

    def vision_of(self, layer: int, project_vision: Project) -> tuple[Tensor, Tensor]:
        """Keys and values of the images alone, each float[N, B, G, D], of a block of its own."""
        if (layer, True) not in self._layers:
            self._layers[layer, True] = self._projected(project_vision)
        return self._layers[layer, True]

    def _projected(self, project_vision: Project) -> tuple[Tensor, Tensor]:
        assert self.context_NBX is not None
        return project_vision(self.context_NBX, self._vision_angles)

    def advance(self) -> None:
        """End a pass: what it stored is earlier from now on."""
        self.num_earlier += self._num_prompt if self.is_new else 1

    def select(self, samples: Sequence[int]) -> None:
        """Forget all samples but these."""
        kept = torch.tensor(samples, device=self._lengths_B.device)
        self._lengths_B, self._holes_BC = self._lengths_B[kept], self._holes_BC[kept]
        self._image_BN, self._places_BN = self._image_BN[kept], self._places_BN[kept]
        self._has_holes = bool(self._holes_BC.any())
        self._layers = {layer: (key[:, kept], value[:, kept]) for layer, (key, value) in self._layers.items()}


def _joined(vision: Tensor, text: Tensor) -> Tensor:
    """Both masks along the keys; of one sample for all where a mask is so."""
    number = max(len(vision), len(text))
    return torch.cat((vision.expand(number, -1, -1, -1), text.expand(number, -1, -1, -1)), dim=-1)


def _by_sample(images: ImageTable, sample_tokens: Sequence[int], lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of each vision slot, int64[B, N]: its image's number in the sample (-1: not used), and the image's place."""
    shape = (len(sample_tokens), max(sample_tokens))
    image, places = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    first = 0
    for row, (count, length) in enumerate(zip(images.per_sample, lengths_B.tolist(), strict=True)):
        filled = 0
        for k in range(count if shape[1] else 0):
            slots = slice(filled, filled + images.tokens[first + k])
            image[row, slots] = k
            places[row, slots] = min(images.places[first + k], length) if images.places else 0
            filled = slots.stop
        first += count
    return image.to(lengths_B.device), places.to(lengths_B.device)
