"""`python -m pipelines.generate` answers as the library does, on one rank and on two, and tells mistakes in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import generate
from pipelines.generate import Arguments
from tests.support.ranks import run_ranks
from tests.support.small_runs import small_config, train

from .test_mistakes import message

SHORT = ["--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def run(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; its answers mean nothing, but they are its answers."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(mixed_dataset, folder, parts=("language", "vision_kv"), steps=1)
    run_ranks(train, 1, replace(config, model=replace(config.model, init_std=0.3)), start_gloo=False)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(path)
    return path


def command(*words: str, given: str = "") -> str:
    """What the command prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE", "SLURM_"))}
    program = [sys.executable, "-m", "pipelines.generate", *words, *SHORT]
    done = subprocess.run(program, input=given.encode(), env=env, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def answers_of(run: Path, picture: Path | None, talks: list[list[str]], stops: tuple[str, ...]) -> list[str]:
    """The library's answers to the last question of each talk (questions and answers in turn), without a cache."""
    from himix_megatron.data.images.decode import decode
    from himix_megatron.data.text import chat_template
    from himix_megatron.distributed.fused_kernels import detect
    from himix_megatron.distributed.topology import init_distributed, shutdown_distributed
    from himix_megatron.inference.generator import Answerer, Prompt

    job = generate.prepare(Arguments(run=run))
    answerer = Answerer(job.config, detect(), init_distributed(job.config.parallel, seed=0))
    answerer.load(job.checkpoint)
    images = () if picture is None else (decode(picture.read_bytes(), job.config.vision),)
    found = []
    for talk in talks:
        asked = {"conversations": [{"from": "human", "value": text} for text in talk]}
        ids = chat_template.prompt(asked, job.tokenizer, "tiny", len(talk) // 2).ids
        answer = answerer.answer([Prompt(ids, images)], (259,), 8, cached=False)[0]
        text = job.tokenizer.decode(answer).lstrip()
        found.append(min((text.split(stop)[0] for stop in stops), key=len) if stops else text)
    shutdown_distributed()
    return found


def test_the_answer_is_the_librarys_on_one_rank_and_two(run: Path, picture: Path) -> None:
    wanted = run_ranks(answers_of, 1, run, picture, [["Which colour?"]], (), start_gloo=False)[0][0]
    asked = [str(run), "--question", "Which colour?", "--image", str(picture)]
    assert command(*asked) == wanted + "\n"
    assert command(*asked, "--parallel.tensor", "2") == wanted + "\n"


def test_a_conversation_keeps_what_was_said(run: Path) -> None:
    shown = command(str(run), given="Say 3.\n\nSay 4.\n")
    first = run_ranks(answers_of, 1, run, None, [["Say 3."]], (), start_gloo=False)[0][0]
    second = run_ranks(answers_of, 1, run, None, [["Say 3.", first, "Say 4."]], (), start_gloo=False)[0][0]
    assert shown == f"{first}\n{second}\n"


def test_draws_repeat_with_their_seed_and_stop_texts_end(run: Path) -> None:
    asked = [str(run), "--question", "Say 3.", "--temperature", "1.5", "--top-p", "0.95"]
    first = command(*asked, "--seed", "4")
    assert first == command(*asked, "--seed", "4") != command(*asked, "--seed", "5")
    stop = first.rstrip("\n")[1]
    assert command(*asked, "--seed", "4", "--stop", "never said", stop) == first.split(stop)[0] + "\n"


MISTAKES = {
    "no run": (["EMPTY"], r"EMPTY is no run folder: it has no config.json"),
    "no image": (["RUN", "--image", "EMPTY/none.png"], r"EMPTY/none.png: No such file"),
    "not an image": (["RUN", "--image", "TEXT"], r"--image .*text.jpg: not_an_image"),
    "temperature": (["RUN", "--temperature", "-1"], r"temperature is -1.0: wanted 0"),
    "no temperature": (["RUN", "--temperature", "nan"], r"temperature is nan: wanted 0"),
    "cold": (["RUN", "--temperature", "1e-320"], r"temperature is 1e-320: wanted 0"),
    "FIFO": (["RUN", "--image", "FIFO"], r"fifo is a FIFO: wanted a regular file"),
    "device": (["RUN", "--image", "/dev/zero"], r"/dev/zero is a device: wanted a regular file"),
    "many tokens": (["RUN", "--max-new-tokens", "9" * 22], r"--max-new-tokens is 9+: wanted 1 to 65536"),
    "top_p": (["RUN", "--top-p", "0"], r"top_p is 0.0: wanted above 0"),
    "tokens": (["RUN", "--max-new-tokens", "0"], r"--max-new-tokens is 0: wanted 1 to 65536"),
    "stop": (["RUN", "--stop", "x" * 300], r"a stop string is empty or too long"),
    "layout": (["RUN", "--parallel.tensor", "4"], r"model.num_query_groups \(2\) does not divide over parallel.tensor \(4\)"),
    "flag": (["RUN", "--questions", "x"], r"unknown setting --questions: did you mean --question"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "text.jpg").write_text("no picture")
    words, wanted = MISTAKES[name]
    os.mkfifo(tmp_path / "fifo")
    places = {"FIFO": str(tmp_path / "fifo"), "RUN": str(run), "TEXT": str(tmp_path / "text.jpg")}
    words = [places.get(word, word.replace("EMPTY", str(tmp_path / "EMPTY"))) for word in words]
    shown = message(generate.main, [*words, *([] if name == "flag" else ["--question", "Why?"])], monkeypatch, capsys)
    assert re.search(wanted, shown), shown


def test_questions_from_a_closed_standard_input_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed: give --question" in message(generate.main, [str(run)], monkeypatch, capsys)
