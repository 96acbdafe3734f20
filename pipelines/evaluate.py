"""How many questions does a run answer exactly right, and how many without looking?

    python -m pipelines.evaluate runs/quickstart/instruct --data DIR

Asks every question of a shard dataset (each turn, with the turns before it), greedily, twice: with the sample's own images,
and with the images of another sample. The second figure is what the model knows from the text alone. Starts its own ranks.
Writes RUN/evaluation/NAME.json and one line per question to NAME.answers.jsonl.

    python -m pipelines.evaluate RUN --benchmark gqa --questions testdev_balanced_questions.json --images gqa/images

Asks one of the paper's seven benchmarks instead: official scores, official answer files, resumable (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from himix_megatron.checkpoint.description import check_architecture
from himix_megatron.checkpoint.manifest import find_checkpoint
from himix_megatron.config import Config, Count, Fraction, ParallelConfig, check_known, read_config
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.data.text.tokenizer import Piece, load_tokenizer
from himix_megatron.distributed.launch import ensure_ranks
from himix_megatron.runtime import log
from himix_megatron.runtime.durable_files import publish
from himix_megatron.runtime.limits import Pattern
from himix_megatron.runtime.process import bulk_import
from himix_megatron.runtime.untrusted_files import folder_below
from pipelines.cli import parse_settings, run_main
from pipelines.flags import Word

if TYPE_CHECKING:
    from himix_megatron.inference.generator import Answerer

logger = logging.getLogger(__name__)

RESULTS_NAME = Pattern(r"[^\x00-\x1f\x7f/\\.-][^\x00-\x1f\x7f/\\]{,74}", "up to 75 characters, no slash, no dot or dash first")
MAX_NEW_TOKENS = 32
"""Default of --max-new-tokens for a shard dataset's questions."""


@dataclass(frozen=True)
class Arguments:
    """Exact-match accuracy of a run over a shard dataset, with its images and with shuffled ones; or a benchmark's scores."""

    run: Annotated[Path, Word("RUN")]
    """Run folder."""
    data: Path | None = None
    """Shard dataset whose questions are asked."""
    benchmark: str | None = None
    """Benchmark whose questions are asked instead: vqav2, gqa, textvqa, pope, mme, mmmu or mmvet."""
    questions: Path | None = None
    """Question file of the benchmark, or the folder of its question files (docs/evaluation.md)."""
    images: Path | None = None
    """Folder of the benchmark's images."""
    annotations: Path | None = None
    """File of the benchmark's answers, where they are not in its question file."""
    name: str | None = None
    """Name of a benchmark's results, RUN/evaluation/NAME; None: the benchmark's name."""
    max_bad_fraction: Fraction = 0.01
    """Maximum share of a benchmark's questions with an unreadable image. They count as wrong; above this share the evaluation
    fails."""
    checkpoint: Path | None = None
    """Checkpoint to load, a checkpoints/step-... folder; None: the newest of the run."""
    max_samples: Count | None = None
    """Number of samples (of a benchmark: questions) to ask; None: all."""
    batch_questions: Count = 64
    """Number of questions answered together on each replica."""
    max_new_tokens: Count | None = None
    """Maximum length of an answer, in tokens; None: 32, and each benchmark's own number."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the ranks that are started."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.benchmark is None):
            raise ValueError("give either --data, a shard dataset, or --benchmark with --questions and --images")
        if self.benchmark is not None:
            from himix_megatron.evaluation.runner import BENCHMARKS

            check_known("--benchmark", self.benchmark, BENCHMARKS)
        if self.benchmark and self.questions is None:
            raise ValueError(f"--questions must be given: the question file of {self.benchmark} (docs/evaluation.md)")
        if self.data is not None and (self.questions or self.images or self.annotations or self.name):
            raise ValueError("--questions, --images, --annotations and --name belong to --benchmark, not to --data")
        if not RESULTS_NAME.allows(self.results):
            raise ValueError(f"{self.results!r} is no name of results (--name, or --data's folder): wanted {RESULTS_NAME}")

    @property
    def results(self) -> str:
        """The name of the results, RUN/evaluation/NAME."""
        given = self.benchmark if self.name is None else self.name
        return os.path.basename(os.path.abspath(self.data)) if self.data is not None else given or ""


def load_config(run: Path, layout: ParallelConfig) -> Config:
    """A run's own settings, at another layout, with nothing to train. Raises: ValueError if it is no run folder."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} is no run folder: it has no config.json")
    config = read_config(path)
    # What trains must be named; the Answerer freezes everything, and a frozen tower is encoded once per image. How training ran
    # its kernels changes no answer, and may not be possible here.
    train = dataclasses.replace(config.train, trainable_parts=("vision_kv",), cuda_graphs="off")
    spec: Literal["auto", "torch"] = "torch" if config.model.layer_spec == "torch" else "auto"
    model = dataclasses.replace(config.model, attention_core="auto", layer_spec=spec)
    return dataclasses.replace(config, parallel=layout, model=model, train=train)


def trained(run: Path, checkpoint: Path | None, layout: ParallelConfig) -> tuple[Config, Path, int]:
    """Settings, checkpoint (None: the newest) and its step. Raises: ValueError if the run has none, or it is of another
    architecture."""
    config = load_config(run, layout)
    found = find_checkpoint(str(checkpoint or run))
    return config, found, check_architecture(found, config).position.step


