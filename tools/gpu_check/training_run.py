"""Real training on one GPU, from photographs on the local disk: does data keep it waiting, what does it reach, what does it
hold; and what a save costs.

Qwen2-0.5B with SigLIP-so400m/384, random weights, packs of 8,192 text tokens; texts of some 314 bytes are as many tokens of
the byte-level tokenizer.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import time
from collections.abc import Iterator
from itertools import islice

from himix_megatron.config import Config
from himix_megatron.costs.memory import GIB, MicroBatch, rank_memory
from himix_megatron.training.data_setup import make_plan, training_length
from pipelines.cli import parse
from tools.bench import checkpoint
from tools.bench.measure import Line
from tools.bench.photos import write_source
from tools.gpu_check.processes import python, scratch_folder
from tools.gpu_check.runner import Check, Context

MOST_DATA_WAIT = 0.02
MOST_MEMORY_ERROR = 0.10
WORDS = (24, 86)
"""Range of words of an answer; with question and template some 314 bytes."""
COMMON = (
    "--vision.path None --checkpoint.init-from None --data.tokenizer bytes --data.template tiny --train.global-batch-packs 2 "
    "--train.steps 100000 --log.interval-steps 5"
)
LARGE = "--data.pack-max-text-tokens 8192 --data.pack-max-vision-tokens 23328 --data.num-workers 8"
TINY = (
    "--data.pack-max-text-tokens 2048 --data.pack-max-vision-tokens 288 --data.max-text-tokens 1024 --data.num-workers 1 "
    "--model.num-layers 2 --model.hidden-size 64 --model.ffn-hidden-size 96 --model.num-attention-heads 4 "
    "--model.vocab-size 260 --vision.tower tiny --vision.image-size 48 --vision.patch-size 8 --vision.hidden-size 32 "
    "--vision.num-layers 2 --vision.num-attention-heads 2 --vision.ffn-hidden-size 64 --log.peak-tflops 1"
)
_LINE = re.compile(
    r"step (?P<step>\d+)/\d+ .* (?P<seconds>[\d.]+) s/step  data wait (?P<data_wait>[\d.]+) s  text (?P<text_tokens>\d+) tok/s"
    r".* MFU (?P<mfu>[\d.]+) %  peak (?P<peak_gib>[\d.]+) GiB"
)


def train(context: Context) -> Iterator[Line]:
    """A run of some steps, which kills itself then: a last save would take longer than the steps."""
    num_samples, steps = (64, 15) if context.tiny else (600, 25)
    folder, begun = scratch_folder("train"), time.monotonic()
    annotations, images = write_source(folder / "source", num_samples, words=WORDS)
    flags = shlex.split("--engine local --check header --samples-per-shard 250 --tokenizer bytes --template tiny")
    where = ("--annotations", annotations, "--images", images, "--out", folder / "shards")
    python(context, "-m", "pipelines.preprocess", *where, *flags)
    yield Line(f"seconds to make shards of {num_samples} photographs, without Ray", time.monotonic() - begun)
    plan = folder / "faults.jsonl"
    plan.write_text(json.dumps({"kind": "kill", "point": "step/begin", "step": steps + 1}) + "\n")
    words = ["qwen2_0_5b_instruct", *shlex.split(COMMON), *shlex.split(TINY if context.tiny else LARGE)]
    words += ["--data.datasets", str(folder / "shards"), "--run.dir", str(folder / "run"), "--run.fault-injection", str(plan)]
    begun = time.monotonic()
    said = python(context, "-m", "pipelines.pretrain", *words, wanted=-9)
    yield Line(f"seconds of a run of {steps} steps, start included", time.monotonic() - begun)
    yield from lines_of(parse(words), logged(said), context)


def logged(said: str) -> dict[str, float]:
    """Means of what a run logged, without the first ten steps, which compile and fill memory; the peak is the whole run's."""
    lines = [{name: float(value) for name, value in found.groupdict().items()} for found in _LINE.finditer(said)]
    means = {name: statistics.fmean(line[name] for line in lines if line["step"] > 10) for name in lines[0]}
    return means | {"peak_gib": max(line["peak_gib"] for line in lines)}


def lines_of(config: Config, run: dict[str, float], context: Context) -> Iterator[Line]:
    """What a run logged, beside what was wanted and predicted."""
    judged = not context.tiny
    yield Line("seconds of a step, images encoded ahead", run["seconds"])
    what = f"data wait, share of a step, {config.data.num_workers} workers"
    yield Line(what, run["data_wait"] / run["seconds"], MOST_DATA_WAIT if judged else None, at_most=True)
    yield Line("text tokens a second", run["text_tokens"])
    yield Line("MFU of the whole step, tower included", run["mfu"] / 100)
    peak, predicted = run["peak_gib"], predicted_gib(config)
    what = f"peak memory, {peak:.2f} GiB, off memory.py's {predicted:.2f} (without its allowance) by"
    yield Line(what, abs(peak / predicted - 1), MOST_MEMORY_ERROR if judged else None, at_most=True)


def predicted_gib(config: Config) -> float:
    """The prediction for the plan's first steps: the widest pack, the most vision tokens of a pack and of a step."""
    plan = make_plan(config, config.data)
    steps = islice(plan.steps(training_length(config, plan)), 20)
    tokens = [[int(plan.vision_tokens(pack).sum()) for pack in step.packs] for step in steps]
    largest = MicroBatch(
        text_tokens=float(config.data.pack_max_text_tokens or 0),
        vision_tokens=max(max(step) for step in tokens),
    )
    of_step = max(sum(step) for step in tokens)
    return rank_memory(config, 0, data_size=1, micro_batch=largest, vision_tokens_per_step=of_step, on_gpu=False).total / GIB


def save_stall(context: Context) -> Iterator[Line]:
    """How long a save keeps training waiting: beside training over waited for, the first save of a process apart."""
    arguments = checkpoint.Arguments(layers=1 if context.tiny else 24, repetitions=1, tiny=context.tiny)
    taken, num_bytes = checkpoint.measure_in(arguments, divided=False)
    yield from checkpoint.lines_of("undivided", taken, num_bytes, judged=not context.tiny)
    for what in (checkpoint.FIRST, checkpoint.ASYNC, checkpoint.SYNC, checkpoint.WRITTEN):
        yield Line(f"seconds, {what}", statistics.median(taken[what]))


CHECKS: tuple[Check, ...] = (Check("train", "performance", 60, train), Check("save", "performance", 25, save_stall))
