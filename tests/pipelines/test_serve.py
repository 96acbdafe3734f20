"""`python -m pipelines.serve` answers over HTTP as `pipelines.generate` does, and tells a client's mistake in one line."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_generate_command import command, picture, run  # noqa: F401

Ask = dict[str, Any]


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:  # noqa: F811
    program = [sys.executable, "-m", "pipelines.serve", str(run), "--port", "0", "--max-new-tokens", "8"]
    server = subprocess.Popen(program, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            yield found.group()
            break
    else:
        pytest.fail("".join(lines))
    server.kill()
    server.wait()


def post(address: str, body: Any) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(f"{address}/v1/chat/completions", data, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def about(path: Path, question: str, **options: Any) -> Ask:
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], **options}


def test_an_answer_is_that_of_the_command(run: Path, picture: Path, address: str) -> None:  # noqa: F811
    wanted = command(str(run), "--image", str(picture), "--question", "What is it?").rstrip("\n")
    code, text = post(address, about(picture, "What is it?"))
    reply = json.loads(text)
    assert code == 200, text
    assert reply["choices"][0]["message"]["content"] == wanted
    assert reply["usage"]["completion_tokens"] <= 8
    _, streamed = post(address, about(picture, "What is it?", stream=True))
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == wanted
    assert streamed.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"not json", "Expecting value"),
        ([], '"messages" is missing'),
        ({"messages": [{"role": "system", "content": "x"}]}, 'another role than "user"'),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "nothing is asked"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "content of type 'video'"),
        ({"messages": [{"role": "user", "content": 7}]}, "neither a text nor a list"),
        ({"messages": [{"role": "user", "content": "a"}], "temperature": -1}, "temperature is -1"),
        ({"messages": [{"role": "user", "content": "a"}], "stop": [""]}, '"stop" holds'),
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
