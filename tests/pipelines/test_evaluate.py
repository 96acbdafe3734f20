"""Evaluation of a small trained run: by exact match, and by benchmarks: resumed, spread over ranks, with bad images."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from himix_megatron.config import ParallelConfig, to_json
from pipelines import evaluate
from pipelines.evaluate import Arguments
from pipelines.recipes import RECIPES
from tests.support.datasets import COLOURS
from tests.support.ranks import run_ranks
from tests.support.small_runs import history, small_config, train

from .test_mistakes import message

NUM_IMAGES = 10


def test_a_run_is_evaluated_at_any_layout_however_its_kernels_ran(tmp_path: Path) -> None:
    """CUDA graphs and attention's kernels are training's business, and may not be possible where it is evaluated."""
    recipe = RECIPES["qwen2_0_5b_instruct"]()
    config = replace(
        recipe,
        model=replace(recipe.model, attention_core="triton", layer_spec="te"),
        data=replace(recipe.data, pack_max_text_tokens=8192, pack_max_vision_tokens=23328),
        train=replace(recipe.train, global_batch_samples=None, global_batch_packs=4, cuda_graphs="on"),
    )
    (tmp_path / "config.json").write_text(to_json(config))
    found = evaluate.load_config(tmp_path, ParallelConfig(tensor=2, pipeline=2))
    assert (found.train.cuda_graphs, found.model.attention_core, found.parallel.tensor) == ("off", "auto", 2)
    assert found.model.layer_spec == "auto"


def evaluated(*steps: Arguments | Callable[[], Any]) -> list[dict[str, Any]]:
    """Evaluate on this rank, once for each Arguments, and call what is between; for `run_ranks(..., start_gloo=False)`."""
    from himix_megatron.runtime import log

    found = []
    for step in steps:
        if not isinstance(step, Arguments):
            step()
            continue
        found.append(evaluate.evaluate(step) if step.benchmark is None else evaluate.evaluate_benchmark(step))
        log.stop()
        # The next one meets elsewhere: at the same port a quick rank would find the store of the last.
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return found


def warned(*steps: Arguments | Callable[[], Any]) -> list[str]:
    """The warnings that `evaluated` would show."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("himix_megatron.evaluation").addHandler(Listener(logging.WARNING))
    evaluated(*steps)
    return said


def on_ranks(*steps: Arguments | Callable[[], Any], ranks: int = 1) -> list[dict[str, Any]]:
    """Rank 0's results."""
    found: list[dict[str, Any]] = run_ranks(evaluated, ranks, *steps, start_gloo=False)[0]
    return found