def check_writable(run: Path) -> None:
    """Before hours of asking. Raises: ValueError if the results could not be written into the run folder."""
    for name in ("evaluation", "tensorboard"):
        if not os.access(folder_below(run, name), os.W_OK):
            raise ValueError(f"{run / name} cannot be written, and results go there: evaluate a copy of the run folder")


def start(config: Config, checkpoint: Path) -> Answerer:
    """The ranks, and a checkpoint's model on them."""
    with bulk_import():
        from himix_megatron.distributed.fused_kernels import detect
        from himix_megatron.distributed.topology import init_distributed
        from himix_megatron.inference.generator import Answerer

    topology = init_distributed(config.parallel, seed=config.train.seed)
    log.start(None, topology.rank, topology.world_size)
    answerer = Answerer(config, detect(), topology)
    answerer.load(checkpoint)
    return answerer


def evaluate(arguments: Arguments) -> dict[str, Any]:
    """Both accuracies, on every rank; rank 0 writes them down. Raises: ValueError for a user's mistake."""
    with bulk_import():
        from himix_megatron.distributed.topology import shutdown_distributed
        from himix_megatron.evaluation import exact_match, runner

    assert arguments.data is not None
    dataset = ShardDataset(arguments.data)
    config, checkpoint, step = trained(arguments.run, arguments.checkpoint, arguments.parallel)
    items = exact_match.questions(dataset, arguments.max_samples)
    tokenizer, limit = load_tokenizer(config.data.tokenizer), arguments.max_new_tokens or MAX_NEW_TOKENS
    overlong = sum(len(tokenizer.encode([Piece(q.expected)]).ids) > limit for q in items)
    answerer = start(config, checkpoint)
    topology = answerer.topology
    if overlong:
        logger.warning("%d expected answers are longer than %d tokens and cannot be given: --max-new-tokens", overlong, limit)
    started = time.perf_counter()
    given = {}
    for name, source in (("own", {}), ("shuffled", exact_match.partners(dataset, config.train.seed))):
        logger.info("asking with %s images", name)
        answers = exact_match.ask(
            config, answerer, dataset, items, source, batch_questions=arguments.batch_questions, max_new_tokens=limit
        )
        given[name] = exact_match.everyone(answers, items, topology)
    shutdown_distributed()
    accuracies = {
        figure: sum(a == q.expected for a, q in zip(given[name], items, strict=True)) / len(items)
        for figure, name in (("answer_accuracy", "own"), ("answer_accuracy_shuffled_images", "shuffled"))
    }
    result = {
        "checkpoint": checkpoint.name,
        "questions": len(items),
        **accuracies,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if topology.rank == 0:
        print(json.dumps(result, indent=2), flush=True)  # first: a disk may be full
        folder, lines = folder_below(arguments.run, "evaluation"), []
        for question, own, shuffled in zip(items, given["own"], given["shuffled"], strict=True):
            line = {"key": dataset.key(question.sample), "question": question.asked, "expected": question.expected}
            lines.append(json.dumps(line | {"answer": own, "answer_shuffled_images": shuffled}) + "\n")
        publish(folder / f"{arguments.results}.json", (json.dumps(result, indent=2) + "\n").encode())
        publish(folder / f"{arguments.results}.answers.jsonl", "".join(lines).encode())
        runner.to_tensorboard(arguments.run, arguments.results, step, accuracies)
    return result


def evaluate_benchmark(arguments: Arguments) -> dict[str, Any]:
    """A benchmark's scores; rank 0 writes them down and returns them. Raises: ValueError for a user's mistake."""
    with bulk_import():
        from himix_megatron.distributed.topology import shutdown_distributed
        from himix_megatron.evaluation import runner

    kind, source = arguments.benchmark, arguments.questions
    assert kind is not None
    assert source is not None
    config, checkpoint, step = trained(arguments.run, arguments.checkpoint, arguments.parallel)
    job = runner.Job(
        name=arguments.results,
        benchmark=runner.BENCHMARKS[kind],
        questions=runner.read_questions(kind, source, arguments.annotations, arguments.max_samples),
        images=runner.image_folder(kind, source, arguments.images),
        max_new_tokens=arguments.max_new_tokens or runner.BENCHMARKS[kind].max_new_tokens,
        batch_questions=arguments.batch_questions,
        max_bad_fraction=arguments.max_bad_fraction,
    )
    runner.check_images(job)
    answerer = start(config, checkpoint)
    known, bad = runner.collect(job, arguments.run, config, checkpoint, answerer)
    shutdown_distributed()
    if answerer.topology.rank:
        return {}
    return runner.conclude(job, arguments.run, step, known, bad)


def main() -> None:
    """The command line."""
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m pipelines.evaluate")

    layout = arguments.parallel
    if arguments.data is not None:
        # A mistake is reported here, once, and not by each of the ranks that are started next.
        ShardDataset(arguments.data)
    trained(arguments.run, arguments.checkpoint, layout)
    check_writable(arguments.run)
    ensure_ranks(layout.tensor * layout.pipeline, "pipelines.evaluate", sys.argv[1:])
    if arguments.benchmark is None:
        evaluate(arguments)
    else:
        evaluate_benchmark(arguments)


if __name__ == "__main__":
    run_main(main)
