"""Whether whole runs, started as a user starts them, do on this device what they do elsewhere.

The checks here run beside the others: small runs wait for the host most of the time.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from tools.bench.measure import Line
from tools.gpu_check.processes import Command, apart, complain, in_turn, losses, pretrain, python, scratch_folder, widest
from tools.gpu_check.runner import Check, Context

FP32_LOSS = 1e-4
"""Losses of 20 steps in fp32: sums in another order move them by 2e-7 (micro-batches of 2, 4 and 8 samples on a CPU), and a
wrong mask, position or gradient by 1e-2. Features that are encoded ahead, or graphs, change nothing that is larger."""
BF16_LOSS = 2e-2
"""The same in bf16, whose roundings differ from the first product on: they moved losses by 8e-4 on a CPU."""
REPEATED_LOSS = 1e-2
"""A step that was done again in bf16: kernels of a GPU add up in any order. On a CPU it is the same to the bit."""
SAME_ANSWERS = 0.95
"""In fp32. A near tie between two tokens may change an answer; a wrong key or position changes most of them. In bf16 roundings
decide more ties, how many depends on what the run has learned: no limit."""
ACCURACY = 0.95
"""Least share of right answers of the quickstart; a run in fp32 on a CPU gives 0.99."""
ROWS = ("--train.global-batch-samples", "8", "--train.micro-batch-samples", "4")
SHAPES = {
    "packs": ("--data.pack-max-text-tokens", "512", "--data.pack-max-vision-tokens", "288", "--train.global-batch-packs", "2"),
    "rows": ROWS,
}
HERE = "tools.gpu_check.end_to_end"


def mixed_data(folder: str) -> None:
    """A shard dataset of 64 samples with one image, two or none: FOLDER/shards."""
    from tests.support.datasets import make_mixed_dataset

    make_mixed_dataset(Path(folder), 64)


def specs(context: Context) -> tuple[str, str]:
    """The one that a run starts under, and the other."""
    return ("torch", "torch") if context.tiny else ("te", "torch")


# ---- the same training everywhere ------------------------------------------------------------------------------------


def training(context: Context) -> Iterator[Line]:
    """20 steps from the same weights on the CPU and under both specs, packs and rows, fp32 and bf16; as graphs; inline."""
    folder, steps = scratch_folder("training"), 6 if context.tiny else 20
    data = ("--data.datasets", folder / "data" / "shards")

    def train(name: str, *flags: str) -> Command:
        where = ("--checkpoint.init-from", folder / "start", "--run.dir", folder / name)
        return pretrain("tiny_instruct", *data, *where, "--train.steps", str(steps), *flags)

    # One step at the warm-up's rate of 0: fresh weights as a checkpoint.
    start = pretrain("tiny_instruct", *data, "--train.steps", "1", "--run.dir", folder / "start", *ROWS)
    commands = [(f"{HERE}:mixed_data", folder / "data"), start]
    commands += [train(f"{shape} cpu fp32", "--model.layer-spec", "torch", *flags) for shape, flags in SHAPES.items()]
    error = in_turn(context, commands, on_cpu=True)
    what = f"fall of the loss over {steps} steps on the CPU: less would say little"
    of_cpu = losses(folder / "packs cpu fp32")
    yield Line(what, of_cpu[1][-1] - of_cpu[steps][-1] if steps in of_cpu else 0.0, 0.1)
    complain(error)
    commands, compared = [], []
    for shape, flags in SHAPES.items():
        for spec in dict.fromkeys(reversed(specs(context))):
            for precision in ("fp32", "bf16"):
                run = f"{shape} {spec} {precision}"
                commands.append(train(run, "--model.layer-spec", spec, "--train.precision", precision, *flags))
                others = [f"{shape} cpu fp32", *([f"{shape} torch bf16"] if (spec, precision) == ("te", "bf16") else [])]
                compared += [(run, other, FP32_LOSS if precision == "fp32" else BF16_LOSS) for other in others]
    inline = ("--vision.no-prefetch-features", *SHAPES["packs"])
    commands.append(train("packs torch fp32 inline", "--model.layer-spec", "torch", *inline))
    compared.append(("packs torch fp32 inline", "packs torch fp32", 0 if context.tiny else FP32_LOSS))
    if not context.tiny:
        graphs = ("--train.precision", "bf16", "--train.cuda-graphs", "on", *SHAPES["packs"])
        commands.append(train("packs te bf16 graphs", "--model.layer-spec", "te", *graphs))
        compared.append(("packs te bf16 graphs", "packs te bf16", BF16_LOSS))
    error = in_turn(context, commands)
    for run, other, limit in compared:
        difference = apart(folder / run, folder / other, range(1, steps + 1))
        yield Line(f"largest relative difference of {steps} losses: {run}, {other}", difference, limit, at_most=True)
    complain(error)


# ---- from Hugging Face's weights to an evaluated run -----------------------------------------------------------------

INTERVAL, KILLED_IN, STEPS, MORE = 5, 18, 24, 5
CONVERTED = shlex.split(
    "--model.family qwen2 --model.norm-eps 1e-06 --vision.tower siglip --vision.image-size 28 --vision.patch-size 7 "
    "--vision.hidden-size 64 --vision.num-layers 3 --vision.ffn-hidden-size 56 --vision.feature-layer -2"
)
"""What makes the tiny recipe a model and tower of `hugging_face`'s sizes."""


