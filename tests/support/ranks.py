"""Run a function on several real ranks: one process each, gloo, one thread, on this machine.

Plain processes instead of a test plugin: a failing rank's traceback is the error, and a hang ends at a timeout.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from himix_megatron.runtime.process import free_port
from himix_megatron.runtime.stop_signals import FAILED
from tests.support import skip_if_fast


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 180.0, start_gloo: bool = True
) -> list[Any]:
    """Call `fn(*args)` on every rank of a world of its own and return the ranks' results in order.

    `fn` is a module-level function, args and results are picklable. Each process has RANK, LOCAL_RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT, as torchrun sets them. With `start_gloo` torch.distributed is started before `fn` and
    ended after it; without, `fn` starts it itself.

    Raises: RuntimeError with the traceback of the first rank that failed, TimeoutError naming the ranks still running.
    """
    skip_if_fast("ranks")
    # Forked from a server that has torch and megatron-core loaded: they take 3 seconds of a core to import, for each rank.
    context = multiprocessing.get_context("forkserver")  # started by conftest.py
    port = free_port()
    ranks: list[tuple[Any, Connection]] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(fn, args, rank, world_size, port, timeout_seconds, start_gloo, theirs))
            child.start()
            theirs.close()
            ranks.append((child, ours))
        results = _collect(ranks, timeout_seconds)
        for child, _ in ranks:
            child.join(20)
        return results
    finally:
        for child, ours in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
            ours.close()


def _collect(ranks: list[tuple[Any, Connection]], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, str]] = []  # when, and what
    waiting = {ours: rank for rank, (_, ours) in enumerate(ranks)}
    deadline = time.monotonic() + timeout_seconds
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} still run after {timeout_seconds:.0f} s")
        for ours in ready:
            assert isinstance(ours, Connection)
            rank = waiting.pop(ours)
            try:
                failed_at, outcome = pickle.loads(ours.recv_bytes())
            except EOFError:
                ranks[rank][0].join(5)
                code = ranks[rank][0].exitcode
                if code != FAILED:
                    raise RuntimeError(f"rank {rank} died with exit code {code}") from None
                # Its watchdog ended it because another rank failed, which may be heard later.
                failures.append((math.inf, f"rank {rank} died with exit code {code}"))
                continue
            if failed_at is None:
                results[rank] = outcome
            else:
                failures.append((failed_at, f"rank {rank} failed:\n{outcome}"))
        if failures:
            # Its peers fail after it, for want of it, and may be heard first: wait a moment, and name the one to blame.
            deadline = min(deadline, time.monotonic() + (10 if min(failures)[0] == math.inf else 1))
            if not wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                break
    if failures:
        raise RuntimeError(min(failures)[1])
    return [results[rank] for rank in range(len(ranks))]


def _child(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    timeout_seconds: float,
    start_gloo: bool,
    pipe: Connection,
) -> None:
    os.setpgid(0, 0)  # so that whatever this rank starts can be ended with it
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if start_gloo:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
        result = fn(*args)
        # Plain pickle, not torch's: a tensor travels as bytes instead of shared memory that ends with this process.
        pipe.send_bytes(pickle.dumps((None, result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((time.time(), traceback.format_exc())))
    finally:
        pipe.close()
        # Peers may still be inside a collective with this rank: leave together when all went well, at once otherwise.
        if dist.is_initialized() and start_gloo:
            dist.destroy_process_group()