@pytest.fixture(scope="module")
def trained(mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps: it knows nothing, but always answers the same."""
    run = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(train, 1, small_config(mixed_dataset, run, parts=("language", "vision_kv")), start_gloo=False)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run to evaluate, with the times of its files."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def make_release(folder: Path) -> Path:
    """A small benchmark in MME's form: two questions on each of 10 images, in two categories."""
    for number in range(NUM_IMAGES):
        category = folder / ("color", "code_reasoning")[number % 2]
        category.mkdir(parents=True, exist_ok=True)
        name, other = sorted(COLOURS)[number % 5], sorted(COLOURS)[(number + 1) % 5]
        Image.new("RGB", (20, 20), COLOURS[name]).save(category / f"{number}.png")
        lines = f"Is it {name}? Please answer yes or no.\tYes\nIs it {other}? Please answer yes or no.\tNo\n"
        (category / f"{number}.txt").write_text(lines)
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A benchmark to spoil."""
    return make_release(tmp_path / "MME")


def asking(run: Path, release: Path, **changes: Any) -> Arguments:
    return Arguments(**{"run": run, "benchmark": "mme", "questions": release, "batch_questions": 3} | changes)


@dataclass(frozen=True)
class Done:
    """One rank's evaluations of one run: a scored benchmark, one that a judge scores, and exact match over shards."""

    run: Path
    release: Path
    mme: dict[str, Any]
    mmvet: dict[str, Any]
    shards: dict[str, Any]


@pytest.fixture(scope="module")
def done(trained: Path, mixed_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("done")
    run, release = Path(shutil.copytree(trained, folder / "run")), make_release(folder / "MME")
    Image.new("RGB", (20, 20), "red").save(folder / "v1_0.png")
    rows = {"v1_0": {"imagename": "v1_0.png", "question": "What is it?", "answer": "red"}}
    (folder / "mm-vet.json").write_text(json.dumps(rows))
    vet = {"benchmark": "mmvet", "questions": folder / "mm-vet.json", "images": folder, "max_new_tokens": 5, "name": "vet"}
    results = on_ranks(asking(run, release), Arguments(run=run, **vet), Arguments(run=run, data=mixed_dataset, max_samples=8))
    return Done(run, release, *results)


def lines(run: Path, name: str = "mme") -> list[dict[str, Any]]:
    """Answers on the disk, of all ranks."""
    files = sorted((run / "evaluation" / name).glob("answers-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_benchmark_ends_in_json_tensorboard_and_official_files(done: Done) -> None:
    assert json.loads((done.run / "evaluation" / "mme.json").read_text()) == done.mme
    assert done.mme["questions"] == 2 * NUM_IMAGES
    assert done.mme["step"] == 10
    figures = done.mme["figures"]
    assert {"perception", "cognition", "score/color", "accuracy_plus_percent/code_reasoning"} <= figures.keys()
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
    assert history(done.run)["evaluation/mme/perception"] == pytest.approx([figures["perception"]["value"]])
    rows = [line.split("\t") for line in (done.run / "evaluation" / "mme" / "color.txt").read_text().splitlines()]
    assert len(rows) == NUM_IMAGES
    assert rows[0][:3] == ["0.png", "Is it black? Please answer yes or no.", "Yes"]


@pytest.mark.parametrize(("layout", "shares"), [({}, [10, 10]), ({"tensor": 2}, [20])], ids=["data 2", "tensor 2"])
def test_two_ranks_share_the_questions_or_the_model_and_find_the_same(
    layout: dict[str, int], shares: list[int], done: Done, run: Path
) -> None:
    (together,) = on_ranks(asking(run, done.release, parallel=ParallelConfig(**layout)), ranks=2)
    assert together["figures"] == done.mme["figures"]
    files = sorted((run / "evaluation" / "mme").glob("answers-*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == shares
    assert {line["id"]: line["answer"] for line in lines(run)} == {line["id"]: line["answer"] for line in lines(done.run)}


def test_a_killed_evaluation_asks_only_what_is_missing(run: Path, release: Path) -> None:
    words = ["--benchmark", "mme", "--questions", str(release), "--batch-questions", "1", "--max-new-tokens", "200"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.evaluate", str(run), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    answers = run / "evaluation" / "mme" / "answers-000.jsonl"
    deadline = time.monotonic() + 120
    while not (answers.is_file() and answers.read_text().count("\n") >= 3):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = answers.read_text()
    assert before.count("\n") < 2 * NUM_IMAGES
    # A line cut in the middle, as a full disk or a lost node leaves it; and an answer by which its reuse is seen.
    whole = before[: before.rindex("\n") + 1].splitlines()
    first = json.loads(whole[0]) | {"answer": "yes, as I said before"}
    answers.write_text("\n".join([json.dumps(first), *whole[1:]]) + '\n{"id": "color/0.png#1", "as')
    (result,) = on_ranks(asking(run, release, batch_questions=8, max_new_tokens=200), ranks=2)
    found = lines(run)
    assert len(found) == len({line["asked"] for line in found}) == 2 * NUM_IMAGES
    assert result["questions"] == 2 * NUM_IMAGES
    assert "yes, as I said before" in "".join(file.read_text() for file in (run / "evaluation" / "mme").glob("*.txt"))


def test_more_questions_of_the_same_set_keep_the_answers(run: Path, release: Path) -> None:
    few, all_of_them = on_ranks(asking(run, release, max_samples=6), asking(run, release))
    assert (few["questions"], all_of_them["questions"]) == (6, 2 * NUM_IMAGES)
    assert len(lines(run)) == 2 * NUM_IMAGES


def test_other_settings_or_another_checkpoint_start_anew(run: Path, release: Path) -> None:
    written_again = partial(os.utime, run / "checkpoints" / "step-00000010" / "himix.json", (1, 1))
    shorter = asking(run, release, max_new_tokens=3)
    steps = (asking(run, release), shorter, shorter, written_again, shorter)
    first, second = run_ranks(warned, 1, *steps, start_gloo=False)[0]
    assert first.endswith("starting anew, the answers there are of another max_new_tokens (was 16, is 3)")
    assert "starting anew, the answers there are of another checkpoint written (was " in second
    assert len(lines(run)) == 2 * NUM_IMAGES
    assert all(len(line["answer"]) <= 3 for line in lines(run))


@pytest.fixture
def broken(release: Path) -> Path:
    """One image of ten is damaged."""
    (release / "color" / "0.png").write_bytes(b"no image")
    return release


def test_a_bad_image_is_named_and_counts_as_wrong_until_it_is_mended(run: Path, broken: Path) -> None:
    mend = partial(shutil.copyfile, broken / "color" / "2.png", broken / "color" / "0.png")
    before, after = on_ranks(asking(run, broken, max_bad_fraction=0.2), mend, asking(run, broken))
    assert list(before["unreadable"]) == ["color/0.png#0", "color/0.png#1"]
    assert "not_an_image" in before["unreadable"]["color/0.png#0"]
    assert after["unreadable"] == {}
    assert len(lines(run)) == 2 * NUM_IMAGES


def test_too_many_bad_images_fail_and_keep_the_answers(run: Path, broken: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"2 of 20 questions have an image .* more than --max-bad-fraction 0.01: color/0.png#0"
    ):
        on_ranks(asking(run, broken))
    assert len(lines(run)) == 2 * NUM_IMAGES - 2
    assert not (run / "evaluation" / "mme.json").exists()


def test_what_a_judge_scores_elsewhere_has_an_answer_file_and_no_figures(done: Done) -> None:
    assert "GPT-4 judge" in done.mmvet["scored"]
    assert "figures" not in done.mmvet
    assert list(json.loads((done.run / "evaluation" / "vet" / "mmvet_results.json").read_text())) == ["v1_0"]


def test_exact_match_over_shards_is_as_it_was(done: Done) -> None:
    names = ["checkpoint", "questions", "answer_accuracy", "answer_accuracy_shuffled_images", "seconds"]
    assert list(done.shards) == names
    assert json.loads((done.run / "evaluation" / "shards.json").read_text()) == done.shards
    answers = (done.run / "evaluation" / "shards.answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in answers]
    assert list(rows[0]) == ["key", "question", "expected", "answer", "answer_shuffled_images"]
    assert done.shards["answer_accuracy"] == sum(row["answer"] == row["expected"] for row in rows) / 8
    assert history(done.run)["evaluation/shards/answer_accuracy"] == [done.shards["answer_accuracy"]]


MISTAKES = {
    "neither": ([], "give either --data, a shard dataset, or --benchmark"),
    "both": (["--data", "X", "--benchmark", "gqa", "--questions", "X"], "give either --data"),
    "no questions": (["--benchmark", "gqa"], "--questions must be given: the question file of gqa"),
    "images without a benchmark": (["--data", "X", "--images", "X"], "belong to --benchmark"),
    "no batch": (["--data", "X", "--batch-questions", "0"], "--batch-questions is 0: wanted 1 or more"),
    "unknown benchmark": (["--benchmark", "vizwiz"], "--benchmark"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words, wanted = MISTAKES[name]
    assert wanted in message(evaluate.main, ["RUN", *words], monkeypatch, capsys)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../x", ".x", "-x", "a\nb", "x" * 76])
def test_results_have_a_name_that_is_one(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of results"):
        asking(Path("run"), Path("MME"), name=name)


def test_results_of_a_dataset_have_the_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"data/shards": "shards", "data/shards/..": "data", ".": tmp_path.name, "../x": "x", "日本 語": "日本 語"}
    assert {path: Arguments(run=tmp_path, data=Path(path)).results for path in names} == names
    with pytest.raises(ValueError, match="'' is no name of results"):
        Arguments(run=tmp_path, data=Path("/"))


@pytest.fixture
def barred(request: pytest.FixtureRequest, run: Path) -> Iterator[Path]:
    """A run folder without a place for results."""
    if request.param == "read-only":
        done = subprocess.run(["mount", "--bind", "-o", "ro", str(run), str(run)], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("a read-only mount needs root")
        yield run
        subprocess.run(["umount", str(run)], check=True)
        return
    elsewhere = run.with_name("elsewhere")
    elsewhere.mkdir()
    shutil.rmtree(run / request.param, ignore_errors=True)
    (run / request.param).symlink_to(elsewhere)
    yield run
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("barred", ["read-only", "evaluation", "tensorboard"], indirect=True)
def test_nothing_is_asked_if_the_results_could_not_be_kept(
    barred: Path, release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "ensure_ranks", lambda *_: pytest.fail("ranks were started"))
    words = [str(barred), "--benchmark", "mme", "--questions", str(release)]
    assert re.search(
        "(evaluation|tensorboard).*(cannot be written|is a symbolic link|Read-only)",
        message(evaluate.main, words, monkeypatch, capsys),
    )


def show_figures_of_a_full_disk(run: Path, release: Path) -> str:
    """Evaluate where nothing can be written any more once the questions were asked. Returns: what was shown."""
    from himix_megatron.evaluation import runner

    shown, collect = io.StringIO(), runner.collect

    def fill(*given: Any) -> Any:
        answers = collect(*given)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        return answers

    runner.collect = fill
    with contextlib.redirect_stdout(shown), contextlib.suppress(OSError):
        evaluate.evaluate_benchmark(asking(run, release))
    return shown.getvalue()


def test_figures_are_shown_before_they_are_written(run: Path, release: Path) -> None:
    (shown,) = run_ranks(show_figures_of_a_full_disk, 1, run, release, start_gloo=False)
    assert "perception" in json.loads(shown)["figures"]
    assert not (run / "evaluation" / "mme.json").exists()


def test_results_are_not_written_through_links(run: Path, done: Done, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine, without a line break")
    (run / "evaluation" / "mme").mkdir(parents=True)
    for name in ("mme.json", "mme/color.txt"):
        (run / "evaluation" / name).symlink_to(victim)
    on_ranks(asking(run, done.release))
    (run / "evaluation" / "mme" / "answers-000.jsonl").unlink()
    (run / "evaluation" / "mme" / "answers-000.jsonl").symlink_to(victim)
    with pytest.raises(RuntimeError, match=r"answers-000\.jsonl is a symbolic link"):
        on_ranks(asking(run, done.release))
    assert victim.read_text() == "mine, without a line break"


@pytest.mark.parametrize("name", ["../victim.png", "VICTIM", "inside/link.png", "linked/victim.png", "fifo.png", "inside"])
def test_images_are_read_from_their_folder_alone(name: str, run: Path, tmp_path: Path) -> None:
    images, victim = tmp_path / "images", tmp_path / "victim.png"
    (images / "inside").mkdir(parents=True)
    Image.new("RGB", (20, 20), "red").save(victim)
    (images / "inside" / "link.png").symlink_to(victim)
    (images / "linked").symlink_to(tmp_path)
    os.mkfifo(images / "fifo.png")
    name = name.replace("VICTIM", str(victim))
    (tmp_path / "vet.json").write_text(json.dumps({"v1_0": {"imagename": name, "question": "What is it?"}}))
    asked = Arguments(run=run, benchmark="mmvet", questions=tmp_path / "vet.json", images=images)
    with pytest.raises(
        ValueError, match=r"have an image in .* that cannot be read.*(is no name|symbolic link|wanted a regular)"
    ):
        evaluate.evaluate_benchmark(asked)


def test_half_of_an_images_questions_are_refused_before_they_are_asked(run: Path, release: Path) -> None:
    with pytest.raises(ValueError, match=r"two questions an image, but code_reasoning has 1 about code_reasoning/5\.png"):
        evaluate.evaluate_benchmark(asking(run, release, max_samples=5))


def test_missing_images_are_found_before_any_rank_starts(run: Path, tmp_path: Path) -> None:
    row = {"question": "Is it red?", "imageId": "n1", "answer": "yes"}
    (tmp_path / "gqa.json").write_text(json.dumps({"1": row}))
    arguments = Arguments(run=run, benchmark="gqa", questions=tmp_path / "gqa.json", images=tmp_path)
    with pytest.raises(ValueError, match=r"1 of 1 questions have an image .*: 1: n1\.jpg is missing"):
        evaluate.evaluate_benchmark(arguments)
