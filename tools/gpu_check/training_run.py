"""Real training on one GPU, from photographs on the local disk: does data keep it waiting, what does it reach, what does it
hold; and what a save costs. Runs are processes of their own (`python -m pipelines.pretrain`), ended when enough is logged.

Qwen2-0.5B with SigLIP-so400m/384, random weights, packs of 8,192 text tokens; texts of some 314 bytes are as many tokens of
the byte-level tokenizer. Predicted for an H100: 0.25 to 0.35 s a step of 2 packs (52 images), 8 workers read it in 0.05.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from himix_megatron.config import Config
from himix_megatron.data.vision_reader import PixelReader
from himix_megatron.memory import GIB, MicroBatch, rank_memory
from himix_megatron.start import end_of, make_plan
from pipelines.cli import parse
from tools import bench_checkpoint
from tools.bench_photos import write_source
from tools.gpu_check.runner import Check, Context
from tools.gpu_check.tower import TOWER
from tools.measure import Line

MOST_DATA_WAIT = 0.02
MOST_MEMORY_ERROR = 0.10
RUN_LIMIT_SECONDS = 100.0
"""A run that has not come to its last wanted step by then failed."""
INLINE_SECONDS = 40.0
"""The second run is left out where less than this is left of the budget."""
WORDS = (24, 86)
"""Of an answer; with question and template some 314 bytes."""
REPOSITORY = Path(__file__).resolve().parents[2]

COMMON = (
    "--vision.path None --checkpoint.initial None --data.tokenizer bytes --data.template tiny --train.global-batch-packs 2 "
    "--train.steps 100000 --log.interval-steps 5"
)
LARGE = "--data.pack-text-tokens 8192 --data.pack-images 32 --data.num-workers 8"
TINY = (
    "--data.pack-text-tokens 2048 --data.pack-images 8 --data.max-text-tokens 1024 --data.num-workers 1 "
    "--model.num-layers 2 --model.hidden-size 64 --model.ffn-hidden-size 96 --model.num-attention-heads 4 "
    "--model.vocab-size 260 --vision.tower tiny --vision.image-size 48 --vision.patch-size 8 --vision.hidden-size 32 "
    "--vision.num-layers 2 --vision.num-attention-heads 2 --vision.ffn-hidden-size 64 --log.peak-tflops 1"
)
_LINE = re.compile(
    r"step (?P<step>\d+)/\d+ .* (?P<seconds>[\d.]+) s/step  data wait (?P<data_wait>[\d.]+) s  text (?P<text_tokens>\d+) tok/s"
    r".* MFU (?P<mfu>[\d.]+) %  peak (?P<peak_gib>[\d.]+) GiB"
)


@dataclass(frozen=True, slots=True)
class Logged:
    """The mean of a run's lines after its first steps."""

    seconds: float
    data_wait: float
    text_tokens: float
    """A second."""
    mfu: float
    """Of the whole step, the tower's included."""
    peak_gib: float
    """Of the whole run."""


def train(context: Context) -> Iterator[Line]:
    """A run as it comes, then one that encodes inline."""
    num_samples, last_step = (64, 15) if context.tiny else (2000, 35)
    with tempfile.TemporaryDirectory(prefix="himix-run-") as folder:
        begun = time.monotonic()
        data = make_shards(Path(folder), num_samples)
        yield Line(f"seconds to make shards of {num_samples} photographs, without Ray", time.monotonic() - begun)
        flags = [*shlex.split(COMMON), *shlex.split(TINY if context.tiny else LARGE), "--data.path", str(data)]
        begun = time.monotonic()
        ahead = logged_run([*flags, "--run.dir", f"{folder}/ahead"], last_step)
        yield Line(f"seconds of a run of {last_step} steps, start included", time.monotonic() - begun)
        config = parse(["qwen2_0_5b_instruct", *flags])
        yield from lines_of(config, ahead, context)
        yield from reading(config, ahead)
        if not context.tiny and context.remaining() < INLINE_SECONDS:
            return
        inline = logged_run([*flags, "--run.dir", f"{folder}/inline", "--vision.no-encode-ahead"], max(15, last_step - 10))
        yield Line("seconds of a step, images encoded inline", inline.seconds)
        yield Line("seconds of a step with images encoded ahead, over inline", ahead.seconds / inline.seconds)


def lines_of(config: Config, run: Logged, context: Context) -> Iterator[Line]:
    """What a run logged, beside what was wanted and predicted."""
    judged = not context.tiny
    wait = run.data_wait / run.seconds
    yield Line("seconds of a step, images encoded ahead", run.seconds)
    workers = config.data.num_workers
    yield Line(f"data wait, share of a step, {workers} workers", wait, MOST_DATA_WAIT if judged else None, at_most=True)
    yield Line("text tokens a second", run.text_tokens)
    yield Line("MFU of the whole step, tower included", run.mfu)
    yield Line("peak memory, GiB allocated", run.peak_gib)
    predicted = predicted_gib(config)
    yield Line("peak memory predicted, GiB (himix_megatron/memory.py, without its allowance)", predicted)
    error = abs(run.peak_gib / predicted - 1)
    yield Line("peak memory's distance from the prediction", error, MOST_MEMORY_ERROR if judged else None, at_most=True)


