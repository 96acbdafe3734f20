"""The frozen tower at work for a whole model replica. Flows in: each rank's share of a step's images; out: features of all.

The T x P ranks of a replica split the step's images evenly, encode their shares without gradient in large batches, and
gather: every pipeline stage needs the features, and a tower on one stage, or on each of them anew, would be most of the work.
All images have the same number of patches here, so an even split by patches is one by images (`data.batch.rank_share`).
`vision.encoder_placement` chooses the two usual ways instead, so that the gain can be measured.

Shapes: K images of a step, N tokens of one image, V width of the features (Vh).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..data.loading.batch import rank_share
from ..distributed.topology import Topology
from ..runtime.background_thread import BackgroundThread, WaitInterruptedError, wait_or_interrupt
from .towers import Tower

Placement = Literal["replica_sharded", "replicated", "first_stage"]
Batch = TypeVar("Batch")
Result = TypeVar("Result")


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

        Args: share: pixels uint8 [K_share, 3, H, W], or features [K_share, N, V] that were made before; blank_K: bool [K] of
            all images. From pinned memory (`data.batch.pinned`) their copies to a GPU do not keep the host waiting.
        Returns: frozen: features [K, N, V]; trainable: pixels uint8 [K, 3, H, W], for a tower that runs inside the model.
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
        """[K_share, N, V]; at most `max_images_per_forward` images at once bound the memory."""
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


class FeaturePrefetcher:
    """Encodes the next step while this one trains: on a side stream of the GPU, on a background thread where there is none.

    What it holds is derived from the data, so no checkpoint knows of it. All work is done in the order in which it is asked
    for, the same on every rank, and in a process group of its own (`Topology.encoding`).
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self._thread = BackgroundThread("encode-ahead") if enabled and device.type == "cpu" else None
        self._stream = torch.cuda.Stream(device) if enabled and device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._cuda_index: int | None = None
        if device.type == "cuda":
            self._cuda_index = torch.cuda.current_device() if device.index is None else device.index
        self._reader = BackgroundThread("read")
        """Reads where `_thread` does not, so that the wait for it can be broken off."""
        self._waited_seconds = 0.0

    def steps(
        self,
        batches: Iterable[Batch],
        encode: Callable[[Batch], tuple[Batch, Tensor]],
        stop_requested: Callable[[], bool] = lambda: False,
        keep_going: Callable[[], bool] = lambda: True,
    ) -> Iterator[tuple[Batch, Tensor]]:
        """`encode` of each batch in order; of the next one while the caller works on this one.

        What `batches` or `encode` raise is raised here, when that step's turn comes; with a side stream, when the turn of the
        step before it comes. A wait is broken off when `stop_requested` turns true. `keep_going`, in which all ranks agree,
        is called on this thread once for each step, when this rank has its data or has broken the wait off: where it says no,
        the steps end. So no rank waits in `encode` for one that is still reading, but on a thread that can be left behind.
        """
        source = iter(batches)

        def read() -> Batch | None:
            if self._cuda_index is not None:
                torch.cuda.set_device(self._cuda_index)  # a new thread is on device 0
            return next(source, None)

        coming: Future[Batch | None] | None = None

        def read_together() -> Batch | None:
            nonlocal coming
            batch = agreed(coming or self._reader.start(read))
            if self._cuda_index is not None and batch is not None:
                coming = self._reader.start(read)  # taken from the workers and pinned while the device is at work
            return batch

        def agreed(future: Future[Result | None]) -> Result | None:
            begun = time.perf_counter()
            try:
                result = wait_or_interrupt(future, stop_requested)
            except WaitInterruptedError:
                result = None
            self._waited_seconds += time.perf_counter() - begun
            return result if keep_going() else None

        def work(read: Callable[[], Batch | None]) -> tuple[Batch, Tensor] | None:
            batch = read()
            return None if batch is None else encode(batch)

        def begin() -> Callable[[], tuple[Batch, Tensor] | None]:
            if self._thread is not None:
                future = self._thread.start(lambda: work(read))
                return lambda: agreed(future)
            if self._stream is not None:
                return self._start_on_stream(self._stream, lambda: work(read_together))
            return lambda: work(read_together)

        waiting = begin()
        while (step := waiting()) is not None:
            waiting = begin()
            yield step

    def take_waited_seconds(self) -> float:
        """How long, since it was last asked, training stood still for a step that was not yet read (on a background thread: nor
        encoded)."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until nothing is under way: process groups may end after it, not before. Returns: whether that came in time."""
        return (self._thread or self._reader).drain(seconds)

    def _start_on_stream(
        self, stream: torch.cuda.Stream, work: Callable[[], tuple[Batch, Tensor] | None]
    ) -> Callable[[], tuple[Batch, Tensor] | None]:
        stream.wait_stream(torch.cuda.current_stream())  # the tower's weights are there
        with torch.cuda.stream(stream):
            step = work()
        done = stream.record_event()

        def wait() -> tuple[Batch, Tensor] | None:
            torch.cuda.current_stream().wait_event(done)
            if step is not None:
                # Its memory may not be given to a later step before this stream has read it.
                step[1].record_stream(torch.cuda.current_stream())
            return step

        return wait
