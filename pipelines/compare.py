"""Compare methods: train every arm (method x world x seed x size) alike, and write one report.

    python -m pipelines.compare methods
    python -m pipelines.compare rotary --methods himix himix:position=rotary,visibility=earlier tokens --worlds text --seeds 3
    python -m pipelines.compare methods --submit --sbatch="--partition=gpu --time=30"
    python -m pipelines.compare methods --report

EXPERIMENT names folders: docs/results/EXPERIMENT gets arms/NAME.json for each finished arm, to be committed, and the report
(report.md, report.json, pictures); runs/compare/EXPERIMENT has a run folder for each arm, with its TensorBoard.
Arms of one world and seed see the same samples in the same order, begin with the same weights where names and shapes agree, and
train at a constant rate after warm-up. The held-out questions are asked along the way, so that one run answers for equal steps,
equal FLOPs and equal seconds. Differences to --baseline have bootstrap intervals over seeds and questions.
A method is one of himix, saisa ... (docs/methods.md), or with fields of the section injection changed: himix:position=rotary.
Flags with a section (`--section.field value`) apply to every arm, and are checked before anything starts. With --data.datasets
and --data.validation-path these replace the rendered worlds. The same command goes on where it stopped, with arms that are
missing, inside an arm from its last checkpoint; more methods, worlds, seeds or sizes can be added. Checkpoints of a finished
arm are removed, but for the last.
Exit code 0: all arms have finished (or are submitted); 1: some have not; 85: stopped on request, saved.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from himix_megatron.config import METHODS, Config, Count, CountOrZero, InjectionConfig, ModelConfig, check_known, check_ranks
from himix_megatron.data.shards.reader import ShardDataset
from himix_megatron.runtime.log import clock
from himix_megatron.runtime.stop_signals import COMMAND_STOP_SIGNALS, EXIT_REQUEUE, StopRequest
from pipelines.cli import load_recipe, parse, parse_settings, refuse_own, run_main, split_recipe_flags
from pipelines.comparison.records import MEASURED, Arm, Measured, read, write
from pipelines.flags import Word, split_flags
from pipelines.launchers.local_ranks import run_ranks
from pipelines.scaling import Progress, check_sbatch
from pipelines.scenes import SceneSettings, ensure_scene_data, ensure_tokenizer
from pipelines.worlds.tokenizer import VOCAB_SIZE

PROGRAM = "python -m pipelines.compare"
BATCH_SCRIPT = Path("slurm/compare_arm.sh")
GIVEN = "given"
"""The world of --data.datasets."""
# At the recipe's rate accuracy wavers late, where one answer needs two looks.
SLOWER = ("--optimizer.learning-rate", "7e-4", "--optimizer.beta2", "0.99")
WORLDS = {
    # 36 tokens an image.
    "shapes": ("--train.steps", "400"),
    "relations": ("--train.steps", "1500", *SLOWER),
    "counting": ("--train.steps", "1500", *SLOWER),
    # 64 tokens an image: the smallest letters are 7 pixels high, a patch 8.
    "text": ("--train.steps", "1500", *SLOWER, "--vision.image-size", "64"),
}
"""What a rendered world asks of a tiny recipe: images as large as it was drawn for, steps that fit 8 minutes on 2 cores."""
TOKENIZER = Path("data", "scenes-tokenizer")
"""Relative, as all of the worlds' data, so that committed settings name no machine's folders."""
SPELLING = ("--data.tokenizer", str(TOKENIZER), "--model.vocab-size", str(VOCAB_SIZE))
FROM_NOTHING = (
    *("--train.trainable-parts", "tower", "language", "vision_kv", "--model.init-std", "0.09"),
    *("--train.global-batch-samples", "32", "--train.micro-batch-samples", "32"),
)
"""Of tiny recipes: nothing pretrained exists for them, and a width of 128 learns faster from larger weights."""
# Saved in the training thread: while another one writes, steps take longer.
ALIKE = (
    *("--train.initialization", "by_name", "--optimizer.schedule", "constant", "--optimizer.warmup-fraction", "0.05"),
    *("--checkpoint.mode", "sync", "--log.interval-steps", "1", "--log.ledger", "--log.predictions-interval-steps", "0"),
)
OWN = {
    "run.dir": "--runs", "train.seed": "--seeds", "model.hidden_size": "--sizes", "method": "--methods",
    **dict.fromkeys(("checkpoint.interval_steps", "checkpoint.keep_every", "log.validation_interval_steps"), "--points"),
    **dict.fromkeys(("log.interval_steps", "log.no_ledger"), "nothing, every step is logged"),
}  # fmt: skip
"""Settings of the arms that are not to be given, and what says them here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the comparison; every flag with a dot in its name (--train.steps 30) is a setting of all its arms."""

    experiment: Annotated[str, Word("EXPERIMENT")]
    """Name of the comparison."""
    methods: tuple[str, ...] = ("himix", "saisa", "vica", "mplug_owl3", "latest_window", "tokens")
    """Methods, each by its name or as NAME:field=value,field=value (a list as 0+2+4)."""
    worlds: tuple[str, ...] = ("shapes", "relations", "text")
    """Rendered worlds: shapes, relations, counting, text."""
    seeds: Count = 3
    """Number of seeds, of weights and data order, from the recipe's on."""
    sizes: tuple[Count, ...] = ()
    """Widths of the decoder, whose heads and MLP grow with it; empty: the recipe's."""
    recipe: str = "tiny_instruct"
    """Recipe of all arms."""
    points: Count = 10
    """Number of times that an arm is measured along the way, the end included."""
    baseline: str = "tokens"
    """Method that the others are compared with."""
    arms_at_once: Count = 1
    """Number of arms that train at the same time here, sharing the cores; the seconds of such arms are comparable only with
    each other's."""
    results: Path = Path("docs/results")
    """Folder of the experiment's folder of results."""
    runs: Path = Path("runs/compare")
    """Folder of the experiment's folder of runs."""
    report: bool = False
    """Only write the report, over the arms that are there."""
    arm: CountOrZero | None = None
    """Only run the arm of this number, counted from 0, without a report: what a job of --submit does."""
    submit: bool = False
    """Submit the missing arms as one Slurm array of one task each instead of running them here."""
    sbatch: str = ""
    """With --submit: further arguments of sbatch, e.g. --sbatch="--partition=gpu --gpus-per-task=1 --time=30"."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.experiment):
            raise ValueError(f"EXPERIMENT is {self.experiment!r}: it names folders, so wanted letters, digits and . _ -")
        for name in ("methods", "worlds", "sizes"):
            if len(set(values := getattr(self, name))) < len(values) or (name != "sizes" and not values):
                raise ValueError(f"--{name} is {' '.join(map(str, values)) or 'empty'}: wanted different ones, at least one")

    @property
    def folder(self) -> Path:
        """The experiment's results."""
        return self.results / self.experiment


