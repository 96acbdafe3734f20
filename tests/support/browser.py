"""A headless Chromium for tests, driven over the WebDriver protocol, which is plain HTTP: nothing needs to be installed but
Chromium and its driver."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from himix_megatron.runtime.process import free_port
from tests.support import skip_if_fast

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# The text of the page and of all shadow roots in it, of which TensorBoard's older dashboards are made.
TEXT = """
const found = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE) { if (node.textContent.trim()) found.push(node.textContent.trim()); return; }
  if (['SCRIPT', 'STYLE'].includes(node.nodeName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return found.join('\\n');
"""
# How many pictures of the page, those in shadow roots too, have arrived.
PICTURES = """
let count = 0;
const walk = node => {
  if (node.nodeName === 'IMG' && node.complete && node.naturalWidth > 0) count += 1;
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return count;
"""


class Browser:
    """One window."""

    def __init__(self, driver: str, profile: Path, size: tuple[int, int]):
        self._driver = driver
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        self._session = self._call("POST", "/session", {"capabilities": capabilities})["sessionId"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._driver}{path}", data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())["value"]

    def _of_session(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._call(method, f"/session/{self._session}{path}", body)

    def open(self, url: str) -> None:
        """Go to a page of which only the part after # may be new."""
        self._of_session("POST", "/url", {"url": "about:blank"})
        self._of_session("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._of_session("POST", "/execute/sync", {"script": script, "args": []})

    def wait_for(self, *texts: str, pictures: int = 0, seconds: float = 60.0) -> str:
        """Wait until the page shows all of these and so many pictures. Returns: its text. Raises: AssertionError."""
        deadline = time.monotonic() + seconds
        while True:
            shown, seen = str(self.run(TEXT)), int(self.run(PICTURES))
            missing = [text for text in texts if text not in shown]
            if not missing and seen >= pictures:
                return shown
            assert time.monotonic() < deadline, f"{missing} not on the page, {seen} of {pictures} pictures there:\n{shown}"
            time.sleep(0.5)

    def screenshot(self, path: Path) -> None:
        """Save what the window shows."""
        path.write_bytes(base64.b64decode(self._of_session("GET", "/screenshot")))

    def close(self) -> None:
        """Close the window."""
        self._of_session("DELETE", "")


@contextmanager
def browser(folder: Path, size: tuple[int, int] = (1400, 1000)) -> Iterator[Browser]:
    """A window with a new profile in `folder`; everything that was started is ended."""
    skip_if_fast("a browser")
    assert DRIVER is not None
    port = free_port()
    with subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            answers(f"http://127.0.0.1:{port}/status", 30)
            window = Browser(f"http://127.0.0.1:{port}", folder / "profile", size)
            try:
                yield window
            finally:
                window.close()
        finally:
            driver.terminate()


def answers(url: str, seconds: float) -> None:
    """Wait until something answers there. Raises: TimeoutError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing answers at {url} after {seconds:.0f} s") from None
            time.sleep(0.3)