def hugging_face(folder: str) -> None:
    """FOLDER/qwen2 and FOLDER/siglip, small ones."""
    from tests.support.model_folders import make_language, make_tower

    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    make_language(Path(folder) / "qwen2", model_type="qwen2", vocab_size=260, **sizes)
    make_tower(Path(folder) / "siglip", width=64)


def scenes(folder: str) -> None:
    """Rendered scenes: shard datasets `align`, `instruct` and `heldout`."""
    from pipelines.scenes import SceneSettings, ensure_scene_data

    ensure_scene_data(Path(folder), SceneSettings(num_train=160, num_heldout=24))


def copied(run: str, other: str, spec: str, precision: str) -> None:
    """Copy a run's folder, to continue or evaluate it under any spec and in any precision."""
    shutil.copytree(run, other)
    file = Path(other) / "config.json"
    config = json.loads(file.read_text())
    config["model"]["layer_spec"], config["train"]["precision"] = spec, precision
    file.write_text(json.dumps(config))


def chain(context: Context) -> Iterator[Line]:
    """Convert, train with asynchronous saves, kill, resume, evaluate under both specs, continue under the other one."""
    folder = scratch_folder("chain")
    own, other = specs(context)
    run, data, plan = folder / "run", folder / "scenes", folder / "faults.jsonl"
    plan.write_text(json.dumps({"kind": "kill", "point": "step/backward", "step": KILLED_IN}) + "\n")

    def train(name: str, spec: str, steps: int) -> Command:
        where = ("--data.datasets", data / "instruct", "--checkpoint.init-from", folder / "start", "--run.dir", folder / name)
        what = ("--model.layer-spec", spec, "--train.precision", "bf16", "--train.steps", str(steps), *ROWS)
        save = ("--checkpoint.interval-steps", str(INTERVAL), "--optimizer.schedule", "constant", "--run.fault-injection", plan)
        return pretrain("tiny_instruct", *CONVERTED, *where, *what, *save)

    words = ("--language", folder / "qwen2", "--vision", folder / "siglip", "--out", folder / "start")
    made = [(f"{HERE}:hugging_face", folder), (f"{HERE}:scenes", data), ("tools.convert", "hf-to-himix", *words)]
    complain(in_turn(context, [*made, train("run", own, STEPS)], wanted=-9))

    there, back = STEPS + MORE, STEPS + 2 * MORE
    commands: list[Command] = [train("run", own, STEPS)]
    goes_on = [("run", "stayed", own, there), ("run", "went", other, there)]
    # Without a GPU both specs are the same one.
    goes_on += [] if context.tiny else [("went", "kept", other, back), ("went", "back", own, back)]
    for source, name, spec, steps in goes_on:
        commands += [(f"{HERE}:copied", folder / source, folder / name, spec, "bf16"), train(name, spec, steps)]
    for spec in dict.fromkeys((own, other)):
        for precision in ("fp32",) if context.tiny else ("fp32", "bf16"):
            copy = folder / f"asked {spec} {precision}"
            commands += [(f"{HERE}:copied", run, copy, spec, precision)]
            commands += [("pipelines.evaluate", copy, "--data", data / "heldout")]
    error = in_turn(context, commands)
    yield from resumed(context, run)
    what, limit = f"largest relative difference of {MORE} losses after a checkpoint of", 0 if context.tiny else BF16_LOSS
    for (source, one, target, steps), (_, two, second, _) in zip(goes_on[::2], goes_on[1::2], strict=True):
        difference = apart(folder / one, folder / two, range(steps - MORE + 1, steps + 1))
        under = other if source == "went" else own
        yield Line(f"{what} {under}: {target} and {second}", difference, limit, at_most=True)
    yield from evaluated(context, folder)
    complain(error)


