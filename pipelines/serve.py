"""Serve a run over HTTP, in the form of OpenAI's chat completions, so that existing clients can ask it.

    python -m pipelines.serve runs/quickstart/instruct
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is it?"}]}'

Content is a text, or a list of {"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": "data:image/..."}}.
Images come inside the request: no address is ever fetched. One process on one device, greedy unless `temperature` says
otherwise; `stream` sends the words as they come. Whoever reaches the port can ask: the default is this machine alone.

One token is computed at a time, for whoever asks for the fewest (`max_tokens`) and has had the fewest. All that a client can
make large has a limit, and what is beyond it is refused before it costs: 400 says what is wrong, 403 whose page or name it
is, 408 that a request took too long to arrive, 411 and 413 what is wrong with its length, 503 to come again later.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import http.client
import json
import logging
import re
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.images.decode import decode
from himix_megatron.data.text import chat_template
from himix_megatron.inference.text_stream import TextStream
from himix_megatron.runtime import log
from himix_megatron.runtime.limits import Limit
from himix_megatron.runtime.untrusted_files import printable
from pipelines import generate
from pipelines.cli import parse_settings, run_main
from pipelines.evaluate import start
from pipelines.flags import Word

if TYPE_CHECKING:
    from himix_megatron.inference.generator import Prompt
    from pipelines.chat_request import Request

logger = logging.getLogger("pipelines.serve")

MAX_BYTES, READ_SECONDS = 12 << 20, 30.0
"""Of one request, and within which it must have arrived."""
LARGE_BYTES, LARGE_PIXELS, MAX_LARGE = 256 << 10, 1 << 21, 4
"""Larger requests and images wait for each other, so that small ones need not wait for them."""
MAX_CONNECTIONS, MAX_ANSWERS, LONG_TOKENS = 64, 32, 256
"""At once. A longer answer is begun while fewer than half of the places are taken."""
http.client._MAXLINE, http.client._MAXHEADERS = 4096, 64  # type: ignore[attr-defined]  # 6 MB a connection otherwise


@dataclass(frozen=True)
class Arguments:
    """Answer questions about images over HTTP."""

    run: Annotated[Path, Word("RUN")]
    """Run folder."""
    checkpoint: Path | None = None
    """Checkpoint to load, a checkpoints/step-... folder; None: the newest of the run."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 accepts requests from every machine that can reach this one."""
    port: Annotated[int, Limit(0, 65535)] = 8000
    """TCP port; 0: any free port, which the first log line names."""
    max_new_tokens: generate.NewTokens = 1024
    """Maximum length of an answer, in tokens, whatever a request asks for."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may call this server besides --host, localhost, and its address if --host is 0.0.0.0."""


class RefusalError(Exception):
    """An HTTP status, and one line that says why."""


class Turns:
    """A lock that goes to whoever needs the least, and whose owner can let others go first."""

    def __init__(self) -> None:
        self._changed, self._needs, self._owner = threading.Condition(), dict[int, int](), 0

    @contextlib.contextmanager
    def turn(self, need: int, places: int = MAX_CONNECTIONS) -> Iterator[None]:
        """Wait for the lock, and have it. Raises: RefusalError if as many as `places` have it or wait."""
        if len(self._needs) >= places:
            raise RefusalError(503, "too many requests at once: ask again in a second")
        self.wait(need)
        try:
            yield
        finally:
            with self._changed:
                del self._needs[self._owner]
                self._owner = 0
                self._changed.notify_all()

    def wait(self, need: int) -> None:
        """Let all go first who need less than this."""
        own = threading.get_ident()
        with self._changed:
            self._needs[own] = need
            if self._owner == own and self._first() != own:
                self._owner = 0
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._owner == own or (not self._owner and self._first() == own))
            self._owner = own

    def _first(self) -> int:
        return min(self._needs, key=self._needs.__getitem__)


