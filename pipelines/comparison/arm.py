"""One arm of a comparison: train it, then measure what each of its checkpoints can do.

    python -m pipelines.comparison.arm RECIPE --section.field value ...

pipelines.compare starts it, with words that pipelines.pretrain takes too. Trains as that does; then asks the questions of
data.validation_path at every checkpoint.keep_every steps, and times answers. Flows out: the run, and RUN/measured.json. What it
spends is read from the points that training wrote for each step. Killed anywhere, the same command goes on.
"""

from __future__ import annotations

from himix_megatron.runtime.stop_signals import StopRequest

REQUEST = StopRequest() if __name__ == "__main__" else None  # before the libraries, as in pipelines.pretrain

import hashlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from statistics import fmean, median  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402

from himix_megatron.config import Config  # noqa: E402
from himix_megatron.data.shards.reader import ShardDataset  # noqa: E402
from himix_megatron.data.text import chat_template  # noqa: E402
from himix_megatron.data.text.tokenizer import load_tokenizer  # noqa: E402
from himix_megatron.runtime.process import bulk_import  # noqa: E402
from himix_megatron.runtime.stop_signals import exit_now  # noqa: E402
from pipelines import evaluate  # noqa: E402
from pipelines.cli import parse, run_main  # noqa: E402
from pipelines.comparison.records import MEASURED, Measured, Point, read, write  # noqa: E402

if TYPE_CHECKING:
    from himix_megatron.evaluation.exact_match import Question
    from himix_megatron.inference.generator import Answerer

BATCH_QUESTIONS = 64
TIMED, NEW_TOKENS = 5, 9
"""Repetitions of what is timed, and the tokens of a timed answer."""
TAGS = (
    *("time/step_seconds", "train/loss", "compute/decoder_tflops_per_second_per_rank"),
    *("compute/model_tflops_per_second", "memory/peak_gib"),
)


def main() -> int:
    """The command line. Returns: the exit code."""
    config = parse(sys.argv[1:], "python -m pipelines.comparison.arm")
    with bulk_import():
        from himix_megatron.distributed.topology import shutdown_distributed
        from himix_megatron.training.loop import pretrain

    request = REQUEST or StopRequest()
    if code := pretrain(config, request):
        return code
    request.restore_handlers()  # all that follows is done again if a signal ends it
    shutdown_distributed()
    path = config.run_dir / MEASURED
    # Once it is there, checkpoints may have been removed.
    if not path.is_file() or [point.step for point in read(Measured, path).curve] != measured_steps(config):
        write(path, measure(config))
    return 0


def measured_steps(config: Config) -> list[int]:
    """The steps whose checkpoints are measured."""
    last, every = config.train.steps or 0, config.checkpoint.keep_every or 1
    return [*range(every, last, every), last]