def resumed(context: Context, run: Path) -> Iterator[Line]:
    """What the ledger of a run says that was killed once."""
    done = losses(run)
    again = {step: twice for step, twice in done.items() if len(twice) > 1}
    yield Line("steps that the run did, of those it should", len(done.keys() & set(range(1, STEPS + 1))) / STEPS, 1)
    yield Line("steps done again after kill -9 between two saves", len(again), 1)
    if again:
        what = "largest relative difference of a repeated step's losses"
        yield Line(what, widest(again.values()), 0 if context.tiny else REPEATED_LOSS, at_most=True)


def evaluated(context: Context, folder: Path) -> Iterator[Line]:
    """Answers under both specs: in fp32 the same ones."""
    own, other = specs(context)
    for precision, least in (("fp32", SAME_ANSWERS), ("bf16", None))[: 1 if context.tiny else 2]:
        one, two = (answers(folder / f"asked {spec} {precision}") for spec in (own, other))
        yield Line(f"{precision}: answers of {own} to 24 questions, with their own images and others", len(one), 48)
        same = sum(mine == theirs for mine, theirs in zip(one, two, strict=False)) / 48
        yield Line(f"{precision}: share of 48 answers that {own} and {other} give alike", same, least)


def answers(run: Path) -> list[str]:
    """All that an evaluated run gave."""
    file = run / "evaluation" / "heldout.answers.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else ()
    return [answer for line in map(json.loads, lines) for answer in (line["answer"], line["answer_shuffled_images"])]


# ---- the quickstart --------------------------------------------------------------------------------------------------


def quickstart(context: Context) -> Iterator[Line]:
    """The whole job on a small world, in bf16 on a GPU; a few steps of it without one."""
    folder = scratch_folder("quickstart")
    of_gpu = ("--train.precision", "bf16", "--model.layer-spec", "te")
    words = ("--align-steps", "2", "--instruct-steps", "2") if context.tiny else of_gpu
    python(context, "-m", "pipelines.quickstart", "--out", folder, "--tensor", "1", "--engine", "local", *words)
    summary = json.loads((folder / "summary.json").read_text())
    yield Line("answers exactly right", summary["answer_accuracy"], None if context.tiny else ACCURACY)
    yield Line("the same with other samples' images", summary["answer_accuracy_shuffled_images"])


CHECKS: tuple[Check, ...] = (
    Check("quickstart", "correctness", 120, quickstart, beside=True),
    Check("training", "correctness", 80, training, beside=True),
    Check("chain", "correctness", 90, chain, beside=True),
)
