"""The frozen tower at work for a whole model replica. Flows in: each rank's share of a step's images; out: features of all.

The T x P ranks of a replica divide the step's images by their cost (`image_table.divide_images`), encode their shares without
gradient in large batches, and gather: every pipeline stage needs the features, and a tower on one stage, or on each of them
anew, would be most of the work. `vision.encoder_placement` chooses the two usual ways instead, so that the gain can be
measured.

Shapes: K images of a step, T their vision tokens, V width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..costs.memory import IMAGES_PER_FORWARD
from ..data.loading.image_table import ImageTable, divide_images, token_batches
from ..distributed.topology import Topology
from .stage_input import to_device
from .towers import Tower

Placement = Literal["replica_sharded", "replicated", "first_stage"]


def encoder_share(encoder_placement: Placement, topology: Topology) -> tuple[int, int]:
    """(rank, ranks) for `divide_images`: which of a step's images this rank reads and encodes; a rank beyond them has none."""
    if encoder_placement == "replicated":
        return 0, 1
    return topology.replica_rank, topology.tensor_size if encoder_placement == "first_stage" else topology.replica_size


class ShardedVisionEncoder:
    """A step's images for all ranks of a replica, of which each brings the share that `place` gives it.

    Every rank of the group must call `encode` at the same step with the same number of images.
    """

    def __init__(
        self,
        tower: Tower,
        group: dist.ProcessGroup | None,
        trainable: bool,
        dtype: torch.dtype,
        *,
        device: torch.device | None = None,
        place: tuple[int, int] | None = None,
        max_images_per_forward: int = IMAGES_PER_FORWARD,
    ) -> None:
        """Args:
        group: the replica's ranks; None: this rank has all the images by itself.
        dtype: of the features on the wire and returned.
        device: where they are wanted; None: where the tower is.
        place: this rank among the encoding ones, and their number (`encoder_share`); None: all ranks of the group.
        """
        self.tower, self.group, self.trainable, self.dtype = tower, group, trainable, dtype
        self.device = device or next(tower.parameters()).device
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank, self.num_encoders = place or (dist.get_rank(group) if group is not None else 0, self.size)
        self.max_tokens_per_forward = max_images_per_forward * tower.config.max_tokens_per_image

    def encode(self, share: Tensor, blank_K: Tensor, images: ImageTable) -> Tensor:
        """The step's images, of which this rank holds its part of `divide_images`, for all ranks of the replica.

        Args: share: pixels as `blank_pixels` lays them out, or features [T_share, V] that were made before; blank_K: bool [K]
            of all images; images: all of them. From pinned memory (`loading.batch.pinned`) the copies to a GPU do not keep the
            host waiting.
        Returns: frozen: features [T, V]; trainable: pixels of all images, for a tower that runs inside the model.
        """
        shares = divide_images(images, self.tower.config, self.num_encoders)
        own = shares[self.rank] if self.rank < self.num_encoders else []
        share = share.to(self.device, non_blocking=True)
        if share.dtype != torch.uint8:
            share = share.to(self.dtype)
        elif not self.trainable:
            share = self._features(share, to_device(blank_K[own], self.device), images.images_of(own))
        return share if self.size == 1 else self._exchange(share, images.rows(share), shares)

    @torch.no_grad()
    def _features(self, pixels: Tensor, blank: Tensor, images: ImageTable) -> Tensor:
        """[T_share, V]; only so many vision tokens at once bound the memory."""
        features = pixels.new_empty((sum(images.tokens), self.tower.config.hidden_size), dtype=self.dtype)
        parts = token_batches(images.tokens, self.max_tokens_per_forward)
        rows = images.rows(pixels)
        into = torch.split(features, [sum(images.tokens[part]) for part in parts])
        given = torch.split(pixels, [sum(rows[part]) for part in parts])
        for place, of_part, part in zip(into, given, parts, strict=True):
            place.copy_(self.tower.features(of_part, blank[part], images.sizes[part]))
        return features

    def _exchange(self, share: Tensor, rows: Sequence[int], shares: Sequence[Sequence[int]]) -> Tensor:
        """All shares, in the order of the images. `rows`: of each image in the tensor of all."""
        own_rows = [sum(rows[image] for image in part) for part in shares]
        each = max(own_rows)
        if each == 0:
            return share
        received = self._gather(share, each)
        if [image for part in shares for image in part] == list(range(len(rows))) and _fills(own_rows, each):
            return received[: sum(rows)]
        found: dict[int, Tensor] = {}
        for block, part, filled in zip(torch.split(received, each), shares, own_rows, strict=True):
            found |= zip(part, torch.split(block[:filled], [rows[image] for image in part]), strict=True)
        return torch.cat([found[image] for image in range(len(rows))])

    def _gather(self, share: Tensor, each: int) -> Tensor:
        """All shares in rank order, [num_encoders * each, ...], each padded to `each` rows."""
        # As bytes: every backend carries them, whatever the dtype.
        flat = share.flatten(1) if share.dim() > 1 else share[:, None]
        sent = F.pad(flat, (0, 0, 0, each - len(share))).contiguous().view(torch.uint8)
        received = sent.new_empty((self.num_encoders * each, sent.shape[1]))
        if self.num_encoders == self.size:
            dist.all_gather_into_tensor(received, sent, group=self.group)
        else:
            for source, part in enumerate(torch.split(received, each)):
                if source == self.rank:
                    part.copy_(sent)
                dist.broadcast(part, group=self.group, group_src=source)
        return received.view(share.dtype).view(-1, *share.shape[1:])


def _fills(own_rows: Sequence[int], each: int) -> bool:
    """Whether shares of so many rows, padded to `each`, follow each other without padding between them."""
    filled = sum(own_rows) // each
    return all(rows == each for rows in own_rows[:filled]) and not any(own_rows[filled + 1 :])