def measure(trained: Config) -> Measured:
    """Everything about a run that has ended."""
    import torch

    from himix_megatron.checkpoint.manifest import validation_loss
    from himix_megatron.evaluation import exact_match, runner
    from himix_megatron.monitoring.environment import code_version

    run_dir, steps = trained.run_dir, measured_steps(trained)
    config, dataset = evaluate.load_config(run_dir, trained.parallel), ShardDataset(str(trained.data.validation_path))
    numbers, items, curve = step_numbers(run_dir, steps[-1]), exact_match.questions(dataset, None), []
    # A kill takes the last seconds' points: the mean of the others stands in for them.
    seconds, loss, decoder, total, memory = np.where(np.isnan(numbers), np.nanmean(numbers, axis=1, keepdims=True), numbers)
    step_seconds = float(np.median(seconds))
    kinds = [kind_of(dataset, question) for question in items]
    answerer = evaluate.start(config, run_dir / "checkpoints" / f"step-{steps[-1]:08d}")

    def marks(source: dict[int, int]) -> list[bool]:
        answers = exact_match.ask(config, answerer, dataset, items, source, batch_questions=BATCH_QUESTIONS,
                                  max_new_tokens=evaluate.MAX_NEW_TOKENS)  # fmt: skip
        return [answer == question.expected for answer, question in zip(answers, items, strict=True)]

    shuffled, speeds = marks(exact_match.partners(dataset, config.train.seed)), answer_speeds(config, answerer, dataset, items)
    for step in steps:
        answerer.load(folder := run_dir / "checkpoints" / f"step-{step:08d}")
        correct, right = dict.fromkeys(sorted(set(kinds)), ""), marks({})
        for kind, is_right in zip(kinds, right, strict=True):
            correct[kind] += str(int(is_right))
        runner.to_tensorboard(run_dir, "heldout", step, {"answer_accuracy": fmean(right)})
        before = curve[-1].step if curve else 0
        spent = (1e12 * float((rate * seconds)[:step].sum()) for rate in (decoder, total))
        curve.append(Point(step=step, decoder_flops=next(spent), total_flops=next(spent), seconds=step * step_seconds,
                           loss=float(loss[before:step].mean()), heldout_loss=validation_loss(folder),
                           correct=correct))  # fmt: skip
    weights = {id(weight): weight.numel() for part in (*answerer.model_chunks, answerer.tower) for weight in part.parameters()}
    return Measured(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        code=code_version(),
        parameters=sum(weights.values()),
        samples=samples_digest(run_dir),
        heldout=dataset.fingerprint,
        lost_points=int(np.isnan(numbers[0]).sum()),
        step_seconds=step_seconds,
        samples_per_second=config.global_batch / step_seconds,
        memory_gib=float(memory.max()),
        first_token_seconds=speeds[0],
        tokens_per_second=speeds[1],
        shuffled_accuracy=fmean(shuffled),
        curve=tuple(curve),
    )


def kind_of(dataset: ShardDataset, question: Question) -> str:
    """What a question is about: what a rendered world's ids say behind a slash, else its first two words."""
    _, _, kind = str(dataset.text(question.sample).get("id", "")).partition("/")
    return kind or " ".join(question.asked.split()[:2])


def step_numbers(run_dir: Path, steps: int) -> npt.NDArray[np.float64]:
    """float[TAGS, steps]: training's points; nan where there is none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # imports a second of other packages

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    table = np.full((len(TAGS), steps), np.nan)
    for row, tag in zip(table, TAGS, strict=True):
        for point in events.Scalars(tag):
            row[point.step - 1] = point.value
    return table


def samples_digest(run_dir: Path) -> str:
    """Of the samples of each step, by the ledger; a resumed run has a repeated step's twice, and they are the same."""
    with (run_dir / "ledger" / "rank-000.jsonl").open() as file:
        lines = map(json.loads, file)
        found = dict.fromkeys(f"{line['step']} {line['dataset']} {line['shard']} {line['key']}\n" for line in lines)
    return hashlib.sha256("".join(found).encode()).hexdigest()


def answer_speeds(config: Config, answerer: Answerer, dataset: ShardDataset, items: Sequence[Question]) -> tuple[float, float]:
    """Seconds to the first token of one question, and tokens a second after the first for a batch of questions."""
    from himix_megatron.evaluation.exact_match import pictures_of
    from himix_megatron.inference.generator import Prompt

    tokenizer, prompts = load_tokenizer(config.data.tokenizer), []
    for question in items[:BATCH_QUESTIONS]:
        text = chat_template.prompt(dataset.text(question.sample), tokenizer, config.data.template, question.turn)
        prompts.append(Prompt(text.ids, pictures_of(dataset, question.sample, config.vision) or (), text.image_places))

    def seconds(asked: Sequence[Prompt], new_tokens: int) -> float:
        started = time.perf_counter()
        answerer.answer(asked, (), new_tokens)
        return time.perf_counter() - started

    first = median(seconds(prompts[number % len(prompts) :][:1], 1) for number in range(3 * TIMED))
    more = median(seconds(prompts, NEW_TOKENS) - seconds(prompts, 1) for _ in range(TIMED))
    return first, len(prompts) * (NEW_TOKENS - 1) / more


if __name__ == "__main__":
    run_main(lambda: exit_now(main()))
