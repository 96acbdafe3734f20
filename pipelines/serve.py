"""Serve a run over HTTP, in the form of OpenAI's chat completions, so that existing clients can ask it.

    python -m pipelines.serve runs/quickstart/instruct
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is it?"}]}'

Content is a text, or a list of {"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": "data:image/..."}}.
Images come inside the request: no address is ever fetched. One process on one device, one answer at a time, greedy unless
`temperature` says otherwise; `stream` sends the words as they come. Whoever reaches the port can ask: the default is this
machine alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from himix_megatron.config import Count
from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.images.decode import decode
from himix_megatron.data.text import chat_template
from himix_megatron.inference.text_stream import TextStream
from himix_megatron.runtime import log
from pipelines import generate
from pipelines.cli import parse_settings, run_main
from pipelines.evaluate import start
from pipelines.flags import Word

if TYPE_CHECKING:
    from himix_megatron.inference.sampling import Sampling

logger = logging.getLogger("pipelines.serve")

MOST_BYTES = 64 << 20
"""Of one request."""


@dataclass(frozen=True)
class Arguments:
    """Answer questions about images over HTTP."""

    run: Annotated[Path, Word("RUN")]
    """Run folder."""
    checkpoint: Path | None = None
    """Checkpoint to load, a checkpoints/step-... folder; None: the newest of the run."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts requests from every machine that can reach this one."""
    port: int = 8000
    """TCP port; 0: any free port, which the first log line names."""
    max_new_tokens: Count = 1024
    """Maximum length of an answer, in tokens, whatever a request asks for."""


@dataclass(frozen=True)
class Request:
    """One question, checked."""

    turns: list[dict[str, str]]
    """As in the data: `from` human and gpt in turn."""
    images: tuple[bytes, ...]
    sampling: Sampling
    stops: tuple[str, ...]
    max_tokens: int
    stream: bool


def read_request(body: Any, most_tokens: int) -> Request:
    """A request's JSON. Raises: ValueError with one line for the client."""
    from himix_megatron.inference.sampling import Sampling

    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is missing: wanted a list of {"role": ..., "content": ...}')
    turns, images = [], []
    for number, message in enumerate(messages):
        wanted = ("user", "assistant")[number % 2]
        if not isinstance(message, dict) or message.get("role") != wanted:
            raise ValueError(f'message {number} has another role than "{wanted}": users and assistants take turns')
        text, own = read_content(message.get("content"))
        turns.append({"from": ("human", "gpt")[number % 2], "value": text})
        images += own
    if len(turns) % 2 == 0:
        raise ValueError("the last message is the assistant's: nothing is asked")
    stops = body.get("stop") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError('"stop" holds something else than texts')
    try:
        sampling = Sampling(
            temperature=float(body.get("temperature") or 0),
            top_p=float(body.get("top_p") or 1),
            seed=int(body.get("seed") or 0),
        )
        asked = int(body.get("max_completion_tokens") or body.get("max_tokens") or most_tokens)
    except TypeError as error:
        raise ValueError(f"temperature, top_p, seed and max_tokens are numbers ({error})") from None
    return Request(turns, tuple(images), sampling, stops, max(1, min(asked, most_tokens)), bool(body.get("stream")))