@dataclass(frozen=True, slots=True)
class Planned:
    """An arm that is to be there."""

    facts: dict[str, Any]
    """The fields of its Arm that are known beforehand."""
    words: tuple[str, ...]
    """What its process takes."""
    datasets: tuple[str, ...]
    """What it trains on and is asked."""
    run_dir: Path
    file: Path
    """Its JSON."""

    @property
    def finished(self) -> bool:
        """Whether its file is there. Raises: ValueError if other settings made that."""
        if not self.file.is_file():
            return False
        old, new = read(Arm, self.file).settings.split(), self.facts["settings"].split()
        if old != new:
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
            shown = (" ".join(words[max(0, same - 1) :]) for words in (old, new))
            raise ValueError(f"{self.file} was made with other settings (... {', now ... '.join(shown)}): use the same, or "
                             "another EXPERIMENT")  # fmt: skip
        return True


def main() -> int:
    """The command line. Returns: the exit code."""
    settings, flags = arguments(sys.argv[1:])
    if settings.report:
        return report(settings)
    arms = plan(settings, flags)
    missing = [number for number, arm in enumerate(arms) if not arm.finished]
    if settings.submit:
        return submit(settings, missing)
    code = run(settings, arms, [number for number in missing if settings.arm in (None, number)])
    if settings.arm is None and code != EXIT_REQUEUE and any(arm.finished for arm in arms):
        report(settings)
    return code


# ---- what is to run ------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """The comparison's own settings, and the flags for its arms: those with a dot in their name."""
    (experiment, *flags), own = split_recipe_flags(argv if argv and not argv[0].startswith("-") else ["", *argv])
    settings = parse_settings(Settings, [*filter(None, [experiment]), *own], PROGRAM, __doc__)
    refuse_own(flags, OWN, "the comparison's")
    return settings, flags