def predicted_gib(config: Config) -> float:
    """Of the plan's first steps: the widest pack, the most images of a pack and of a step."""
    plan = make_plan(config, config.data)
    steps = [[len(pack) for pack in step.packs] for step in islice(plan.steps(end_of(config, plan)), 20)]
    largest = MicroBatch(
        text_tokens=float(config.data.pack_text_tokens or 0),
        vision_tokens=max(max(step) for step in steps) * config.vision.tokens_per_image,
    )
    images = max(sum(step) for step in steps)
    return rank_memory(config, 0, data_size=1, micro_batch=largest, images_per_step=images, on_gpu=False).total / GIB


def reading(config: Config, run: Logged) -> Iterator[Line]:
    """How many workers the run needs: an image's reading and decoding, measured here in one thread."""
    plan = make_plan(config, config.data)
    reader = PixelReader(config.vision, config.data.decode)
    samples = [int(sample) for pack in next(plan.steps(end_of(config, plan))).packs for sample in pack]
    places = reader.blanks(len(samples))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers are
    begun = time.perf_counter()
    for place, sample in zip(places, samples, strict=True):
        reader.read_into(place, *plan.datasets.locate(sample), 0)
    each = (time.perf_counter() - begun) / len(samples)
    torch.set_num_threads(threads)
    yield Line("text tokens of a sample", float(plan.text_tokens.mean()))
    yield Line("images a second that a worker reads", 1 / each)
    yield Line("workers that the run keeps busy", len(samples) * each / run.seconds)


# ---- its parts -------------------------------------------------------------------------------------------------------


def make_shards(folder: Path, num_samples: int) -> Path:
    """Photographs in LLaVA's layout as a shard dataset, texts counted."""
    annotations, images = write_source(folder / "source", num_samples, words=WORDS)
    out = folder / "shards"
    command = [
        *(sys.executable, "-m", "pipelines.preprocess", "--engine", "local", "--check", "header", "--samples-per-shard", "250"),
        *("--annotations", str(annotations), "--images", str(images), "--out", str(out)),
        *("--tokenizer", "bytes", "--template", "tiny"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"preprocess ended with exit code {done.returncode}: {_tail(done.stdout.splitlines())}")
    return out


def logged_run(flags: list[str], last_step: int, limit_seconds: float = RUN_LIMIT_SECONDS) -> Logged:
    """Start a run, and end it when it has logged this step. Raises: RuntimeError if it ends or hangs before."""
    command = [sys.executable, "-m", "pipelines.pretrain", "qwen2_0_5b_instruct", *flags]
    # A group of its own: its workers end with it.
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    watch = threading.Timer(limit_seconds, _end, [process])
    watch.start()
    output, lines = [], []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line.rstrip())
            if found := _LINE.search(line):
                lines.append({name: float(value) for name, value in found.groupdict().items()})
                if lines[-1]["step"] >= last_step:
                    return mean_of(lines)
        raise RuntimeError(f"the run ended, or was ended after {limit_seconds:.0f} s, before step {last_step}: {_tail(output)}")
    finally:
        watch.cancel()
        _end(process)
        process.communicate()


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(output: list[str]) -> str:
    return " | ".join(output[-12:])[-3000:]


def mean_of(lines: list[dict[str, float]]) -> Logged:
    """Of the lines after the first ten steps, which compile and fill memory."""
    steady = [line for line in lines if line["step"] > 10]

    def mean(name: str) -> float:
        return statistics.fmean(line[name] for line in steady)

    return Logged(
        seconds=mean("seconds"),
        data_wait=mean("data_wait"),
        text_tokens=mean("text_tokens"),
        mfu=mean("mfu") / 100,
        peak_gib=max(line["peak_gib"] for line in lines),
    )


# ---- saves -----------------------------------------------------------------------------------------------------------


def save_stall(context: Context) -> Iterator[Line]:
    """How long a save keeps training waiting: beside training over waited for, the first save of a process apart."""
    arguments = bench_checkpoint.Arguments(layers=1 if context.tiny else 24, repetitions=1, tiny=context.tiny)
    for optimizer, divided in (("undivided", False), ("distributed", True)):
        begun = time.monotonic()
        taken, num_bytes = bench_checkpoint.measure_in(arguments, divided=divided)
        yield from bench_checkpoint.lines_of(optimizer, taken, num_bytes, judged=not context.tiny)
        for what in (bench_checkpoint.FIRST, bench_checkpoint.ASYNC, bench_checkpoint.SYNC, bench_checkpoint.WRITTEN):
            yield Line(f"seconds, {what}, {optimizer}", statistics.median(taken[what]))
        if not context.tiny and context.remaining() < time.monotonic() - begun:
            return


CHECKS: tuple[Check, ...] = (
    TOWER,
    Check("train", "performance", 60.0, train),
    Check("save", "performance", 40.0, save_stall),
)
