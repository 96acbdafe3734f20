"""`make newcomer`: a fresh clone, and README's commands in their order, as somebody types them who has nothing but the page.

Left out are `make test`, commands with a placeholder in capitals, and those that read models or data from elsewhere. Slurm's
commands need Slurm. TensorBoard, which runs until it is stopped, is started, asked for its page, and stopped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from himix_megatron.monitoring.tensorboard import PAGES
from himix_megatron.runtime.process import free_port
from tests.docs.test_documents import ROOT, commands
from tests.support.browser import CHROMIUM, DRIVER, answers, browser

ELSEWHERE = re.compile(r"\b[A-Z]{3,}\b|models/|data/llava|_questions\.json|runs/start")
PAGES_OF_A_RUN = {
    "custom_scalars": tuple(PAGES),
    "images": ("pictures/sample_0", "pictures/sample_3"),
    "hparams": ("pipeline", "tensor", "global_batch", "recipe"),
}
"""TensorBoard's tabs, and what is read in each."""
SLURM = re.compile(r"\bsbatch\b|slurm\.submit|dev_slurm")


def shown() -> list[str]:
    """What a newcomer can type."""
    found = [command for command in commands((ROOT / "README.md").read_text()) if not ELSEWHERE.search(command)]
    if not shutil.which("slurmctld"):
        found = [command for command in found if not SLURM.search(command)]
    return [command for command in found if command not in ("make test", "make tensorboard")]


def environment() -> dict[str, str]:
    """Without what this test run has set up for itself."""
    left = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHONPATH", "PYTEST"))}
    return left


@pytest.mark.campaign
def test_readmes_commands_do_what_the_page_says(tmp_path: Path) -> None:
    clone = tmp_path / "himix-megatron"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    typed = shown()
    assert typed[0] == "make quickstart"
    script = "\n".join(["set -eo pipefail", *(f"echo; echo '$' {json.dumps(line)}\n{line}" for line in typed)])
    begun = time.monotonic()
    with (tmp_path / "output.txt").open("wb") as output:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=clone,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=2400,
            check=False,
        )
    text = (tmp_path / "output.txt").read_text(errors="replace")
    if shutil.which("slurmctld"):
        subprocess.run([".venv/bin/python", "-m", "tools.dev_slurm", "down"], cwd=clone, capture_output=True, check=False)
    assert done.returncode == 0, text[-3000:]
    print(f"{len(typed)} commands in {time.monotonic() - begun:.0f} s")
    summary = json.loads((clone / "runs/quickstart/summary.json").read_text())
    assert summary["answer_accuracy"] > 0.95
    assert summary["answer_accuracy_shuffled_images"] < 0.3
    for path in (
        "runs/tiny_align/checkpoints/step-00000040/himix.json",
        "runs/tiny_instruct/checkpoints/step-00000040/himix.json",
        "data/my-set/manifest.json",
        "runs/tiny_align-weak/efficiency.png",
        "exported/modeling_himix.py",
    ):
        assert (clone / path).is_file(), path
    if shutil.which("slurmctld"):
        assert (clone / "runs/chain_instruct/checkpoints/step-00000020/himix.json").is_file()
    for said in ("hashes, headers, counts and checksums are all right", "step 40/40", "efficiency", "10.7 times"):
        assert said in text, said
    look_at_tensorboard(clone, tmp_path)


def look_at_tensorboard(clone: Path, pictures: Path) -> None:
    """`make tensorboard` serves the runs; where there is a browser, the pages of the quickstart's run are in it."""
    shown_by_make = subprocess.run(["make", "-n", "tensorboard"], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert "tensorboard --logdir runs --host 127.0.0.1" in shown_by_make
    with tensorboard(clone, "runs") as address:
        assert any("quickstart" in run for run in json.load(urllib.request.urlopen(f"{address}/data/runs", timeout=30)))
    if not (CHROMIUM and DRIVER):
        return
    with tensorboard(clone, "runs/quickstart/instruct") as address, browser(pictures / "chromium") as window:
        for page, wanted in PAGES_OF_A_RUN.items():
            window.open(f"{address}/#{page}")
            window.wait_for(*wanted, pictures=4 if page == "images" else 0)
            window.screenshot(pictures / f"tensorboard-{page}.png")


@contextmanager
def tensorboard(clone: Path, folder: str) -> Iterator[str]:
    """TensorBoard over a folder of the clone, on a port of its own. Gives: its address."""
    port = free_port()
    command = [clone / ".venv/bin/tensorboard", "--logdir", folder, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=clone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        answers(f"http://127.0.0.1:{port}/data/runs", 90)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
