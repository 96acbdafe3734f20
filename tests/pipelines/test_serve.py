"""`python -m pipelines.serve` answers over HTTP as `pipelines.generate` does, and tells a client's mistake in one line."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from himix_megatron.data.text.chat_template import without_marks
from pipelines import serve
from pipelines.chat_request import read_content
from tests.support import ROOT

from .hostile_clients import asks, png, request, shows
from .test_generate_command import command, picture, run  # noqa: F401
from .test_mistakes import message

Ask = dict[str, Any]


@dataclass
class Served:
    """A server in a process of its own, which may open 200 files."""

    address: str
    pid: int
    log: Path


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:  # noqa: F811
    log = tmp_path_factory.mktemp("serve") / "log"
    program = ["sh", "-c", 'ulimit -n 200; exec "$0" -m pipelines.serve "$1" --port 0', sys.executable, str(run)]
    with log.open("wb") as file:
        server = subprocess.Popen(program, env=dict(os.environ), stderr=file)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield Served(found.group(), server.pid, log)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def address(served: Served) -> str:
    return served.address


def post(address: str, body: Any) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), timeout=20)


def sent(address: str, data: bytes) -> str:
    """The reply to bytes, with all that comes until the server closes."""
    with connect(address) as client:
        client.sendall(data)
        return b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()


def about(path: Path, question: str, **options: Any) -> Ask:
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], **options}


def test_an_image_stands_where_its_part_of_the_message_does() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    text, images = read_content([{"type": "text", "text": "Is this"}, image, {"type": "text", "text": "red?"}])
    assert (text, len(images)) == ("Is this\n<image>\nred?", 1)
    assert without_marks(text) == "Is this\nred?"


def test_an_answer_is_that_of_the_command(run: Path, picture: Path, address: str) -> None:  # noqa: F811
    wanted = command(str(run), "--image", str(picture), "--question", "What is it?").rstrip("\n")
    code, text = post(address, about(picture, "What is it?", max_tokens=8))
    reply = json.loads(text)
    assert code == 200, text
    assert reply["choices"][0]["message"]["content"] == wanted
    assert reply["usage"]["completion_tokens"] <= 8
    _, streamed = post(address, about(picture, "What is it?", max_tokens=8, stream=True))
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == wanted
    assert streamed.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"not json", "no JSON: Expecting value"),
        (b"[" * 90_000, "too many lists or objects"),
        (b"[" * 110_000, "more than 100000 values"),
        ([], "wanted an object"),
        ({}, '"messages" is missing'),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates not allowed"),
        ({"messages": [{"role": "user", "content": "a" * 100}]}, "the prompt has 103 tokens, the model takes 96"),
        ({"messages": [{"role": "user", "content": "a" * 1_000_000}]}, "the prompt has 1000000 bytes of text"),
        ({"messages": [{"role": "system", "content": "x"}]}, 'another role than "user"'),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "its last one is not the user's",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "content of type 'video'"),
        ({"messages": [{"role": "user", "content": 7}]}, "neither a text nor a list"),
        ({"messages": [{"role": "user", "content": "a"}], "temperature": -1}, "temperature is -1"),
        ({"messages": [{"role": "user", "content": "a"}], "stop": [""]}, "a stop string is empty"),
        *(
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}, said)
            for url, said in [
                ("http://127.0.0.1:1/x.png", "no address is fetched"),
                ("file:///etc/passwd", "no address is fetched"),
                ("data:image/png;base64,!!", "base64 is broken"),
                ("data:image/png;base64,AAAA", "an image cannot be read"),
            ]
        ),
    ],
)
def test_a_clients_mistake_is_one_line(address: str, body: Any, said: str) -> None:
    code, text = post(address, body)
    assert code == 400
    message = json.loads(text)["error"]["message"]
    assert said in message
    assert "\n" not in message


def test_a_busy_port_is_one_line(run: Path, address: str) -> None:  # noqa: F811
    port = address.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.serve", str(run), "--port", port],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "choose another --port" in done.stderr.splitlines()[-1]


FIELDS = {
    '"temperature": NaN': "temperature is nan",
    '"temperature": Infinity': "temperature is inf",
    '"temperature": 1e400': "temperature is inf",
    '"temperature": 1e-320': "temperature is 1e-320",
    f'"temperature": 1{400 * "0"}': "temperature is 1000",
    f'"seed": 1{5000 * "0"}': "no JSON",
    '"temperature": "1"': 'temperature is "1", wanted a number',
    '"top_p": 0': "top_p is 0",
    '"top_p": NaN': "top_p is nan",
    '"seed": Infinity': "seed is Infinity",
    '"seed": -1': "seed is -1",
    '"max_tokens": 0': "max_tokens is 0",
    '"max_tokens": -5': "max_tokens is -5",
    '"max_completion_tokens": 1e400': "max_completion_tokens is Infinity",
    '"stop": 7': "stop is 7",
    '"stop": NaN': "stop is NaN",
    '"stop": {"a": 1}': "stop is an object",
    f'"stop": "{257 * "x"}"': "a stop string is empty or too long",
    f'"stop": {["x"] * 17}'.replace("'", '"'): "there are too many",
    '"stream": "false"': 'stream is "false", wanted true or false',
    '"stream": true, "temperature": NaN': "temperature is nan",
    '"n": 5': "n is 5",
    '"tools": [{"type": "function"}]': "a field tools",
    '"response_format": {"type": "json_object"}': "a field response_format",
    '"presence_penalty": 1': "presence_penalty is 1",
}


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field[:40])
def test_a_field_that_would_not_be_obeyed_is_refused_by_name(address: str, field: str) -> None:
    code, text = post(address, f'{{"messages": [{{"role": "user", "content": "a"}}], {field}}}'.encode())
    assert (code, FIELDS[field] in json.loads(text)["error"]["message"]) == (400, True), text


def test_fields_that_change_no_answer_are_accepted(address: str) -> None:
    fields = {"user": "me", "model": "any", "n": 1, "frequency_penalty": 0, "tools": None, "metadata": {"a": "b"}, "stop": "x"}
    fields |= {"tools": [], "response_format": {"type": "text"}, "stream_options": {"include_usage": False}, "logit_bias": {}}
    assert post(address, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **fields})[0] == 200


PICTURES = {
    "too many pixels": (shows(png(7000, 7100, 1)), "at most 13000000 are decoded"),
    "too many in all": (shows(*[png(1500, 1500, 1)] * 5), "at most 13000000 are decoded"),
    "too many pictures": (shows(*[png(1, 1, 1)] * 17), "17 images: at most 16"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_counted_before_they_are_decoded(address: str, name: str) -> None:
    data, said = PICTURES[name]
    reply = sent(address, data)
    assert reply.startswith("HTTP/1.1 400 "), reply
    assert said in reply


GOOD = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": "2"}
HEADS = {
    "no length": ({"Content-Length": None}, 411),
    "chunks": ({"Content-Length": None, "Transfer-Encoding": "chunked"}, 411),
    "chunks and a length": ({"Transfer-Encoding": "chunked"}, 400),
    "two lengths": ({"content-length": "2"}, 400),
    "a length in superscript": ({"Content-Length": "\xb2"}, 400),
    "a length of 5,000 digits": ({"Content-Length": "9" * 5000}, 431),
    "a length behind zeros": ({"Content-Length": "0" * 3000 + "2"}, 400),
    "a long body": ({"Content-Length": str(1 << 30)}, 413),
    "a negative length": ({"Content-Length": "-1"}, 400),
    "many lines": ({f"X-{n}": "x" for n in range(80)}, 431),
    "no header": ({"no header": "x"}, 400),
    "no host": ({"Host": None}, 400),
    "another host": ({"Host": "rebound.example:8000"}, 403),
    "another address": ({"Host": "192.0.2.1"}, 403),
    "another origin": ({"Origin": "http://page.example"}, 403),
    "no origin": ({"Origin": "null"}, 403),
    "another port": ({"Origin": "http://localhost:3000"}, 403),
    "a form": ({"Content-Type": "text/plain"}, 415),
    "no type": ({"Content-Type": None}, 415),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_not_clear_or_not_for_this_server_is_refused_and_ends_the_connection(address: str, name: str) -> None:
    changes, code = HEADS[name]
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**GOOD, **changes}.items() if value is not None)
    reply = sent(
        address, f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n{{}}".encode("latin1") + b"GET /v1/models HTTP/1.0\r\n\r\n"
    )
    assert reply.startswith(f"HTTP/1.1 {code} "), reply
    assert reply.count("HTTP/1.1 ") == 1, reply
    assert reply.count("\n") < 12, reply


@pytest.mark.parametrize("line", ["Content-Length: 46", "Transfer-Encoding: chunked"])
def test_the_body_of_a_get_is_not_the_next_request(address: str, line: str) -> None:
    head = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    assert sent(address, f"{head}{line}\r\n\r\n{head}\r\n".encode()).count("HTTP/1.1 ") == 1


def test_the_model_is_named_without_its_place(address: str, run: Path) -> None:  # noqa: F811
    with urllib.request.urlopen(f"{address}/v1/models") as reply:
        assert json.load(reply)["data"][0]["id"] == run.name


def test_the_log_shows_what_clients_send_as_text(served: Served) -> None:
    sent(served.address, b"GET /\x1b[2J\x1b]0;title\x07 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    sent(served.address, b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    shown = served.log.read_text()
    assert "\\x1b[2J" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", shown)
    assert max(map(len, shown.splitlines())) < 700


def test_answers_that_are_computed_in_turns_are_those_of_each_alone(address: str) -> None:
    questions: list[Ask] = [
        {"messages": [{"role": "user", "content": f"Number {n}?"}], "max_tokens": 8 + 4 * n, "temperature": n % 2, "seed": n}
        for n in range(8)
    ]

    def answer(question: Ask) -> Any:
        return json.loads(post(address, question)[1])["choices"]

    alone = list(map(answer, questions))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, questions)) == alone
    assert len(set(map(str, alone))) == 8


def test_a_client_that_left_is_not_computed_for(served: Served) -> None:
    """20 answers of 1,024 tokens would take a minute."""
    for n in range(20):
        with connect(served.address) as client:
            client.sendall(asks(max_tokens=1024, stream=bool(n % 2)))
            time.sleep(0.05 * (n < 2))  # the first ones are under way
    started = time.perf_counter()
    assert post(served.address, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8})[0] == 200
    assert time.perf_counter() - started < 15
    assert "Traceback" not in served.log.read_text()


def test_idle_connections_make_room_for_one_that_asks(served: Served) -> None:
    idle = [connect(served.address) for _ in range(150)]
    used = cpu_seconds(served.pid)
    started = time.perf_counter()
    assert post(served.address, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2})[0] == 200
    assert time.perf_counter() - started < 5
    time.sleep(1)
    assert cpu_seconds(served.pid) - used < 1
    for client in idle:
        client.close()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mebibytes(pid: int, name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found.group(1)) >> 10


def ask_all(address: str, picture: Path, num_clients: int, num_questions: int) -> float:  # noqa: F811
    """Clients that ask at the same time, each one question after the other. Returns: the longest wait, in seconds."""

    def ask(client: int) -> float:
        waited = 0.0
        for n in range(num_questions):
            question = (
                about(picture, "What is it?") if (client + n) % 2 else {"messages": [{"role": "user", "content": "Why?"}]}
            )
            started = time.perf_counter()
            assert post(address, question | {"max_tokens": 32})[0] == 200
            waited = max(waited, time.perf_counter() - started)
        return waited

    with ThreadPoolExecutor(num_clients) as pool:
        return max(pool.map(ask, range(num_clients)))


@pytest.mark.parametrize(
    ("num_hostile", "num_honest"), [(40, 4), pytest.param(200, 8, marks=pytest.mark.campaign)], ids=["short", "full"]
)
def test_honest_clients_hardly_notice_hostile_ones(
    served: Served,
    picture: Path,  # noqa: F811
    num_hostile: int,
    num_honest: int,
) -> None:
    """Each hostile client holds on for as long as it can, and all begin at once, while the honest ones go on asking. What
    a quiet time is: the longest wait of as many honest clients alone, before or after."""
    quiet = ask_all(served.address, picture, num_honest, 3)
    start = mebibytes(served.pid, "VmRSS")
    port = served.address.rsplit(":", 1)[1]
    program = [sys.executable, "-m", "tests.pipelines.hostile_clients", port, str(num_hostile)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT) as hostile:
        assert hostile.stdout
        assert hostile.stdout.readline() == "attacking\n"
        waits = [ask_all(served.address, picture, num_honest, 3)]
        while hostile.poll() is None and num_hostile > 40:
            waits.append(ask_all(served.address, picture, num_honest, 3))
        if hostile.poll() is None:
            hostile.kill()
        print(hostile.stdout.read())
    quiet = max(quiet, ask_all(served.address, picture, num_honest, 3))
    peak = mebibytes(served.pid, "VmHWM")
    print(f"{num_hostile} hostile, {num_honest} honest: quiet {quiet:.2f} s, {max(waits):.2f} s; {start} MiB, peak {peak} MiB")
    assert max(waits) < 3 * quiet
    assert peak < 1.5 * start
    assert "Traceback" not in served.log.read_text()


# ---- the server alone, with a model that does as told -----------------------------------------------------------------


class Told:
    """In a model's place."""

    def read(self, data: bytes) -> tuple[Any, Any]:
        self.body = json.loads(data)
        return SimpleNamespace(stream=self.body.get("stream", False)), SimpleNamespace(ids=[1])

    def answer(self, request: Any, prompt: Any, write: Any, check: Any) -> tuple[str, int, str]:
        if "fail" in self.body:
            raise RuntimeError("a bug")
        for _ in range(self.body.get("pieces", 0)):
            write("x" * 1000)
            self.written = getattr(self, "written", 0) + 1
        return "done", 1, "stop"


