"""A dead, failed or hung rank ends all ranks, soon, and is named."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import selectors
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from himix_megatron.monitoring.run_status import read_status
from himix_megatron.runtime.process import free_port
from tests.support.processes import Ranks, resilience_config


def die_while_others_compute(rank: int, point: str, count: int) -> None:
    if point == "step/forward" and count == 5:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        matrix = torch.ones(600, 600)
        while True:
            matrix @ matrix


def die_before_the_collective(rank: int, point: str, count: int) -> None:
    if rank == 1 and point == "step/collective" and count == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def die_while_others_read(rank: int, point: str, count: int) -> None:
    if point == "data/wait" and count == 3:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def die_while_others_save(rank: int, point: str, count: int) -> None:
    if point == "save/begin":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def die_as_rank_0_while_others_compute(rank: int, point: str, count: int) -> None:
    if point == "step/forward" and count == 5:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@pytest.mark.parametrize(
    ("plan", "victim"),
    [
        (die_while_others_compute, 1),
        (die_before_the_collective, 1),
        (die_while_others_read, 1),
        (die_while_others_save, 1),
        (die_as_rank_0_while_others_compute, 0),
    ],
    ids=["in compute", "in a collective", "in a data wait", "in a save", "of rank 0, in compute"],
)
def test_a_killed_rank_ends_all_within_two_seconds(mixed_dataset: Path, tmp_path: Path, plan: object, victim: int) -> None:
    with Ranks(resilience_config(mixed_dataset, tmp_path, steps=3), 2, plan) as ranks:  # type: ignore[arg-type]
        codes = ranks.codes()
        assert codes[victim] == -signal.SIGKILL
        assert codes[1 - victim] == 1
        assert max(ranks.ended_at.values()) - ranks.ended_at[victim] <= 2
        assert f"rank {victim} died" in ranks.log(1 - victim)


def fail(rank: int, point: str, count: int) -> None:
    if point == "step/forward" and count == 5:
        if rank == 1:
            raise RuntimeError("the card is on fire")
        time.sleep(60)


def test_a_failed_rank_ends_all_and_says_why(mixed_dataset: Path, tmp_path: Path) -> None:
    with Ranks(resilience_config(mixed_dataset, tmp_path), 2, fail) as ranks:
        assert ranks.codes() == [1, 1]
        assert abs(ranks.ended_at[0] - ranks.ended_at[1]) <= 2
        assert "rank 1 failed: RuntimeError: the card is on fire; shutting down this rank" in ranks.log(0)
        assert "Traceback" in ranks.log(1)
        assert "Traceback" not in ranks.log(0)


def stop_for_good(rank: int, point: str, count: int) -> None:
    if rank == 1 and point == "step/forward" and count == 3:
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_named_and_the_others_show_their_stacks(mixed_dataset: Path, tmp_path: Path) -> None:
    config = resilience_config(mixed_dataset, tmp_path, timeout_seconds=4, train={"global_batch_samples": 6})
    with Ranks(config, 3, stop_for_good) as ranks:
        assert ranks.codes(timeout_seconds=30, but=1) == [1, None, 1]
        for rank in (0, 2):
            assert "no progress for 4 s: rank 1 does not answer" in ranks.log(rank)
            assert "train_step.py" in ranks.log(rank)
            assert "most recent call first" in ranks.log(rank)


def sleep_for_ever(rank: int, point: str, count: int) -> None:
    if rank == 1 and point == "step/backward" and count == 3:
        time.sleep(3600)


def test_a_hang_ends_with_the_stacks_of_all_ranks(mixed_dataset: Path, tmp_path: Path) -> None:
    with Ranks(resilience_config(mixed_dataset, tmp_path, timeout_seconds=4), 2, sleep_for_ever) as ranks:
        assert ranks.codes(timeout_seconds=30) == [1, 1]
        assert "rank 1 is the farthest behind, at step/backward" in ranks.log(0)
        assert "in sleep_for_ever" in ranks.log(1)
        assert "most recent call first" in ranks.log(0)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code) == ("failed", 1)
    assert "rank 1 is the farthest behind, at step/backward" in str(status.reason)


def hold_pythons_lock(rank: int, point: str, count: int) -> None:
    if rank == 1 and point == "step/forward" and count == 5:
        ctypes.PyDLL(None).sleep(60)


def test_a_rank_stuck_in_native_code_shows_its_stack_too(mixed_dataset: Path, tmp_path: Path) -> None:
    with Ranks(resilience_config(mixed_dataset, tmp_path, timeout_seconds=4), 2, hold_pythons_lock) as ranks:
        assert ranks.codes(timeout_seconds=30) == [1, 1]
        assert "rank 1 does not answer" in ranks.log(0)
        assert "in hold_pythons_lock" in ranks.log(1)


def watch_over(world_size: int, port: int, folder: Path) -> None:
    """Rank 0 of a run whose other ranks are played by the test."""
    from himix_megatron.resilience.watchdog import Watchdog
    from himix_megatron.resilience.watchdog_links import accept
    from himix_megatron.runtime import log
    from himix_megatron.runtime.stop_signals import StopRequest

    log.start(folder, 0, world_size)
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    watchdog = Watchdog(StopRequest(), folder, rank=0, world_size=world_size, timeout_seconds=60)
    watchdog.links = accept(listener, world_size, "secret", 60)
    with watchdog:
        time.sleep(60)


def test_two_thousand_ranks_are_watched_and_strangers_turned_away(tmp_path: Path) -> None:
    port, world_size = free_port(), 2001
    hub = multiprocessing.get_context("forkserver").Process(target=watch_over, args=(world_size, port, tmp_path))
    hub.start()
    peers: list[socket.socket] = []
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        for rank in range(1, world_size):
            peers.append(socket.create_connection(("127.0.0.1", port)))
            peers[-1].sendall(f"secret {rank}\n".encode())
        assert stranger.recv(100) == b""
        for peer in peers:
            assert peer.recv(7) == b"welcome"
        victim = peers.pop(1233)
        killed_at = time.monotonic()
        victim.close()
        waiting = selectors.DefaultSelector()
        for peer in peers:
            waiting.register(peer, selectors.EVENT_READ)
        while waiting.get_map():
            ready = waiting.select(5)
            assert ready, f"{len(waiting.get_map())} ranks heard nothing"
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                assert b"rank 1234 died" in key.fileobj.recv(4096)
                waiting.unregister(key.fileobj)
        assert time.monotonic() - killed_at <= 2
    finally:
        hub.kill()
        hub.join()
        for peer in peers:
            peer.close()
