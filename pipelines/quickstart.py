"""From nothing to a model that answers questions about images, in a few minutes on a laptop.

    python -m pipelines.quickstart                     (or: make quickstart)
    python -m pipelines.quickstart --model.layer-spec torch --train.precision fp32

Renders a corpus of scenes as LLaVA data, then runs what a user would run: preprocessing (by Ray where it is installed), align,
instruct, evaluate, on two tensor-parallel ranks, or on one where there is one GPU; on GPUs in bf16. Flags with a section
(`--section.field value`) go to both trainings. Nothing pretrained exists for it, so `--train.trainable-parts` lets tower and
language model train as well. Prints each command before it runs, and a table at the end. Run again, it continues where it
stopped.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from himix_megatron.config import check_ranks
from himix_megatron.data.shards.shard_format import manifest_path
from himix_megatron.runtime import typed_json
from pipelines.cli import parse, parse_settings, refuse_own, run_main, split_recipe_flags
from pipelines.scenes import SceneSettings, write_corpus

PARTS = ("vision_kv", "language", "tower")
PROGRAM = "python -m pipelines.quickstart"
OWN = {
    "run.dir": "--out",
    "data.datasets": "--out",
    "train.steps": "--align-steps and --instruct-steps",
    "checkpoint.init_from": "--out",
}
"""Settings of the trainings that are not to be given, and what says them here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the quickstart; every flag with a dot in its name (--train.precision fp32) is one of both trainings."""

    out: Path = Path("runs/quickstart")
    """Folder of data, runs and summary.json."""
    align_steps: int = 120
    """Number of optimizer steps on captions."""
    instruct_steps: int = 330
    """Number of optimizer steps on questions and answers."""
    tensor: int | None = None
    """Number of tensor-parallel ranks for training and evaluation; None: 2, or 1 on a machine with one GPU."""
    engine: Literal["auto", "ray", "local"] = "auto"
    """Engine of preprocessing; auto: Ray, or local processes where Ray cannot be imported."""


@dataclass(frozen=True, slots=True)
class Job:
    """The settings as this machine takes them."""

    out: Path
    steps: dict[str, int]
    """By stage."""
    flags: tuple[str, ...]
    """Of both trainings, the layout included."""
    tensor: int
    pipeline: int
    engine: Literal["ray", "local"]


def arguments(argv: Sequence[str]) -> tuple[Settings, list[str]]:
    """The quickstart's own settings, and the flags for its trainings: those with a dot in their name."""
    flags, own = split_recipe_flags(argv)
    return parse_settings(Settings, own, PROGRAM, __doc__), flags


def plan(settings: Settings, flags: Sequence[str], num_gpus: int, has_ray: bool) -> Job:
    """What to run here. Raises: ValueError for settings that do not fit each other or the machine."""
    refuse_own(flags, OWN, "the quickstart's")
    if settings.engine == "ray" and not has_ray:
        raise ValueError("--engine is ray, which cannot be imported here: install it, or use --engine local")
    tensor = (min(2, num_gpus) if num_gpus else 2) if settings.tensor is None else settings.tensor
    words = [*(("--train.precision", "bf16") if num_gpus else ()), "--parallel.tensor", str(tensor), *flags]
    steps = {"align": settings.align_steps, "instruct": settings.instruct_steps}
    for stage, number in steps.items():
        config = parse([f"tiny_{stage}", *_batch(number), *words], f"{PROGRAM} [for tiny_{stage}]")
        layout = config.parallel
        check_ranks(config, layout.tensor * layout.pipeline)
        if num_gpus and layout.tensor * layout.pipeline > num_gpus:
            raise ValueError(
                f"--tensor ({layout.tensor}) x --parallel.pipeline ({layout.pipeline}) is more than the {num_gpus} GPU"
                f"{'s' if num_gpus > 1 else ''} of this machine: use "
                + (f"--tensor {min(2, num_gpus)}" if layout.pipeline == 1 else "--parallel.pipeline 1")
            )
    engine = settings.engine if settings.engine != "auto" else "ray" if has_ray else "local"
    return Job(settings.out, steps, tuple(words), layout.tensor, layout.pipeline, engine)


def run(title: str, command: list[str]) -> float:
    """Show a command and run it. Returns: seconds. Raises: SystemExit with its exit code if it fails."""
    shown = shlex.join(["python" if word == sys.executable else word for word in command])
    print(f"\n== {title}\n$ {shown}", flush=True)
    started = time.perf_counter()
    # One thread a rank: the ranks share the cores.
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    code = subprocess.run(command, env=env, check=False).returncode
    if code:
        print(f"error: {title} failed with exit code {code}: its output is above", file=sys.stderr)
        raise SystemExit(code)
    return time.perf_counter() - started


