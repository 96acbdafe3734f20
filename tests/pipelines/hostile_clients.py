"""Clients that mean a server no good, all at once, each for as long as the server lets it. The standard library alone.

python -m tests.pipelines.hostile_clients PORT NUMBER       prints "attacking" once all have begun, then what each kind got
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

HOLD_SECONDS = 8.0
QUESTION = [{"role": "user", "content": "Who are you?"}]


def png(width: int, height: int, rows: int) -> str:
    """A data URL: RGBA of 16 bits, of which the first `rows` rows are there."""
    compress = zlib.compressobj(1)
    data = b"".join([*(compress.compress(b"\0" * (1 + 8 * width)) for _ in range(rows)), compress.flush()])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def request(body: object, length: int | None = None, **headers: str) -> bytes:
    """A POST; `length`: what it says of its body, if not the truth."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(length or len(data)), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in head.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + data


def asks(**fields: object) -> bytes:
    """A question with more fields."""
    return request({"messages": QUESTION, **fields})


def shows(*urls: str) -> bytes:
    """A question about pictures."""
    return request({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": u}} for u in urls]}]})


def trickle(_: socket.socket) -> Iterator[bytes]:
    """A byte at a time."""
    for byte in request(b"x" * 1000):
        yield bytes([byte])
        time.sleep(0.5)


KINDS: dict[str, Callable[[], bytes]] = {
    "not a number": lambda: asks(temperature=float("nan")),
    "deep": lambda: request(b"[" * 100_000),
    "many values": lambda: request(b'{"messages": [' + b"{}," * 4_000_000 + b"0]}"),
    "long prompt": lambda: request({"messages": [{"role": "user", "content": "why " * 250_000}]}),
    "huge picture": lambda: shows(*[png(7000, 7100, 40)] * 16),
    "large picture": lambda: shows(png(2900, 2900, 2900)),
    "many pictures": lambda: shows(*[png(1, 1, 1)] * 10_000),
    "long stop text": lambda: asks(stop="x" * 1_000_000),
    "many stop texts": lambda: asks(stop=["never"] * 1_000_000),
    "another's name": lambda: request({"messages": QUESTION}, Host="rebound.example"),
    "another's page": lambda: request({"messages": QUESTION}, Origin="http://page.example"),
    "two lengths": lambda: request({"messages": QUESTION}, content_length="5"),
    "no reader": lambda: asks(max_tokens=1024, stream=True),
    "long answer": lambda: asks(max_tokens=1024),
    "leaves": lambda: asks(max_tokens=1024),
    "idle": lambda: b"",
    "never whole": lambda: request(b"x" * (11 << 20), 12 << 20),
    "a byte at a time": lambda: request(b"x" * 1000),
}


def attack(port: int, kind: str, data: bytes, begun: threading.Semaphore, got: Counter[tuple[str, str]]) -> None:
    """One client, to its end."""
    reply = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=HOLD_SECONDS) as client:
            begun.release()
            if kind == "no reader":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            for part in [data[i : i + 1] for i in range(20)] if kind == "a byte at a time" else [data]:
                client.sendall(part)
                time.sleep(0.4 * (kind == "a byte at a time"))
            if kind == "leaves":
                got[kind, "left"] += 1
                return
            if kind == "no reader":
                time.sleep(HOLD_SECONDS)
            while part := client.recv(1 << 16):
                reply += part
    except TimeoutError:
        reply = reply or b"- held"
    except OSError:
        reply = reply or b"- reset"
    got[kind, (reply or b"- closed").split(maxsplit=2)[1].decode()] += 1


def main() -> None:
    """The command line."""
    port, number = map(int, sys.argv[1:])
    sent = {kind: make() for kind, make in KINDS.items()}
    got: Counter[tuple[str, str]] = Counter()
    begun = threading.Semaphore(0)
    kinds = [list(KINDS)[n % len(KINDS)] for n in range(number)]
    threads = [threading.Thread(target=attack, args=(port, kind, sent[kind], begun, got), daemon=True) for kind in kinds]
    for thread in threads:
        thread.start()
    with contextlib.suppress(BrokenPipeError):
        print("attacking", flush=True)
        for thread in threads:
            thread.join()
        for kind in KINDS:
            print(f"{kind}: " + ", ".join(f"{n} x {code}" for (k, code), n in sorted(got.items()) if k == kind), flush=True)


if __name__ == "__main__":
    main()
