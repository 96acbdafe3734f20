"""Ask a run about an image, and read the answer as it is written.

    python -m pipelines.generate runs/quickstart/instruct --image scene.jpg --question "What colour is the circle?"

Without --question, questions are read from standard input, one a line, each asked with all that was said before it; the end of
the input ends the conversation. The images belong to the first question. Starts its own ranks.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from himix_megatron.config import Config, ParallelConfig
from himix_megatron.data.errors import BadSampleError
from himix_megatron.data.images import image_file
from himix_megatron.data.images.decode import decode
from himix_megatron.data.ingest.sources.base import MAX_SAMPLE_BYTES
from himix_megatron.data.text import chat_template
from himix_megatron.data.text.tokenizer import Tokenizer, load_tokenizer
from himix_megatron.distributed.launch import ensure_ranks
from himix_megatron.inference.text_stream import TextStream, check_stops
from himix_megatron.runtime.limits import Limit
from himix_megatron.runtime.process import bulk_import
from himix_megatron.runtime.untrusted_files import read_regular
from pipelines.cli import parse_settings, run_main
from pipelines.evaluate import start, trained
from pipelines.flags import Word

if TYPE_CHECKING:
    from himix_megatron.distributed.topology import Topology
    from himix_megatron.inference.sampling import Sampling

A_DAY_SECONDS = 86400.0
"""How long the other ranks wait for the next question."""
NewTokens = Annotated[int, Limit(1, 1 << 16)]
"""Tokens of an answer: the cache has room for as many from the start."""


@dataclass(frozen=True)
class Arguments:
    """Answer questions about images with a run's model."""

    run: Annotated[Path, Word("RUN")]
    """Run folder."""
    question: str | None = None
    """Question to ask; None: questions are read from standard input, one per line."""
    image: tuple[Path, ...] = ()
    """Image files of the first question, in order."""
    checkpoint: Path | None = None
    """Checkpoint to load, a checkpoints/step-... folder; None: the newest of the run."""
    max_new_tokens: NewTokens = 256
    """Maximum length of an answer, in tokens."""
    temperature: float = 0.0
    """Temperature of sampling; 0: always the most likely token."""
    top_p: float = 1.0
    """Probability that the tokens drawn from reach together, the most likely first (nucleus sampling)."""
    seed: int = 0
    """Seed of sampling."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are left out of it."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the ranks that are started."""


@dataclass(frozen=True)
class Job:
    """The arguments, read and checked."""

    config: Config
    checkpoint: Path
    tokenizer: Tokenizer
    sampling: Sampling
    images: tuple[image_file.Pixels, ...]


def prepare(arguments: Arguments) -> Job:
    """Find what is wrong before any rank starts. Raises: ValueError."""
    with bulk_import():
        from himix_megatron.inference.sampling import Sampling

    check_stops(arguments.stop)
    layout = arguments.parallel
    if arguments.question is None:
        layout = dataclasses.replace(layout, timeout_seconds=max(layout.timeout_seconds, A_DAY_SECONDS))
    config, checkpoint, _ = trained(arguments.run, arguments.checkpoint, layout)
    tokenizer = load_tokenizer(config.data.tokenizer)
    chat_template.check_tokenizer(tokenizer, config.data.template)
    return Job(
        config=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        sampling=Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed),
        images=tuple(read_image(path, config) for path in arguments.image),
    )


def read_image(path: Path, config: Config) -> image_file.Pixels:
    """The tower's pixels of an image file. Raises: ValueError naming the file, if it is no image, a damaged or a large one."""
    try:
        return decode(read_regular(path, MAX_SAMPLE_BYTES), config.vision)
    except BadSampleError as error:
        raise ValueError(f"--image {path}: {error}") from None


def questions(asked: str | None, topology: Topology) -> Iterator[str]:
    """The one question, or rank 0's lines of standard input, on every rank."""
    if asked is not None:
        yield asked
        return
    import torch

    while True:
        line: list[Any] = [None]
        if topology.rank == 0:
            if sys.stdin.isatty():
                print("> ", end="", flush=True)
            line[0] = sys.stdin.readline()
        torch.distributed.broadcast_object_list(line, src=0, device=topology.device)
        if not line[0]:
            return
        if line[0].strip():
            yield line[0].strip()


def generate(arguments: Arguments, job: Job) -> list[str]:
    """Answer, writing to standard output on rank 0. Returns: the answers, on every rank."""
    from himix_megatron.distributed.topology import shutdown_distributed
    from himix_megatron.inference.generator import Prompt

    template = job.config.data.template
    answerer = start(job.config, job.checkpoint)
    topology = answerer.topology
    stops = chat_template.end_of_turn(job.tokenizer, template)
    write = partial(print, end="", flush=True) if topology.rank == 0 else None
    turns: list[dict[str, str]] = []
    answers = []
    for question in questions(arguments.question, topology):
        turns.append({"from": "human", "value": question})
        # A template of captions has no place for questions, so none for what was said before either.
        said = turns if chat_template.TEMPLATES[template].has_questions else turns[-1:]
        said = chat_template.with_marks(said, len(job.images))
        text = chat_template.prompt({"conversations": said}, job.tokenizer, template, len(said) // 2)
        prompt = Prompt(text.ids, job.images, text.image_places)
        stream = TextStream(job.tokenizer, arguments.stop, write)

        def watch(_: int, so_far: list[int], stream: TextStream = stream) -> bool:
            return stream.push(so_far)

        answerer.answer([prompt], stops, arguments.max_new_tokens, sampling=job.sampling, watch=watch)
        answers.append(stream.finish())
        if topology.rank == 0:
            print(flush=True)
        turns.append({"from": "gpt", "value": answers[-1]})
    shutdown_distributed()
    return answers


def main() -> None:
    """The command line."""
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m pipelines.generate")
    if arguments.question is None and sys.stdin is None:
        raise ValueError("standard input is closed: give --question, or questions on standard input")
    job = prepare(arguments)
    layout = arguments.parallel
    ensure_ranks(layout.tensor * layout.pipeline, "pipelines.generate", sys.argv[1:])
    generate(arguments, job)


if __name__ == "__main__":
    run_main(main)