class Model:
    """The loaded run."""

    def __init__(self, job: generate.Job, max_new_tokens: int) -> None:
        self.job, self.max_new_tokens = job, max_new_tokens
        self.answerer = start(job.config, job.checkpoint)
        self.ends = chat_template.end_of_turn(job.tokenizer, job.config.data.template)
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # The CPU backend keeps what was freed, for the next step of a training.
            libc.mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: what is larger goes back to the system
        self.turns, self.reading = Turns(), (Turns(), Turns())
        """One thread at a time computes, and one reads small and one large requests."""

    def read(self, data: bytes) -> tuple[Request, Prompt]:
        """A request. Raises: ValueError, RefusalError."""
        from himix_megatron.inference.generator import Prompt
        from pipelines.chat_request import num_pixels, parse_request

        config, tokenizer = self.job.config, self.job.tokenizer
        try:
            with self.reading[len(data) > LARGE_BYTES].turn(len(data)):
                request, turns, images = parse_request(data, config.data.max_text_tokens)
                pixels = num_pixels(images, config.vision)
                del data
            text = chat_template.prompt({"conversations": turns}, tokenizer, config.data.template, len(turns) // 2)
            if len(text.ids) > config.data.max_text_tokens:
                raise ValueError(f"the prompt has {len(text.ids)} tokens, the model takes {config.data.max_text_tokens}")
            is_large = pixels > LARGE_PIXELS
            with self.reading[is_large].turn(pixels, MAX_LARGE if is_large else MAX_CONNECTIONS):
                pictures = tuple(decode(image, config.vision) for image in images)
                return request, Prompt(text.ids, pictures, text.image_places)
        except BadSampleError as error:
            raise ValueError(f"an image cannot be read: {error}") from None

    def answer(
        self, request: Request, prompt: Prompt, write: Callable[[str], object] | None, check: Callable[[], None]
    ) -> tuple[str, int, str]:
        """Text, number of tokens, and why it ended. `check`, at each token, raises what ends it; `write` must not wait.

        Raises: RefusalError.
        """
        asked = request.max_completion_tokens or request.max_tokens or self.max_new_tokens
        limit, stream = min(asked, self.max_new_tokens), TextStream(self.job.tokenizer, request.stops, write)

        def watch(_: int, so_far: list[int]) -> bool:
            has_ended = stream.push(so_far)
            check()
            self.turns.wait(limit + len(so_far))
            return has_ended

        with self.turns.turn(limit, MAX_ANSWERS // 2 if limit > LONG_TOKENS else MAX_ANSWERS):
            check()
            (tokens,) = self.answerer.answer([prompt], self.ends, limit, sampling=request.sampling, watch=watch)
        return stream.finish(), len(tokens), "length" if len(tokens) == limit else "stop"


class Handler(BaseHTTPRequestHandler):
    """Two addresses: /v1/models and /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    timeout = 2 * READ_SECONDS
    server: Server
    has_begun = False
    """A streamed answer is under way."""

    def handle(self) -> None:
        """All requests of a connection."""
        with contextlib.suppress(OSError):  # the client left
            super().handle()

    def finish(self) -> None:
        """Unread bytes would reset the connection before its client has read the reply: take what has come."""
        super().finish()
        self.server.reading[self.connection] = 0.0  # the first to be closed
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            self.connection.recv(1 << 20)

    def do_POST(self) -> None:
        """Answer, or tell which model is served, or why not."""
        try:
            length = self._check_head()
            if (self.command, self.path) == ("POST", "/v1/chat/completions"):
                self._chat(length)
            elif (self.command, self.path) == ("GET", "/v1/models"):
                served = {"id": self.server.name, "object": "model", "owned_by": "himix-megatron"}
                self._reply(200, {"object": "list", "data": [served]})
            else:
                raise RefusalError(404, f"{self.path} is not served: ask /v1/chat/completions")
        except OSError:
            raise
        except RefusalError as error:
            self.send_error(*error.args)
        except ValueError as error:
            self.send_error(400, str(error))
        except Exception:  # whatever is wrong here, others are answered
            logger.exception("a request failed")
            self.send_error(500, "an error inside the server: its log describes it")
        self.server.reading[self.connection] = time.monotonic()  # for the next request

    do_GET = do_POST  # noqa: N815

    def _check_head(self) -> int:
        """Length of the body. Raises: RefusalError if it is not clear, or the request not meant for this server; ValueError."""
        head, lengths, is_post = self.headers, self.headers.get_all("Content-Length", []), self.command == "POST"
        hosts, origin = head.get_all("Host", []), head.get("Origin")
        length = int(lengths[0]) if lengths and re.fullmatch("[0-9]{1,12}", lengths[0]) else -1
        has_two = len(lengths) > 1 or bool(lengths and "Transfer-Encoding" in head)
        is_foreign = origin is not None and [urlsplit(origin).netloc] != hosts
        for code, is_wrong, message in (
            (400, bool(head.defects) or len(hosts) != 1, "a line before the body is no NAME: VALUE, or Host is not there once"),
            (403, not all(map(self.server.is_called, hosts)), f"{hosts} is no name of this server (see --allowed-hosts)"),
            (403, is_foreign, f"pages of {origin} may not ask this server"),
            (400, has_two, "more than one Content-Length, or a Transfer-Encoding beside it"),
            (411, is_post and not lengths, "wanted a Content-Length"),
            (400, bool(lengths) and length < 0, "Content-Length is no number"),
            (413, length > MAX_BYTES, f"a request has at most {MAX_BYTES} bytes"),
            (415, is_post and head.get_content_type() != "application/json", "wanted Content-Type: application/json"),
        ):
            if is_wrong:
                raise RefusalError(code, message)
        self.close_connection |= not is_post and (length > 0 or "Transfer-Encoding" in head)
        return length

    def _chat(self, length: int) -> None:
        with self.server.place_for(self.connection) if length > LARGE_BYTES else contextlib.nullcontext():
            request, prompt = self.server.model.read(self._body(length))
        if request.stream:
            return self._stream(request, prompt)
        text, num_tokens, ended = self.server.model.answer(request, prompt, None, self._check_client)
        asked, said = len(prompt.ids), {"message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": asked, "completion_tokens": num_tokens, "total_tokens": asked + num_tokens}
        return self._reply(200, self._completion("chat.completion", said, ended) | {"usage": usage})

    def _body(self, length: int) -> bytes:
        data = self.rfile.read(length)
        if self.server.reading.pop(self.connection, None) is None or len(data) < length:
            raise RefusalError(408, f"it did not arrive within {READ_SECONDS:.0f} seconds, or others needed its place")
        return data

    def _stream(self, request: Request, prompt: Prompt) -> None:
        """Server-sent events; the headers wait for the first word, so that until then an error has its status."""

        def send(delta: dict[str, str], ended: str | None = None) -> None:
            if not self.has_begun:
                self.has_begun = self.close_connection = True
                self._send_head(200, {"Content-Type": "text/event-stream"})
            event = self._completion("chat.completion.chunk", {"delta": delta}, ended)
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        # Who reads so slowly that the system's buffer for the connection fills up is left: nobody waits for it.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.connection.settimeout(0)
        *_, ended = self.server.model.answer(request, prompt, lambda piece: send({"content": piece}), self._check_client)
        send({}, ended)
        self.wfile.write(b"data: [DONE]\n\n")

    def _check_client(self) -> None:
        """Raises: ConnectionError if the client has left."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        if poll.poll(0):
            raise ConnectionAbortedError

    def _completion(self, kind: str, said: dict[str, Any], ended: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "finish_reason": ended}
        own = {"id": f"chatcmpl-{time.time_ns():x}", "object": kind, "created": int(time.time()), "model": self.server.name}
        return own | {"choices": [choice]}

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Reply with an error, and read no more: what follows could be the rest of this request."""
        self.close_connection, shown = True, printable(message or self.responses[code][0])
        if not self.has_begun:
            self._reply(code, {"error": {"message": shown, "type": "invalid_request_error"}})

    def _reply(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        later = {"Retry-After": "1"} if code == 503 else {}
        self._send_head(code, {"Content-Type": "application/json", "Content-Length": str(len(data)), **later})
        self.wfile.write(data)

    def _send_head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request, on the run of the log."""
        logger.info("%s %s", self.address_string(), printable(format % args))


class Server(ThreadingHTTPServer):
    """A bounded number of connections: for a new one, that which has been sending its request for longest is closed."""

    request_queue_size = 128
    model: Model

    def __init__(self, arguments: Arguments) -> None:
        self.address_family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        super().__init__((arguments.host, arguments.port), Handler)
        self.name, self.is_open = arguments.run.resolve().name, arguments.host in ("0.0.0.0", "::")
        self.names = {"localhost", "127.0.0.1", "::1", *map(str.lower, (arguments.host, *arguments.allowed_hosts))}
        spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128  # the model and the rest of the process have about 100
        self.free, self.large = threading.Semaphore(max(8, min(MAX_CONNECTIONS, spare))), threading.Semaphore(2)
        self.reading, self.sending = dict[socket.socket, float](), dict[socket.socket, None]()
        """Connections whose request has not arrived, and since when; and which of them have a place for a large one."""

    def is_called(self, host: str) -> bool:
        """Whether this names the server: the owner of another name can make it lead here for web pages (DNS rebinding)."""
        name = urlsplit(f"//{host}").hostname or ""
        return name in self.names or (self.is_open and re.fullmatch(r"[0-9.]+|[0-9a-f.]*:[0-9a-f:.]*", name) is not None)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or close it."""
        if not self.free.acquire(blocking=False):
            oldest = next(iter(sorted(self.reading.copy().items(), key=lambda item: item[1])), (None,))[0]
            self._drop(oldest)
            if not self.free.acquire(timeout=0.5 if oldest else 0.0):
                return self.close_request(request)
        self.reading[request] = time.monotonic()
        super().process_request(request, client_address)

    @contextlib.contextmanager
    def place_for(self, connection: socket.socket) -> Iterator[None]:
        """Of the places for large requests; who has one and sends slowly makes room after a second."""
        while not self.large.acquire(timeout=1.0):
            self._drop(next((sender for sender in list(self.sending) if sender in self.reading), None))
        self.reading[connection] = time.monotonic()  # the wait is not the sender's
        self.sending[connection] = None
        try:
            yield
        finally:
            del self.sending[connection]
            self.large.release()

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection."""
        self.reading.pop(request, None)
        super().shutdown_request(request)
        self.free.release()

    def service_actions(self) -> None:
        """About twice a second: close connections that have been sending their request for too long."""
        for connection, since in list(self.reading.items()):
            if time.monotonic() - since > READ_SECONDS:
                self._drop(connection)

    def _drop(self, connection: socket.socket | None) -> None:
        """Let a connection's thread read an end, so that it replies and closes."""
        if connection is not None and self.reading.pop(connection, None) is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)


def main() -> None:
    """The command line."""
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m pipelines.serve", __doc__)
    job = generate.prepare(generate.Arguments(run=arguments.run, checkpoint=arguments.checkpoint))
    try:
        server = Server(arguments)
    except OSError as error:
        where, other = f"{arguments.host}:{arguments.port}", "port" if error.errno == errno.EADDRINUSE else "host"
        raise ValueError(f"cannot listen on {where} ({error.strerror}): choose another --{other}") from None
    log.start()
    sys.setswitchinterval(5e-4)  # the thread that computes needs the interpreter back after each operation
    server.model = Model(job, arguments.max_new_tokens)
    address = "{0}:{1}" if server.address_family == socket.AF_INET else "[{0}]:{1}"
    logger.info("serving %s at http://%s/v1/chat/completions", job.checkpoint, address.format(*server.server_address))
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        logger.info("stopped")


if __name__ == "__main__":
    run_main(main)