def plan(settings: Settings, flags: Sequence[str]) -> list[Planned]:
    """All arms: every method and world with one seed, then with the next. Raises: ValueError naming the arm that cannot be."""
    recipe = load_recipe(settings.recipe)()
    given = {flag.split("=", 1)[0] for flag in flags} & {"--data.datasets", "--data.validation-path"}
    if len(given) == 1:
        raise ValueError(f"{given.pop()} is given alone: give --data.datasets to train on and --data.validation-path to ask")
    for world in settings.worlds:
        check_known("--worlds", world, WORLDS)
    worlds, sizes = (GIVEN,) if given else settings.worlds, settings.sizes or (recipe.model.hidden_size,)
    by_axes = [with_seeds(settings, flags, recipe, *axes) for axes in itertools.product(sizes, worlds, settings.methods)]
    return [arms[number] for number in range(settings.seeds) for arms in by_axes]


def with_seeds(settings: Settings, flags: Sequence[str], recipe: Config, size: int, world: str, method: str) -> list[Planned]:
    """One arm with each seed."""
    tiny = FROM_NOTHING if settings.recipe.startswith("tiny_") else ()
    spelled = SPELLING if world != GIVEN else ()
    alike, data = [settings.recipe, *ALIKE, *tiny, *spelled, *WORLDS.get(world, ()), *flags], scene_folder(world)
    words = [*alike, *method_words(method), *size_words(recipe.model, size)]
    if world != GIVEN:
        align, instruct, heldout = (str(data / split) for split in ("align", "instruct", "heldout"))
        words += ["--data.datasets", align, instruct, "--data.validation-path", heldout]
    name = re.sub(r"[^\w.]+", "-", f"{world} {method} {size}")
    try:
        config = parse(words, PROGRAM)
        check_ranks(config, 1)
        if config.train.steps is None:
            raise ValueError("the recipe counts epochs: give --train.steps")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    for flag in ("checkpoint.interval-steps", "checkpoint.keep-every", "log.validation-interval-steps"):
        words += [f"--{flag}", str(-(-config.train.steps // settings.points))]
    arms, datasets = [], (*config.data.datasets, str(config.data.validation_path))
    for seed in range(recipe.train.seed, recipe.train.seed + settings.seeds):
        run_dir, file = settings.runs / settings.experiment / f"{name}-{seed}", settings.folder / "arms" / f"{name}-{seed}.json"
        facts = {
            "method": method,
            "world": world,
            "size": size,
            "seed": seed,
            "settings": shlex.join(["--points", str(settings.points), *alike]),
        }
        own = ("--train.seed", str(seed), "--run.dir", str(run_dir))
        arms.append(Planned(facts, (*words, *own), datasets, run_dir, file))
    return arms


def method_words(method: str) -> list[str]:
    """The flags of NAME or NAME:field=value,field=value. Raises: ValueError."""
    name, _, changes = method.partition(":")
    check_known("--methods", name, METHODS)
    words = ["--method", name]
    for change in changes.split(",") if changes else ():
        field, _, value = change.partition("=")
        if not value or field not in (known := [item.name for item in fields(InjectionConfig)]):
            raise ValueError(f"--methods has {method}: wanted NAME:field=value,..., with field one of {', '.join(known)}")
        if value in ("True", "False"):
            words.append(f"--injection.{'no-' * (value == 'False')}{field.replace('_', '-')}")
        else:
            words += [f"--injection.{field.replace('_', '-')}", *value.split("+")]
    return words


def size_words(model: ModelConfig, width: int) -> list[str]:
    """The flags that make a model so wide, with heads as wide as before. Raises: ValueError."""
    step, words = model.hidden_size // math.gcd(model.num_attention_heads, model.num_query_groups), []
    if width % step:
        raise ValueError(f"--sizes is {width}: wanted multiples of {step}, so that heads stay whole")
    for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        words += [f"--model.{name.replace('_', '-')}", str(getattr(model, name) * width // model.hidden_size)]
    return words if width != model.hidden_size else []


def scene_folder(world: str) -> Path:
    """Where a rendered world's data are."""
    return Path("data", "scenes" if world == "shapes" else f"scenes-{world}")


# ---- here ----------------------------------------------------------------------------------------------------------


def run(settings: Settings, arms: Sequence[Planned], chosen: Sequence[int]) -> int:
    """Run the arms of these numbers on this machine. Returns: the exit code."""
    for world, datasets in {arms[number].facts["world"]: arms[number].datasets for number in chosen}.items():
        if world != GIVEN:
            ensure_scene_data(scene_folder(world), SceneSettings(world=world))
            ensure_tokenizer(TOKENIZER)
        for path in datasets:
            ShardDataset(path)  # a mistake is told here, before anything starts
    request = StopRequest(COMMAND_STOP_SIGNALS, on_request=lambda _: None)  # `watch` sees it, and lets the arms save first
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // settings.arms_at_once)))
    print(f"{len(arms)} arms, {len(chosen)} to run, {settings.arms_at_once} at once", flush=True)
    started, ended = time.monotonic(), []

    def one(number: int) -> str | None:
        """Returns: why the arm has not finished."""
        if request.received:
            return None
        title = f"[{number + 1}/{len(arms)}] {arms[number].file.stem}"
        outcome = run_arm(arms[number], title, request)
        ended.append(number)
        remaining = (time.monotonic() - started) / len(ended) * (len(chosen) - len(ended))
        print(f"{title}: {outcome or 'finished'}, remaining {clock(remaining)}", flush=True)
        return outcome and f"{title}: {outcome}"

    with ThreadPoolExecutor(settings.arms_at_once) as pool:
        unfinished = [line for line in pool.map(one, chosen) if line]
    if request.received:
        print(f"stop requested ({request.received}): the same command continues the comparison", flush=True)
        return EXIT_REQUEUE
    for line in unfinished:
        print(f"not finished: {line}", flush=True)
    return 1 if unfinished else 0


def run_arm(arm: Planned, title: str, request: StopRequest) -> str | None:
    """Run one arm from start to end. Returns: None if it has finished, else the outcome."""
    from himix_megatron.checkpoint.manifest import complete_checkpoints

    run_dir, progress = arm.run_dir, Progress(title, arm.run_dir)

    def watch() -> bool:
        progress.show()
        return request.received is not None

    output = run_dir.with_name(f"{run_dir.name}.txt")
    ending = run_ranks([sys.executable, "-m", "pipelines.comparison.arm", *arm.words], 1, watch, output)
    if ending.code:
        return f"{ending} (see {output})"
    write(arm.file, Arm(**arm.facts, measured=read(Measured, run_dir / MEASURED)))
    for folder in complete_checkpoints(run_dir)[:-1]:
        shutil.rmtree(folder)
    return None


def report(settings: Settings) -> int:
    """Write the report over the arms that are there. Returns: the exit code. Raises: ValueError if there are none."""
    from pipelines.comparison.report import write_report

    arms = [read(Arm, file) for file in sorted((settings.folder / "arms").glob("*.json"))]
    if not arms:
        raise ValueError(f"{settings.folder} has no finished arms: leave --report out to run them")
    print(f"report over {len(arms)} arms: {write_report(arms, settings.folder, settings.baseline, sys.argv[1:])}", flush=True)
    return 0


def submit(settings: Settings, missing: Sequence[int]) -> int:
    """Submit what is missing as an array of jobs. Returns: the exit code."""
    check_sbatch(BATCH_SCRIPT)
    if not missing:
        print("all arms have finished", flush=True)
        return 0
    folder = settings.runs / settings.experiment
    folder.mkdir(parents=True, exist_ok=True)
    words = split_flags(sys.argv[1:], lambda name: name not in ("submit", "sbatch"))[True]
    command = [
        "sbatch", "--parsable", "--job-name", f"compare-{settings.experiment}", "--array", ",".join(map(str, missing)),
        "--output", str(folder / "job-%a.txt"), *shlex.split(settings.sbatch), str(BATCH_SCRIPT), *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " ".join((done.stderr if done.returncode else done.stdout).split())
    print(f"sbatch refused: {said}" if done.returncode else f"{len(missing)} arms, job {said}; report, once they have ended: "
          f"{PROGRAM} {settings.experiment} --report", flush=True)  # fmt: skip
    return 1 if done.returncode else 0


if __name__ == "__main__":
    run_main(main)