@pytest.fixture
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Told]]:
    host = getattr(request, "param", "127.0.0.1")
    monkeypatch.setattr(serve, "READ_SECONDS", 1.0)
    server = serve.Server(serve.Arguments(run=Path("runs/told"), host=host, port=0))
    server.model = told = Told()  # type: ignore[assignment]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    thread.start()
    yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_address[1]}", told
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_error_inside_the_server_is_one_line_and_the_next_is_answered(alone: tuple[str, Told]) -> None:
    code, text = post(alone[0], {"fail": 1})
    assert (code, json.loads(text)["error"]["message"]) == (500, "an error inside the server: its log describes it")
    assert post(alone[0], {})[0] == 200


def test_a_client_that_does_not_read_is_left(alone: tuple[str, Told]) -> None:
    with connect(alone[0]) as client:
        client.sendall(request({"stream": True, "pieces": 100_000}))
        time.sleep(0.5)
        done = alone[1].written
        time.sleep(0.5)
        assert 100 < alone[1].written == done < 100_000


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat", request({}, 5_000)[:-2], request(b"x", 5_000)], ids=len)
def test_a_request_must_arrive_in_time_however_it_is_cut(alone: tuple[str, Told], begun: bytes) -> None:
    started = time.perf_counter()
    with connect(alone[0]) as client:
        client.sendall(begun)
        reply = b""
        while time.perf_counter() - started < 5:
            with contextlib.suppress(OSError):
                client.send(b"x" if begun else b"")
            client.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                if not (part := client.recv(1 << 16)):
                    break
                reply += part
    assert time.perf_counter() - started < 4
    assert not begun.endswith(b"x") or b" 408 " in reply, reply


