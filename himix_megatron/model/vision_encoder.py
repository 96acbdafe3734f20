"""The frozen tower at work for a whole model replica. Flows in: each rank's share of a step's images; out: features of all.

The T x P ranks of a replica split the step's images evenly, encode their shares without gradient in large batches, and
gather: every pipeline stage needs the features, and a tower on one stage, or on each of them anew, would be most of the work.
All images have the same number of patches here, so an even split by patches is one by images (`loading.batch.rank_share`).
`vision.encoder_placement` chooses the two usual ways instead, so that the gain can be measured.

Shapes: K images of a step, n tokens of one image, V width of the features.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..data.loading.batch import rank_share
from ..distributed.topology import Topology
from .towers import Tower

Placement = Literal["replica_sharded", "replicated", "first_stage"]


def encoder_share(encoder_placement: Placement, topology: Topology) -> tuple[int, int]:
    """(rank, ranks) for `rank_share`: which of a step's images this rank reads and encodes; a rank beyond them has none."""
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
        max_images_per_forward: int = 64,
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
        self.max_images_per_forward = max_images_per_forward
        self.feature_shape = tower.feature_shape

    def encode(self, share: Tensor, blank_K: Tensor, num_images: int) -> Tensor:
        """The step's images, of which this rank holds `rank_share(num_images, *place)`, for all ranks of the replica.

        Args: share: pixels uint8 [K_share, 3, H, W], or features [K_share, n, V] that were made before; blank_K: bool [K] of
            all images. From pinned memory (`loading.batch.pinned`) their copies to a GPU do not keep the host waiting.
        Returns: frozen: features [K, n, V]; trainable: pixels uint8 [K, 3, H, W], for a tower that runs inside the model.
        """
        own = rank_share(num_images, self.rank, self.num_encoders)
        assert len(share) == len(own), (len(share), own, num_images)
        share = share.to(self.device, non_blocking=True)
        if share.dtype != torch.uint8:
            share = share.to(self.dtype)
        elif not self.trainable:
            share = self._features(share, blank_K[own.start : own.stop].to(self.device, non_blocking=True))
        return share if self.size == 1 else self._exchange(share, -(-num_images // self.num_encoders))[:num_images]

    @torch.no_grad()
    def _features(self, pixels: Tensor, blank: Tensor) -> Tensor:
        """[K_share, n, V]; at most `max_images_per_forward` images at once bound the memory."""
        features = pixels.new_empty((len(pixels), *self.feature_shape), dtype=self.dtype)
        for first in range(0, len(pixels), self.max_images_per_forward):
            part = slice(first, first + self.max_images_per_forward)
            features[part] = self.tower(pixels[part], blank[part])
        return features

    def _exchange(self, share: Tensor, each: int) -> Tensor:
        """All shares in rank order, [num_encoders * each, ...]: only the last images can be padding."""
        if each == 0:
            return share
        # As bytes: every backend carries them, whatever the dtype.
        sent = F.pad(share.flatten(1), (0, 0, 0, each - len(share))).contiguous().view(torch.uint8)
        received = sent.new_empty((self.num_encoders * each, sent.shape[1]))
        if self.num_encoders == self.size:
            dist.all_gather_into_tensor(received, sent, group=self.group)
        else:
            for source, part in enumerate(torch.split(received, each)):
                if source == self.rank:
                    part.copy_(sent)
                dist.broadcast(part, group=self.group, group_src=source)
        return received.view(share.dtype).view(-1, *share.shape[1:])
