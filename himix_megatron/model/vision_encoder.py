"""The frozen tower at work for a whole model replica. Flows in: each rank's share of a step's images; out: features of all.

The T x P ranks of a replica divide the step's images by their cost (`image_table.divide_images`), encode their shares without
gradient in large batches, and gather: every pipeline stage that takes vision needs the features, and a tower on one stage, or
on each of them anew, would be most of the work. `vision.encoder_placement` chooses the two usual ways instead, so that the gain
can be measured. Stages that take no vision encode their share too, and receive nothing.

Shapes: K images of a step, T their vision tokens, V width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..config import Config
from ..costs.flops import vision_chunks
from ..costs.memory import IMAGES_PER_FORWARD
from ..data.loading.image_table import ImageTable, divide_images, token_batches
from ..distributed.topology import Topology
from .stage_input import to_device
from .towers import Tower


def encoder_share(config: Config, topology: Topology) -> tuple[int, int]:
    """(rank, ranks) for `divide_images`: which of a step's images this rank reads and encodes; a rank beyond them has none."""
    placement = config.vision.encoder_placement
    if placement == "replicated":
        return 0 if topology.replica_rank in feature_ranks(config) else 1, 1
    return topology.replica_rank, topology.tensor_size if placement == "first_stage" else topology.replica_size


def feature_ranks(config: Config) -> tuple[int, ...]:
    """The ranks of a replica whose pipeline stage takes vision."""
    tensor, pipeline, takes = config.parallel.tensor, config.parallel.pipeline, vision_chunks(config)
    return tuple(stage * tensor + rank for stage in range(pipeline) if any(takes[stage::pipeline]) for rank in range(tensor))


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
        receivers: Sequence[int] | None = None,
        max_images_per_forward: int = IMAGES_PER_FORWARD,
    ) -> None:
        """Args:
        group: the replica's ranks; None: this rank has all the images by itself.
        dtype: of the features on the wire and returned.
        device: where they are wanted; None: where the tower is.
        place: this rank among the encoding ones, and their number (`encoder_share`); None: all ranks of the group.
        receivers: ranks of the group that want the images (`feature_ranks`); None: all.
        """
        self.tower, self.group, self.trainable, self.dtype = tower, group, trainable, dtype
        self.device = device or next(tower.parameters()).device
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank, self.num_encoders = place or (dist.get_rank(group) if group is not None else 0, self.size)
        self.receivers = range(self.size) if receivers is None else receivers
        self.max_tokens_per_forward = max_images_per_forward * tower.config.max_tokens_per_image

    def encode(self, share: Tensor, blank_K: Tensor, images: ImageTable) -> Tensor:
        """The step's images, of which this rank holds its part of `divide_images`, for all ranks of the replica.

        Args: share: pixels as `blank_pixels` lays them out, or features [T_share, V] that were made before; blank_K: bool [K]
            of all images; images: all of them. From pinned memory (`loading.batch.pinned`) the copies to a GPU do not keep the
            host waiting.
        Returns: frozen: features [T, V]; trainable: pixels of all images, for a tower that runs inside the model. No row of
            either on a rank that is no receiver.
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
        features = pixels.new_empty((sum(images.tokens), self.tower.config.feature_width), dtype=self.dtype)
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
        # As bytes: every backend carries them, whatever the dtype.
        sent = (share.flatten(1) if share.dim() > 1 else share[:, None]).contiguous().view(torch.uint8)
        to_all = len(self.receivers) == self.size
        received = self._gather(sent, each) if to_all else self._send(sent, own_rows)
        received = received.view(share.dtype).view(-1, *share.shape[1:])
        in_order = [image for part in shares for image in part] == list(range(len(rows)))
        if not len(received) or (in_order and (not to_all or _fills(own_rows, each))):
            return received[: sum(rows)]
        found: dict[int, Tensor] = {}
        blocks = torch.split(received, each if to_all else own_rows)
        for block, part, filled in zip(blocks, shares, own_rows, strict=True):
            found |= zip(part, torch.split(block[:filled], [rows[image] for image in part]), strict=True)
        return torch.cat([found[image] for image in range(len(rows))])

    def _gather(self, sent: Tensor, each: int) -> Tensor:
        """All shares in rank order, [num_encoders * each, bytes], each padded to `each` rows."""
        sent = F.pad(sent, (0, 0, 0, each - len(sent)))
        received = sent.new_empty((self.num_encoders * each, sent.shape[1]))
        if self.num_encoders == self.size:
            dist.all_gather_into_tensor(received, sent, group=self.group)
        else:
            for source, part in enumerate(torch.split(received, each)):
                if source == self.rank:
                    part.copy_(sent)
                dist.broadcast(part, group=self.group, group_src=source)
        return received

    def _send(self, sent: Tensor, own_rows: Sequence[int]) -> Tensor:
        """All shares in rank order, [sum(own_rows), bytes], on the receivers; elsewhere no row. One collective of all ranks:
        sends and receives that each rank starts for itself could wait for each other."""
        outgoing = [len(sent) if rank in self.receivers else 0 for rank in range(self.size)]
        receives = dist.get_rank(self.group) in self.receivers
        incoming = [rows if receives else 0 for rows in own_rows] + [0] * (self.size - len(own_rows))
        received = sent.new_empty((sum(incoming), sent.shape[1]))
        dist.all_to_all_single(received, sent.repeat(len(self.receivers), 1), incoming, outgoing, group=self.group)
        return received


def _fills(own_rows: Sequence[int], each: int) -> bool:
    """Whether shares of so many rows, padded to `each`, follow each other without padding between them."""
    filled = sum(own_rows) // each
    return all(rows == each for rows in own_rows[:filled]) and not any(own_rows[filled + 1 :])
