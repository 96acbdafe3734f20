"""TensorBoard on a real run, in a real browser: the pages are there, ready to be read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from himix_megatron.config import Config
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.data.text.chat_template import turns_of
from himix_megatron.monitoring.tensorboard import PAGES
from himix_megatron.runtime.process import free_port
from tests.support.browser import CHROMIUM, DRIVER, Browser, answers, browser

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver, and one is missing"
)


@pytest.fixture(scope="module")
def tensorboard(run_dir: Path) -> Iterator[str]:
    """TensorBoard over the folder that the run is in, as `make tensorboard` starts it. Returns: its address."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir.parent), "--host", "127.0.0.1"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL, env=environment) as server:
        try:
            answers(f"http://127.0.0.1:{port}/data/runs", 60)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def test_the_layout_asks_three_questions(window: Browser, tensorboard: str, tmp_path: Path) -> None:
    window.open(f"{tensorboard}/#custom_scalars")
    charts = list(PAGES["Is it learning?"])
    window.wait_for(*PAGES, *charts, "run/tensorboard")
    window.screenshot(tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 10_000


def test_pictures_show_question_expected_and_given_answer(
    window: Browser, tensorboard: str, watched_run: Config, tmp_path: Path
) -> None:
    window.open(f"{tensorboard}/#images")
    window.wait_for("pictures/sample_0", "pictures/sample_3", pictures=4)
    window.screenshot(tmp_path / "pictures.png")
    heldout = ShardDataset(str(watched_run.data.validation_path))
    question, expected = turns_of(heldout.text(0))[0]
    window.open(f"{tensorboard}/#text")
    window.wait_for("pictures/answers", heldout.key(0), question, expected, "run/settings", "run/environment", "megatron-core")
    window.screenshot(tmp_path / "text.png")


def test_hyper_parameters_have_layout_and_sizes(window: Browser, tensorboard: str, watched_run: Config, tmp_path: Path) -> None:
    window.open(f"{tensorboard}/#hparams")
    names = ("pipeline", "tensor", "global_batch", "num_layers", "recipe", "train/loss")
    sizes = f"{watched_run.model.hidden_size:.2f}", f"{watched_run.global_batch:.4f}"
    shown = window.wait_for(*names, "run/tensorboard", *sizes)
    window.screenshot(tmp_path / "hparams.png")
    assert all(name in shown for name in (*names, *sizes))