def read_content(content: Any) -> tuple[str, list[bytes]]:
    """A message's text and images. Raises: ValueError."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise ValueError('"content" is neither a text nor a list')
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            images.append(read_data_url(part["image_url"].get("url")))
        else:
            raise ValueError(f'content of type {kind!r}: wanted "text" or "image_url"')
    return "\n".join(texts), images


def read_data_url(url: Any) -> bytes:
    """The bytes in a data: URL. Raises: ValueError for any other address, which is not fetched."""
    head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("an image must come inside the request, as data:image/...;base64,...: no address is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"an image's base64 is broken: {error}") from None


class Model:
    """The loaded run; answers one request at a time."""

    def __init__(self, job: generate.Job):

        self.job, self.vision, self.template = job, job.config.vision, job.config.data.template
        self.answerer = start(job.config, job.checkpoint)
        self.ends = chat_template.end_of_turn(job.tokenizer, self.template)
        self.lock = threading.Lock()

    def answer(self, request: Request, write: Callable[[str], object] | None) -> tuple[str, int, int, str]:
        """Text, tokens of the question, tokens of the answer, and why it ended. Raises: ValueError for a broken image."""
        from himix_megatron.inference.generator import Prompt

        try:
            pixels = tuple(decode(data, self.vision) for data in request.images)
        except BadSampleError as error:
            raise ValueError(f"an image cannot be read: {error}") from None
        said = {"conversations": request.turns}
        ids = chat_template.prompt(said, self.job.tokenizer, self.template, len(request.turns) // 2)
        stream = TextStream(self.job.tokenizer, request.stops, write)
        with self.lock:
            (tokens,) = self.answerer.answer(
                [Prompt(ids, pixels)],
                self.ends,
                request.max_tokens,
                sampling=request.sampling,
                watch=lambda _, so_far: stream.push(so_far),
            )
        ended = "length" if len(tokens) == request.max_tokens else "stop"
        return stream.finish(), len(ids), len(tokens), ended


class Handler(BaseHTTPRequestHandler):
    """Two addresses: /v1/models and /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    model: Model
    name: str
    most_tokens: int

    def do_GET(self) -> None:
        """Which model is served."""
        if self.path == "/v1/models":
            self._reply(200, {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "himix-megatron"}]})
        else:
            self._refuse(404, f"{self.path} is not served: ask /v1/chat/completions")

    def do_POST(self) -> None:
        """Answer."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self.close_connection = True
            return self._refuse(413, f"a request has a Content-Length of at most {MOST_BYTES} bytes")
        data = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            return self._refuse(404, f"{self.path} is not served: ask /v1/chat/completions")
        try:
            request = read_request(json.loads(data), self.most_tokens)
            if request.stream:
                return self._stream(request)
            text, asked, given, ended = self.model.answer(request, None)
        except ValueError as error:
            return self._refuse(400, " ".join(str(error).split()))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": ended}
        usage = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
        return self._reply(200, self._envelope("chat.completion") | {"choices": [choice], "usage": usage})

    def _stream(self, request: Request) -> None:
        """Server-sent events; the headers wait for the first word, so that a broken image is still an error."""
        begun = False

        def send(delta: dict[str, str], ended: str | None = None) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
            choice = {"index": 0, "delta": delta, "finish_reason": ended}
            event = self._envelope("chat.completion.chunk") | {"choices": [choice]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        _, _, _, ended = self.model.answer(request, lambda piece: send({"content": piece}))
        send({}, ended)
        self.wfile.write(b"data: [DONE]\n\n")

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{time.time_ns():x}", "object": kind, "created": int(time.time()), "model": self.name}

    def _refuse(self, code: int, message: str) -> None:
        self._reply(code, {"error": {"message": message, "type": "invalid_request_error"}})

    def _reply(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request, on the run of the log."""
        logger.info("%s %s", self.address_string(), format % args)


def main() -> None:
    """The command line."""
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m pipelines.serve", __doc__)
    job = generate.prepare(generate.Arguments(run=arguments.run, checkpoint=arguments.checkpoint))
    try:
        server = ThreadingHTTPServer((arguments.host, arguments.port), Handler)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {arguments.host}:{arguments.port} ({error.strerror}): choose another --port"
        ) from None
    log.start()
    Handler.model, Handler.name, Handler.most_tokens = Model(job), str(arguments.run), arguments.max_new_tokens
    logger.info("serving %s at http://%s:%d/v1/chat/completions", job.checkpoint, *server.server_address[:2])
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        logger.info("stopped")


if __name__ == "__main__":
    run_main(main)
