"""Whether whole runs, started as a user starts them, do on this device what they do elsewhere.

Every run is a process of its own, and all checks here run beside the others: small runs wait for the host most of the time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from himix_megatron.config import Config, ModelConfig, VisionConfig, differences, from_json
from pipelines.recipes import RECIPES
from tools.gpu_check.processes import apart, attempt, complain, losses, pretrain, python, room, together, widest
from tools.gpu_check.runner import Check, Context
from tools.measure import Line

FP32_LOSS = 1e-4
"""Losses of 20 steps in fp32: sums in another order move them by 2e-7 (micro-batches of 2, 4 and 8 samples on a CPU), and a
wrong mask, position or gradient by 1e-2."""
BF16_LOSS = 2e-2
"""The same in bf16, whose roundings differ from the first product on: they moved losses by 8e-4 on a CPU."""
REPEATED_LOSS = 1e-2
"""A step that was done again in bf16: kernels of a GPU add up in any order. On a CPU it is the same to the bit."""
GRAPHS_LOSS = 1e-2
"""The same kernels on padded tensors, in bf16."""
AHEAD_LOSS = 1e-5
"""10 steps in fp32 with the same features; others, half written say, move the loss by 1e-2."""
SAME_ANSWERS = 0.95
"""In fp32. A near tie between two tokens may change an answer; a wrong key or position changes most of them. In bf16 roundings
decide more ties, how many depends on what the run has learned: no limit."""
ACCURACY = 0.95
"""Of the quickstart's answers: a run in fp32 on a CPU gives 0.99."""
PACKS = ("--data.pack-text-tokens", "512", "--data.pack-images", "8", "--train.global-batch-packs", "2")
ROWS = ("--train.global-batch-samples", "8", "--train.micro-batch-samples", "4")


# ---- data ----------------------------------------------------------------------------------------------------------


def mixed_data(context: Context, folder: Path) -> Path:
    """A shard dataset of 64 samples with one image, two or none."""
    script = "import pathlib, sys, tests.datasets as made; made.make_mixed_dataset(pathlib.Path(sys.argv[1]), 64)"
    python(context, "-c", script, folder, on_cpu=True)
    return folder / "shards"


def scenes(context: Context, folder: Path, train: int, held_out: int) -> Path:
    """A folder of rendered scenes: shard datasets `align`, `instruct` and `heldout`. Needs no Ray."""
    script = (
        "import pathlib, sys; from pipelines.scenes import SceneSettings, ensure_scene_data; "
        "ensure_scene_data(pathlib.Path(sys.argv[1]), SceneSettings(num_train=int(sys.argv[2]), num_heldout=int(sys.argv[3])))"
    )
    python(context, "-c", script, folder, str(train), str(held_out), on_cpu=True)
    return folder


# ---- the same training everywhere ------------------------------------------------------------------------------------


SHAPES = {"packs": PACKS, "rows": ROWS}


def started(context: Context, folder: Path) -> Path:
    """A run of one step, at the warm-up's rate of 0: fresh weights as a checkpoint, so that every run has the same; its data
    beside it."""
    data = mixed_data(context, folder / "data")
    flags = ("--data.path", data, "--train.steps", "1", "--run.dir", folder / "start")
    pretrain(context, "tiny_instruct", *flags, *ROWS, on_cpu=True)
    return folder / "start"


def trained(
    context: Context, start: Path, name: str, spec: str, precision: str, steps: int, *flags: str, on_cpu: bool = False
) -> Path:
    """A run from these weights."""
    where = ("--data.path", start.parent / "data" / "shards", "--checkpoint.initial", start, "--run.dir", start.parent / name)
    what = ("--model.attention", spec, "--train.precision", precision, "--train.steps", str(steps))
    pretrain(context, "tiny_instruct", *where, *what, *flags, on_cpu=on_cpu)
    return start.parent / name


def training(context: Context) -> Iterator[Line]:
    """20 steps from the same weights on the CPU and under both specs, packs and rows, fp32 and bf16."""
    steps = 6 if context.tiny else 20
    train = partial(trained, context, started(context, room("training")))
    wanted = {}
    for shape, flags in SHAPES.items():
        wanted[shape, "cpu", "fp32"] = partial(train, f"{shape}-cpu", "torch", "fp32", steps, *flags, on_cpu=True)
        for spec in dict.fromkeys(reversed(specs(context))):
            for precision in ("fp32", "bf16"):
                name = f"{shape}-{spec}-{precision}"
                wanted[shape, spec, precision] = partial(train, name, spec, precision, steps, *flags)
    runs, errors = attempt(context, wanted)
    if first := runs.get(("packs", "cpu", "fp32")):
        fall = losses(first)[1][-1] - losses(first)[steps][-1]
        yield Line(f"fall of the loss over {steps} steps on the CPU: less would say little", fall, 0.1)
    for shape, spec, precision in runs:
        against = [("cpu", "fp32")] if precision == "fp32" else [("cpu", "fp32"), ("torch", "bf16")]
        for other in against:
            if (shape, *other) in runs and spec not in ("cpu", other[0]):
                what = f"{shape}: largest relative difference of {steps} losses, {spec} {precision} and {' '.join(other)}"
                difference = apart(runs[shape, spec, precision], runs[shape, *other])
                yield Line(what, difference, FP32_LOSS if precision == "fp32" else BF16_LOSS, at_most=True)
    complain(errors)