def preprocess(job: Job, split: str) -> list[str]:
    """The command that makes one split's shard dataset."""
    corpus = job.out / "corpus"
    return [
        sys.executable, "-m", "pipelines.preprocess", "--source", "llava", "--annotations", str(corpus / f"{split}.json"),
        "--images", str(corpus / "images"), "--out", str(job.out / "shards" / split), "--engine", job.engine,
    ]  # fmt: skip


def _batch(steps: int) -> list[str]:
    return [
        "--train.trainable-parts", *PARTS, "--train.steps", str(steps), "--train.global-batch-samples", "64",
        "--train.micro-batch-samples", "64", "--optimizer.learning-rate", "1e-3", "--checkpoint.interval-steps", "100",
        "--log.interval-steps", "20",
    ]  # fmt: skip


def pretrain(job: Job, stage: str, *extra: str) -> list[str]:
    """The command that trains one stage. Of a flag given twice, the later one counts."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.tensor * job.pipeline),
        "-m", "pipelines.pretrain", f"tiny_{stage}", "--data.datasets", str(job.out / "shards" / stage),
        "--run.dir", str(job.out / stage), *_batch(job.steps[stage]), *extra, *job.flags,
    ]  # fmt: skip


def evaluate(job: Job) -> list[str]:
    """The command that asks the trained model; its precision is the run's."""
    return [
        sys.executable, "-m", "pipelines.evaluate", str(job.out / "instruct"), "--data", str(job.out / "shards" / "heldout"),
        "--parallel.tensor", str(job.tensor), "--parallel.pipeline", str(job.pipeline),
    ]  # fmt: skip


def quickstart(job: Job) -> dict[str, Any]:
    """All of it. Returns what summary.json holds."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    corpus, shards = job.out / "corpus", job.out / "shards"
    if not all(manifest_path(shards / split).is_file() for split in ("align", "instruct", "heldout")):
        print(f"== render scenes into {corpus}", flush=True)
        write_corpus(corpus, SceneSettings())
        seconds["render"] = time.perf_counter() - started
    for split in ("align", "instruct", "heldout"):
        by = "with Ray" if job.engine == "ray" else "here"
        seconds[f"preprocess {split}"] = run(f"preprocess {split} {by}", preprocess(job, split))
    seconds["align"] = run("align: captions", pretrain(job, "align"))
    initial = ("--checkpoint.init-from", str(job.out / "align"), "--data.validation-path", str(shards / "heldout"))
    seconds["instruct"] = run("instruct: questions and answers", pretrain(job, "instruct", *initial))
    seconds["evaluate"] = run("evaluate: held-out questions, own and shuffled images", evaluate(job))
    found = typed_json.read_object(job.out / "instruct" / "evaluation" / "heldout.json")
    summary = {
        "answer_accuracy": found["answer_accuracy"],
        "answer_accuracy_shuffled_images": found["answer_accuracy_shuffled_images"],
        "questions": found["questions"],
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_by_part": {name: round(value, 1) for name, value in seconds.items()},
        "runs": {stage: str(job.out / stage) for stage in ("align", "instruct")},
    }
    (job.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def table(out: Path, summary: dict[str, Any]) -> str:
    """What the quickstart says at the end."""
    rows = [
        ("held-out answers exactly right, own images", f"{summary['answer_accuracy']:.3f}"),
        ("the same with images shuffled between samples", f"{summary['answer_accuracy_shuffled_images']:.3f}"),
        ("questions", str(summary["questions"])),
        *((f"seconds: {name}", f"{value:.1f}") for name, value in summary["seconds_by_part"].items()),
        ("seconds in all", f"{summary['seconds']:.1f}"),
        *((f"run: {stage}", path) for stage, path in summary["runs"].items()),
        ("summary", str(out / "summary.json")),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", f"watch it:  tensorboard --logdir {out} --host 127.0.0.1"])


def main() -> None:
    settings, flags = arguments(sys.argv[1:])
    job = plan(settings, flags, num_gpus(), has_ray())
    job.out.mkdir(parents=True, exist_ok=True)
    print("\n" + table(job.out, quickstart(job)))


def num_gpus() -> int:
    """As the trainings will see them."""
    import torch  # not at the top: a mistake in the flags is reported before

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_ray() -> bool:
    """Whether it loads, not only is installed."""
    try:
        importlib.import_module("ray")
    except (ImportError, OSError):
        return False
    return True


if __name__ == "__main__":
    run_main(main)
