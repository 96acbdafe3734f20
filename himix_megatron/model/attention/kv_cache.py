"""What generation keeps between two tokens: every layer's keys and values of the images and of the text so far.

Earlier keys play vision's part for the text that follows them: every new token sees all of them, but for the holes where a
sample has fewer. So masks and kernels are training's own, with the N of their docstrings counting all earlier slots.

Slots: N of the images | S of the prompts, right-padded | one for each new token, the same slot in every sample. What shorter
prompts leave free stays hidden; positions (RoPE) count a sample's real tokens only.

Shape letters: B samples, N vision tokens, V vision width, S text tokens of this pass, E slots filled before it, C all slots,
L = E + S keys, G key/value heads of this rank, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class KVCache:
    """The keys and values of one micro-batch, on one pipeline stage.

    The first pass through the model takes the whole prompts, each later one a token per sample. `advance` ends a pass;
    a pass may go through several chunks of the model (interleaved pipeline).
    """

    def __init__(
        self, vision_NBV: Tensor, vision_padding_BN: Tensor | None, lengths_B: Tensor, num_prompt: int, max_new_tokens: int
    ):
        """Nothing stored yet.

        Args:
            vision_NBV, vision_padding_BN: as `arrange_features` gives them.
            lengths_B: int64[B], the prompts' tokens; `num_prompt`: to which they are padded.
        """
        self.vision_NBV, self.num_vision = vision_NBV, len(vision_NBV)
        self.num_earlier = self.num_vision
        """E: slots filled before this pass."""
        self.angles_SB1D: Tensor
        """RoPE angles of this pass's text, float[S, B or 1, 1, D]; made by `begin_pass`."""
        self._lengths_B = lengths_B
        self._num_prompt = num_prompt
        self.num_slots = self.num_vision + self._num_prompt + max_new_tokens
        text_BS = torch.arange(self._num_prompt, device=lengths_B.device) >= lengths_B[:, None]
        self._vision_padding_BN, self._has_holes = vision_padding_BN, vision_padding_BN is not None or bool(text_BS.any())
        self._holes_BC = torch.zeros(len(lengths_B), self.num_slots, dtype=torch.bool, device=lengths_B.device)
        if vision_padding_BN is not None:
            self._holes_BC[:, : self.num_vision] = vision_padding_BN
        self._holes_BC[:, self.num_vision : self.num_vision + self._num_prompt] = text_BS
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

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
    def positions(self) -> Tensor:
        """Positions of this pass's text: int64[S, 1] for prompts, int64[1, B] for new tokens."""
        if self.is_new:
            return torch.arange(self._num_prompt, device=self._lengths_B.device)[:, None]
        return (self._lengths_B + self.num_earlier - self.num_vision - self._num_prompt)[None]

    @property
    def last(self) -> Tensor:
        """int64[B]: which of this pass's S tokens is each sample's last."""
        return self._lengths_B - 1 if self.is_new else torch.zeros_like(self._lengths_B)

    def begin_pass(self, rotary: Callable[[int], Tensor]) -> None:
        """Find the angles of this pass's text, once for all layers. `rotary`: RoPE angles float[n, 1, 1, D] of n positions."""
        self.angles_SB1D = rotary(self.num_slots)[self.positions].flatten(2, 3)

    def append(
        self, layer: int, key_SBGD: Tensor, value_SBGD: Tensor, project_vision: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values of this pass's text. Returns: all so far, each float[L, B, G, D], this text's last.

        `project_vision`: the layer's own; called on its first pass only.
        """
        if layer not in self._layers:
            stored = key_SBGD.new_empty((2, self.num_slots, *key_SBGD.shape[1:]))
            self._layers[layer] = (stored[0], stored[1])
            for slots, vision_NBGD in zip(stored, project_vision(self.vision_NBV), strict=True):
                slots[: self.num_vision] = vision_NBGD
        end = self.num_earlier + len(key_SBGD)
        key_CBGD, value_CBGD = self._layers[layer]
        key_CBGD[self.num_earlier : end] = key_SBGD
        value_CBGD[self.num_earlier : end] = value_SBGD
        return key_CBGD[:end], value_CBGD[:end]

    def advance(self) -> None:
        """End a pass: what it stored is earlier from now on."""
        self.num_earlier += self._num_prompt if self.is_new else 1

    def select(self, samples: Sequence[int]) -> None:
        """Forget all samples but these."""
        kept = torch.tensor(samples, device=self._lengths_B.device)
        self._lengths_B, self._holes_BC = self._lengths_B[kept], self._holes_BC[kept]
        self._has_holes = bool(self._holes_BC.any())
        self._layers = {layer: (key[:, kept], value[:, kept]) for layer, (key, value) in self._layers.items()}