def cuda_graphs(context: Context) -> Iterator[Line]:
    """20 steps of packs in bf16, each micro-batch as a recorded CUDA graph, and without."""
    if context.tiny:
        return
    train = partial(trained, context, started(context, room("cuda-graphs")))
    wanted = {
        (spec, switch): partial(train, f"{spec}-{switch}", spec, "bf16", 20, *PACKS, "--train.cuda-graphs", switch)
        for spec in specs(context)
        for switch in ("on", "off")
    }
    runs, errors = attempt(context, wanted)
    for spec in specs(context):
        if (spec, "on") in runs and (spec, "off") in runs:
            difference = apart(runs[spec, "on"], runs[spec, "off"])
            yield Line(
                f"{spec}: largest relative difference of 20 losses, graphs on and off", difference, GRAPHS_LOSS, at_most=True
            )
    complain(errors)


def encode_ahead(context: Context) -> Iterator[Line]:
    """10 steps with the next step's images encoded beside training, and with each step's encoded in its turn."""
    folder = room("encode-ahead")
    data = mixed_data(context, folder / "data")

    def train(name: str, flag: str) -> Path:
        flags = ("--data.path", data, "--train.steps", "10", "--model.attention", "torch", flag, "--run.dir", folder / name)
        pretrain(context, "tiny_instruct", *flags, *ROWS)
        return folder / name

    ahead, inline = together(
        context, partial(train, "ahead", "--vision.encode-ahead"), partial(train, "inline", "--vision.no-encode-ahead")
    )
    what = "largest relative difference of 10 losses, images encoded ahead and in turn"
    yield Line(what, apart(ahead, inline), 0 if context.tiny else AHEAD_LOSS, at_most=True)


# ---- from Hugging Face's weights to an evaluated run -----------------------------------------------------------------

INTERVAL, KILLED_IN, STEPS, MORE = 5, 18, 24, 5


def hugging_face(folder: Path) -> tuple[Path, Path]:
    """Folders of a small Qwen2 and a small SigLIP."""
    from tests.interop.models import make_language, make_tower

    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    language = make_language(folder / "qwen2", model_type="qwen2", vocab_size=260, **sizes)
    return language, make_tower(folder / "siglip", width=64)


def flags_of(converted: Config) -> list[str]:
    """What tells the tiny recipe to train a model and tower of these sizes."""
    recipe = RECIPES["tiny_instruct"]()
    flags: list[str] = []
    for section in ("model", "vision"):
        own: ModelConfig | VisionConfig = getattr(converted, section)
        for name, _, value in differences(getattr(recipe, section), own, f"{section}."):
            if name in ("model.attention", "model.text_only"):
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                flags.append(flag if value else re.sub(r"\.(?=[^.]*$)", ".no-", flag))
            else:
                flags += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def copied(run: Path, name: str) -> Path:
    """A run folder under another name, so that two processes can continue it."""
    other = run.with_name(name)
    shutil.copytree(run, other)
    return other


def specs(context: Context) -> tuple[str, str]:
    """The one that a run starts under, and the other."""
    return ("torch", "torch") if context.tiny else ("te", "torch")