def test_slow_senders_of_large_requests_make_room(alone: tuple[str, Told], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "READ_SECONDS", 20.0)
    with connect(alone[0]) as first, connect(alone[0]) as second, connect(alone[0]) as third:
        for client in (first, second, third):
            client.sendall(request(b"{", 300_000))
        time.sleep(0.2)
        started = time.perf_counter()
        assert post(alone[0], {"pad": "x" * 300_000})[0] == 200
        assert time.perf_counter() - started < 6


@pytest.mark.parametrize("alone", ["::1"], indirect=True)
def test_it_listens_on_ipv6(alone: tuple[str, Told]) -> None:
    assert post(alone[0], {})[0] == 200


def test_whoever_needs_the_least_goes_first_and_more_than_the_places_are_refused() -> None:
    turns, order = serve.Turns(), list[str]()

    def work(name: str, need: int, parts: int) -> None:
        with turns.turn(need, 4):
            for part in range(parts):
                order.append(name)
                turns.wait(need + part + 1)

    with turns.turn(0, 4):
        threads = [threading.Thread(target=work, args=each) for each in (("long", 10, 5), ("other", 12, 2), ("short", 1, 2))]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        with pytest.raises(serve.RefusalError, match="503"), turns.turn(0, 4):
            pass
    for thread in threads:
        thread.join()
    assert "".join(name[0] for name in order) == "sslllolol"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", ""], "--host is empty: wanted a value"),
        (["--host", " "], "choose another --host"),
        (["--port", "70000"], "--port is 70000: wanted 0 to 65535"),
        (["--port", "-1"], "--port is -1: wanted 0 to 65535"),
        (["--host", "192.0.2.7"], "choose another --host"),
        (["--max-new-tokens", "9" * 22], "wanted 1 to 65536"),
    ],
)
def test_a_place_that_cannot_be_listened_at_is_one_line(
    run: Path,  # noqa: F811
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said in message(serve.main, [str(run), *words], monkeypatch, capsys)
