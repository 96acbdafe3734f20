"""Hostile requests to a real `pipelines.serve`, which must answer each, tell mistakes in 4xx, and go on serving.

Flows in: a random generator and a run; out: requests as bytes, and what the server made of them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support import ROOT, hostile_json
from tests.support.data_fixtures import encoded, picture

PATH = "/v1/chat/completions"
START_SECONDS = 90.0


@dataclass(frozen=True)
class Asked:
    """One request."""

    data: bytes
    told: str
    must_answer: bool
    """Its framing is that of HTTP, so that an answer has to come."""


def good_body() -> dict[str, Any]:
    """What an honest client sends."""
    url = "data:image/png;base64," + base64.b64encode(encoded(picture(), "PNG")).decode()
    content = [{"type": "text", "text": "Which colour?"}, {"type": "image_url", "image_url": {"url": url}}]
    numbers = {"temperature": 0.5, "top_p": 0.9, "seed": 1, "max_tokens": 2, "stop": ["\n"], "stream": False}
    return {"model": "m", "messages": [{"role": "user", "content": content}], **numbers}


def framed(body: bytes, path: str = PATH, *headers: str, method: str = "POST", length: str | None = None) -> bytes:
    """A request's bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "Content-Type: application/json", *headers]
    lines += [f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def request(draw: random.Random) -> Asked:
    """A hostile request."""
    kind = draw.choice(["json", "json", "json", "json", "json", "field", "field", "field", "image", "headers", "noise", "path"])
    body = good_body()
    if kind == "json":
        tree, told = hostile_json.mutate(draw, body)
        return Asked(framed(hostile_json.spelled(tree, None)), "; ".join(told), True)
    if kind == "field":
        name = draw.choice(
            ["temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "stop", "stream", "n", "tools"]
        )
        body[name], told_one = hostile_json.value(draw, 1)
        body["stream"] = body["stream"] if name == "stream" else draw.random() < 0.3
        return Asked(framed(hostile_json.spelled(body, None)), f"{name}: {told_one}", True)
    if kind == "image":
        data, told_one = hostile_json.bytes_changed(
            draw, encoded(picture(), draw.choice(["PNG", "JPEG", "GIF", "TIFF", "BMP"]))
        )
        times = draw.choice([1, 1, 2, 2000])
        url = draw.choice(
            ["data:image/png;base64,", "data:image/png;base64,", "data:text/plain,", "http://127.0.0.1:9/", "file:///"]
        )
        part = {"type": "image_url", "image_url": {"url": url + base64.b64encode(data).decode()}}
        body["messages"][0]["content"] = [part] * times
        return Asked(framed(json.dumps(body).encode()), f"{times} images {url}: {told_one}", True)
    good = json.dumps(body).encode()
    if kind == "headers":
        length = draw.choice(
            ["-1", "+5", "5" * 5000, "0" * 5000 + "7", "²", "", "1e3", " 12", "0x10", str(len(good) + 5), "99999999999"]
        )
        extra = draw.choice(
            [
                [],
                [],
                ["Transfer-Encoding: chunked"],
                ["X: " + "a" * 100_000],
                ["Expect: 100-continue"],
                ["X: y"] * 200,
                ["\x1b[2J: x"],
            ]
        )
        method = draw.choice(["POST", "POST", "POST", "PUT", "DELETE", "GET", "HEAD", "\x1b[2J"])
        return Asked(
            framed(good, PATH, *extra, method=method, length=length),
            f"{method}, length {length[:20]!a}, {str(extra)[:60]!a}",
            False,
        )
    if kind == "path":
        path = draw.choice(
            ["/", "/../../etc/passwd", "/v1/models\x1b[2J", "//", "/" + "a" * 70_000, PATH + "?x=\x07", "*", "http://x/"]
        )
        return Asked(
            framed(good, path, method=draw.choice(["GET", "POST"])), f"path {path[:40]!a}", len(path) < 100 and " " not in path
        )
    data, told_one = hostile_json.bytes_changed(draw, framed(good))
    return Asked(data, told_one, False)


GOOD = Asked(framed(json.dumps(good_body()).encode()), "an honest request", True)


class Server:
    """A server in a process of its own, started again when it is gone."""

    def __init__(self, run: Path, work: Path):
        self.run, self.log = run, work / "serve.log"
        self.memory = 0
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        words = [sys.executable, "-m", "pipelines.serve", str(self.run), "--port", "0", "--max-new-tokens", "4"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        began = time.monotonic()
        while not (found := re.search(rb"http://127\.0\.0\.1:(\d+)", self.log.read_bytes())):
            if self._process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise RuntimeError(f"the server does not start: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        self.port = int(found[1])
        self.memory = self._peak()

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def ask(self, asked: Asked, seconds: float) -> tuple[str | None, str, str]:
        """Send a request, then an honest one. Returns: what is wrong or None, its cause, and the server's last lines."""
        self.start()
        assert self._process is not None
        before = self.log.stat().st_size
        reply = self._send(asked, seconds)
        error, cause = self._judge(asked, reply, before)
        if error is None:
            health = self._send(GOOD, seconds)
            if health is None or not health.startswith(b"HTTP/1.1 200"):
                error, cause = "an honest request is not answered afterwards", "serve does not go on"
        said = self.log.read_bytes()[before:].decode(errors="replace")[-1500:]
        if error is not None and ("hang" in cause or "go on" in cause or self._process.poll() is not None or "memory" in cause):
            self.stop()
        return error, cause, said

    def _judge(self, asked: Asked, reply: bytes | None, before: int) -> tuple[str | None, str]:
        from tests.support.hostile import MEMORY_BYTES, exception_of, place_of_traceback

        assert self._process is not None
        time.sleep(0.02)  # its last line is written after the answer
        said = self.log.read_bytes()[before:].decode(errors="replace")
        if self._process.poll() is not None:
            return f"the server ended with {self._process.returncode}", "serve ends"
        if "Traceback" in said:
            what = exception_of(said)
            return f"traceback: {what[:200]}", f"{what.split(':')[0]} in {place_of_traceback(said)}"
        if self._peak() - self.memory > MEMORY_BYTES:
            return f"the server takes {(self._peak() - self.memory) >> 20} MiB more", "memory of serve"
        if reply is None:
            return "no answer in time", "hang of serve"
        if not reply and asked.must_answer:
            return "the connection is closed without an answer", "serve closes without an answer"
        status = re.match(rb"HTTP/1\.\d (\d+)", reply)
        if status and status[1].startswith(b"5") and status[1] not in (b"501", b"503", b"505"):
            return f"status {status[1].decode()}: {reply[-200:]!r}", f"status {status[1].decode()} of serve"
        if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", said):
            return "control characters in the server's log", "control characters of serve"
        return None, ""

    def _send(self, asked: Asked, seconds: float) -> bytes | None:
        """The whole reply; None: not within the time."""
        found, until = b"", time.monotonic() + seconds
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", self.port), 10) as client:
            client.settimeout(seconds)
            with contextlib.suppress(OSError):  # the server may refuse the rest of it, and has answered then
                client.sendall(asked.data)
                if not asked.must_answer:  # it may announce more than it brings
                    client.shutdown(socket.SHUT_WR)
            try:
                while time.monotonic() < until and (part := client.recv(65536)):
                    found += part
            except TimeoutError:
                return None
        return found if time.monotonic() < until else None

    def _peak(self) -> int:
        """Most memory that it ever had, in bytes."""
        assert self._process is not None
        with contextlib.suppress(OSError, psutil.Error):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self._process.pid}/status").read_text())
            return int(found[1]) * 1024 if found else 0
        return 0