def chain(context: Context) -> Iterator[Line]:
    """Convert, train with asynchronous saves, be killed, resume, evaluate under both specs, go on under the other one."""
    folder = room("chain")
    own, other = specs(context)
    start, data = folder / "start", folder / "scenes"
    language, tower = hugging_face(folder)
    convert = ("-m", "tools.convert", "hf-to-himix", "--language", language, "--vision", tower, "--out", start)
    together(context, partial(python, context, *convert), partial(scenes, context, data, 160, 24))
    sizes = flags_of(from_json((start / "config.json").read_text()))

    def train(run: Path, spec: str, steps: int, *extra: str | Path, wanted: int = 0) -> Path:
        flags = ("--data.path", data / "instruct", "--model.attention", spec, "--train.precision", "bf16", "--run.dir", run)
        save = ("--checkpoint.interval-steps", str(INTERVAL), "--checkpoint.initial", start, "--optimizer.schedule", "constant")
        words = (*sizes, *flags, *ROWS, *save, "--train.steps", str(steps), *extra)
        pretrain(context, "tiny_instruct", *words, wanted=wanted)
        return run

    plan = folder / "faults.jsonl"
    plan.write_text(json.dumps({"kind": "kill", "point": "step/backward", "step": KILLED_IN}) + "\n")
    run = folder / "run"
    train(run, own, STEPS, "--run.faults", plan, wanted=-9)
    train(run, own, STEPS, "--run.faults", plan)
    yield from resumed(context, run)
    asked = [(own, "fp32")] if context.tiny else [(spec, precision) for spec in (own, other) for precision in ("fp32", "bf16")]
    there, back = STEPS + MORE, STEPS + 2 * MORE
    calls: dict[Any, Callable[[], Any]] = {
        "stayed": partial(train, copied(run, "stayed"), own, there),
        "went": partial(train, copied(run, "went"), other, there),
        **{case: partial(answers, context, copied(run, f"asked-{'-'.join(case)}"), data / "heldout", *case) for case in asked},
    }
    found, errors = attempt(context, calls)
    yield from evaluated(context, found)
    if "went" in found and not context.tiny:  # without a GPU both are the same spec
        calls = {
            "kept": partial(train, copied(run.with_name("went"), "kept"), other, back),
            "back": partial(train, copied(run.with_name("went"), "back"), own, back),
        }
        more, more_errors = attempt(context, calls)
        found, errors = found | more, errors + more_errors
    what, limit = f"largest relative difference of {MORE} losses after a checkpoint of", 0 if context.tiny else BF16_LOSS
    for one, two, source, target, first in (("stayed", "went", own, other, STEPS), ("kept", "back", other, own, there)):
        if one in found and two in found:
            difference = apart(found[one], found[two], range(first + 1, first + MORE + 1))
            yield Line(f"{what} {source}: {source} and {target}", difference, limit, at_most=True)
    complain(errors)


def resumed(context: Context, run: Path) -> Iterator[Line]:
    """What the ledger of a run says that was killed once."""
    done = losses(run)
    again = {step: twice for step, twice in done.items() if len(twice) > 1}
    yield Line("steps that the run did, of those it should", len(done.keys() & set(range(1, STEPS + 1))) / STEPS, 1)
    yield Line("steps done again after kill -9 between two saves", len(again), 1)
    if again:
        what = "largest relative difference of a repeated step's losses"
        yield Line(what, widest(again.values()), 0 if context.tiny else REPEATED_LOSS, at_most=True)


def answers(context: Context, run: Path, data: Path, spec: str, precision: str) -> list[str]:
    """All answers of a run, which is a copy, under a spec and in a precision that need not be its own."""
    config = json.loads((run / "config.json").read_text())
    config["model"]["attention"], config["train"]["precision"] = spec, precision
    (run / "config.json").write_text(json.dumps(config))
    python(context, "-m", "pipelines.evaluate", run, "--data", data)
    lines = (run / "evaluation" / f"{data.name}.answers.jsonl").read_text().splitlines()
    return [answer for line in map(json.loads, lines) for answer in (line["answer"], line["answer_shuffled_images"])]


def evaluated(context: Context, found: Mapping[Any, Any]) -> Iterator[Line]:
    """Answers by spec and precision, as far as there are any: in fp32 the same ones."""
    own, other = specs(context)
    for precision, least in (("fp32", SAME_ANSWERS), ("bf16", None)):
        one, two = found.get((own, precision)), found.get((other, precision))
        if one and own == other:
            yield Line(f"{precision}: answers to 24 questions, with their own images and others", len(one), 48)
        elif one and two:
            same = sum(mine == theirs for mine, theirs in zip(one, two, strict=True)) / len(one)
            yield Line(f"{precision}: share of {len(one)} answers that {own} and {other} give alike", same, least)


# ---- the quickstart --------------------------------------------------------------------------------------------------


def quickstart(context: Context) -> Iterator[Line]:
    """The whole job on a small world, in bf16 on a GPU; a few steps of it without one."""
    folder = room("quickstart")
    words = ("--out", folder, "--tensor", "1", "--engine", "local")
    if context.tiny:
        words = (*words, "--align-steps", "2", "--instruct-steps", "2")
    else:
        words = (*words, "--train.precision", "bf16", "--model.attention", "te")
    python(context, "-m", "pipelines.quickstart", *words)
    summary = json.loads((folder / "summary.json").read_text())
    yield Line("answers exactly right", summary["answer_accuracy"], None if context.tiny else ACCURACY)
    yield Line("the same with other samples' images", summary["answer_accuracy_shuffled_images"])


CHECKS: tuple[Check, ...] = (
    Check("chain", "correctness", 120, chain, beside=True),
    Check("training", "correctness", 60, training, beside=True),
    Check("quickstart", "correctness", 130, quickstart, beside=True),
    Check("encode-ahead", "correctness", 40, encode_ahead, beside=True),
    Check("cuda-graphs", "correctness", 60, cuda_graphs, beside=True),
)
