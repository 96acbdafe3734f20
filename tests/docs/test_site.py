"""The documentation site: it builds without a warning, asks nobody else for anything, and works in a real browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from himix_megatron.config import Config
from pipelines.flags import leaf_hints
from tests.support.browser import CHROMIUM, DRIVER, Browser, browser

ROOT = Path(__file__).parents[2]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver, and one is missing"
)
# As `make docs` runs it, but any import of torch would fail.
BUILD = "import sys; sys.modules['torch'] = None; from mkdocs.__main__ import cli; cli()"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly. Returns: its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on 127.0.0.1. Returns: its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def test_the_configuration_reference_has_every_setting(site: Path) -> None:
    page = (site / "reference" / "configuration" / "index.html").read_text(encoding="utf-8")
    assert [name for name in leaf_hints(Config) if f'<h3 id="{name}">' not in page] == []
    assert "--train.global-batch-samples" in page
    assert "Samples per optimizer step, over all ranks" in page


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|link(?=[^>]*stylesheet|[^>]*preload|[^>]*preconnect))[^>]+(?:src|href)=[\"']?(?:https?:)?//"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert [str(page.relative_to(site)) for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


def test_links_out_of_the_documents_are_paths_on_the_site(site: Path) -> None:
    page = (site / "security" / "index.html").read_text(encoding="utf-8")
    assert "<code>constraints.txt</code>" in page
    assert "../constraints.txt" not in page


@needs_browser
def test_home_leads_to_the_groups_of_pages(window: Browser, address: str) -> None:
    window.open(address)
    groups = ("Getting started", "Guides", "Concepts", "Reference", "Development")
    assert "Results" in window.wait_for("Where to go", *groups, pictures=1, seconds=20)


@needs_browser
def test_the_configuration_reference_is_readable_in_a_browser(window: Browser, address: str, tmp_path: Path) -> None:
    window.open(f"{address}/reference/configuration/#train.seed")
    window.wait_for("train.seed", "--train.seed", "1234", seconds=20)
    window.screenshot(tmp_path / "configuration.png")
    assert (tmp_path / "configuration.png").stat().st_size > 10_000


@needs_browser
def test_the_search_finds_vision_kv(window: Browser, address: str) -> None:
    window.open(f"{address}/?q=vision_kv")
    window.wait_for("matching documents", "vision_kv", seconds=20)
    links = window.run("return [...document.querySelectorAll('.md-search-result__link')].map(link => link.pathname)")
    assert "/glossary/" in links
    assert "/reference/configuration/" in links
