"""Reads and encodes the next step's images while the current step trains. Flows in: batches; out: the same with their images.

Three ways, of which the device and `vision.prefetch_features` choose one:

    CPU, prefetching    a background thread reads and encodes step k + 1 while step k trains
    GPU, prefetching    a background thread reads step k + 2; step k + 1 is encoded on a side stream while step k trains
    no prefetching      each step is read, then encoded, when it is asked for
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from ..runtime.background_thread import BackgroundThread
from ..runtime.stop_signals import StopConsensus

Batch = TypeVar("Batch")
Result = TypeVar("Result")


class FeaturePrefetcher:
    """Encodes the next step while this one trains.

    What it holds is derived from the data, so no checkpoint knows of it. All work is done in the order in which it is asked
    for, the same on every rank, and in a process group of its own (`Topology.encoding`).
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self._thread = BackgroundThread("prefetch")
        self._encodes_on_thread = enabled and device.type == "cpu"
        self._stream = torch.cuda.Stream(device) if enabled and device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._cuda_index: int | None = None
        if device.type == "cuda":
            self._cuda_index = torch.cuda.current_device() if device.index is None else device.index
        self._waited_seconds = 0.0

    def steps(
        self,
        batches: Iterable[Batch],
        encode: Callable[[Batch], tuple[Batch, Tensor]],
        stop: StopConsensus | None = None,
    ) -> Iterator[tuple[Batch, Tensor]]:
        """`encode` of each batch, in order. The steps end early where `stop`, which is asked once for each, says so.

        What `batches` or `encode` raise is raised here, when that step's turn comes; with a side stream, when the turn of the
        step before it comes.
        """
        source = iter(batches)

        def read() -> Batch | None:
            if self._cuda_index is not None:
                torch.cuda.set_device(self._cuda_index)  # a new thread is on device 0
            return next(source, None)

        def read_and_encode() -> tuple[Batch, Tensor] | None:
            batch = next(source, None)
            return None if batch is None else encode(batch)

        if self._encodes_on_thread:
            return self._on_thread(read_and_encode, stop, ahead=True)
        # `encode` is a collective: here it follows the consensus, so that no rank waits in it for one that is still reading.
        read_batches = self._on_thread(read, stop, ahead=self._cuda_index is not None)
        return map(encode, read_batches) if self._stream is None else self._on_stream(self._stream, read_batches, encode)

    def _on_thread(self, call: Callable[[], Result | None], stop: StopConsensus | None, *, ahead: bool) -> Iterator[Result]:
        """Results of a call that is made on the thread, up to the first None or the stop. `ahead`: the next call is made while
        the caller works on this result."""
        future = self._thread.start(call)
        while True:
            begun = time.perf_counter()
            result = stop.wait(future) if stop else future.result()
            self._waited_seconds += time.perf_counter() - begun
            if (stop and not stop.keep_going()) or result is None:
                return
            if ahead:
                future = self._thread.start(call)
            yield result
            if not ahead:
                future = self._thread.start(call)

    def _on_stream(
        self, stream: torch.cuda.Stream, batches: Iterator[Batch], encode: Callable[[Batch], tuple[Batch, Tensor]]
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Steps whose images are encoded on the side stream, the next one's while the caller works on this one."""
        coming: tuple[tuple[Batch, Tensor], torch.cuda.Event] | None = None
        for batch in batches:
            stream.wait_stream(torch.cuda.current_stream())  # the tower's weights are there
            with torch.cuda.stream(stream):
                step = encode(batch)
            ready, coming = coming, (step, stream.record_event())
            if ready is not None:
                yield _use_on_current_stream(*ready)
        if coming is not None:
            yield _use_on_current_stream(*coming)

    def take_waited_seconds(self) -> float:
        """How long, since it was last asked, training waited for a step that was not yet read (with prefetching on the CPU: nor
        encoded)."""
        waited, self._waited_seconds = self._waited_seconds, 0.0
        return waited

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until no call is under way: process groups may end after it, not before. Returns: whether that came in time."""
        return self._thread.drain(seconds)


def _use_on_current_stream(step: tuple[Batch, Tensor], done: torch.cuda.Event) -> tuple[Batch, Tensor]:
    torch.cuda.current_stream().wait_event(done)
    # Its memory may not be given to a later step before this stream has read it.
    step[1].record_stream(torch.cuda.current_stream())
    return step
