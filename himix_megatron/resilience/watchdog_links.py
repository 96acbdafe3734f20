"""The watchdog's connections: a star of TCP connections to rank 0, which carry one JSON object per line.

Flows in: ranks that have met in torch.distributed; out: on rank 0 a link to each other rank, on the others one to rank 0. They
recognise each other by a secret that rank 0 draws and broadcasts; other connections are turned away.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..distributed.launch import address_of
from ..distributed.topology import Topology
from ..runtime import typed_json
from ..runtime.errors import RankError
from ..runtime.process import allow_files

SEND_SECONDS = 2.0
"""How long a peer that reads nothing is waited for."""
_WELCOME = b"welcome"
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(slots=True)
class PeerLink:
    """One connection between rank 0 and another."""

    socket: socket.socket
    rank: int
    """The other end."""
    received: bytearray = field(default_factory=bytearray)
    said_goodbye: bool = False
    """Then it may close without having died."""

    def send(self, kind: str, **facts: Any) -> None:
        """Send a message. A closed connection is noticed by reading."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps({"kind": kind} | facts).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any] | None]:
        """The messages that have arrived; None: the connection is closed."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        self.received += data
        *whole, rest = self.received.split(b"\n")
        self.received = bytearray(rest)
        for line in whole:
            yield typed_json.parse_object(bytes(line), f"a message of rank {self.rank}")
        if not data:
            yield None


def connect_ranks(topology: Topology, host: str, timeout_seconds: float) -> dict[int, PeerLink]:
    """Connect the ranks. `host`: of rank 0. Returns: links by rank. Raises: RankError if one cannot be reached."""
    if topology.world_size == 1:
        return {}
    place = torch.zeros(33, dtype=torch.int64)
    if topology.rank == 0:
        listener = _listen(host)
        place[0] = listener.getsockname()[1]
        place[1:] = torch.frombuffer(bytearray(secrets.token_bytes(32)), dtype=torch.uint8)
    place = place.to(topology.device)
    torch.distributed.broadcast(place, 0)
    port, *numbers = place.tolist()
    secret = bytes(numbers).hex()
    if topology.rank == 0:
        return accept(listener, topology.world_size, secret, timeout_seconds)
    return {0: connect(host, port, secret, topology.rank, timeout_seconds)}


def accept(listener: socket.socket, world_size: int, secret: str, timeout_seconds: float) -> dict[int, PeerLink]:
    """Rank 0: wait until all others are connected, and stop listening. Raises: RankError naming those that are not."""
    allow_files(world_size)
    links: dict[int, PeerLink] = {}
    deadline = time.monotonic() + timeout_seconds
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        while len(links) < world_size - 1:
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, world_size)) - set(links))
                raise RankError(f"ranks {missing[:8]} did not connect to rank 0 within parallel.timeout_seconds")
            for key, _ in waiting.select(1):
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    _configure(connection)
                    waiting.register(connection, selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                waiting.unregister(key.fileobj)
                if (link := _greet(key.fileobj, secret)) is not None:
                    links[link.rank] = link
        for key in waiting.get_map().values():
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
    return links


def _greet(connection: socket.socket, secret: str) -> PeerLink | None:
    """Read who a new connection is. One that sends nothing, or does not know the secret, is closed."""
    with contextlib.suppress(OSError):
        said, _, rank = connection.recv(4096).rstrip(b"\n").partition(b" ")
        if hmac.compare_digest(said, secret.encode()) and rank.isdigit():
            connection.sendall(_WELCOME)
            return PeerLink(connection, int(rank))
    connection.close()
    return None


def connect(host: str, port: int, secret: str, rank: int, timeout_seconds: float) -> PeerLink:
    """Another rank: connect to rank 0. Raises: RankError."""
    try:
        connection = socket.create_connection((address_of(host), port), timeout=timeout_seconds)
        connection.sendall(f"{secret} {rank}\n".encode())
        if connection.recv(len(_WELCOME)) != _WELCOME:
            raise ConnectionError("turned away")
    except OSError as error:
        raise RankError(f"rank {rank} cannot reach rank 0 at {host}:{port} ({error}): is a firewall between them?") from error
    _configure(connection)
    return PeerLink(connection, 0)


def _listen(host: str) -> socket.socket:
    """On this machine alone where all ranks are on it."""
    if host in _LOCAL:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family, backlog=4096)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)


def _configure(connection: socket.socket) -> None:
    """No delays; no endless reads or writes; a peer whose machine is gone is noticed within half a minute."""
    connection.settimeout(SEND_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
