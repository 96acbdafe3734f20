"""From nothing to a model that answers questions about images, in a few minutes on a laptop.

    python -m pipelines.quickstart                     (or: make quickstart)

Renders a corpus of scenes as LLaVA data, then runs what a user would run: Ray preprocessing, align, instruct, evaluate, on
two tensor-parallel ranks. Nothing pretrained exists for it, so `--train.parts` lets tower and language model train as well.
Prints each command before it runs, and a table at the end. Run again, it continues where it stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himix_megatron.data.schema import manifest_path
from pipelines.cli import parse_settings, run_main
from pipelines.scenes import SceneSettings, write_corpus

PARTS = ("vision_kv", "language", "tower")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the quickstart."""

    out: Path = Path("runs/quickstart")
    """Where data, runs and summary.json go."""
    align_steps: int = 120
    """Optimizer steps on captions."""
    instruct_steps: int = 330
    """Optimizer steps on questions and answers."""
    tensor: int = 2
    """Tensor-parallel ranks of training and evaluation."""


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


def preprocess(corpus: Path, shards: Path, split: str) -> list[str]:
    """The command that makes one split's shard dataset."""
    return [
        sys.executable, "-m", "pipelines.preprocess", "--source", "llava", "--annotations", str(corpus / f"{split}.json"),
        "--images", str(corpus / "images"), "--out", str(shards / split),
    ]  # fmt: skip


def pretrain(settings: Settings, stage: str, steps: int, *extra: str) -> list[str]:
    """The command that trains one stage."""
    shards = settings.out / "shards"
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.tensor),
        "-m", "pipelines.pretrain", f"tiny_{stage}", "--data.path", str(shards / stage), "--run.dir", str(settings.out / stage),
        "--train.parts", *PARTS, "--train.steps", str(steps), "--train.global-batch-samples", "64",
        "--train.micro-batch-samples", "64", "--parallel.tensor", str(settings.tensor), "--optimizer.learning-rate", "1e-3",
        "--checkpoint.interval-steps", "100", "--log.interval-steps", "20", *extra,
    ]  # fmt: skip


def quickstart(settings: Settings) -> dict[str, Any]:
    """All of it. Returns what summary.json holds."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    corpus, shards = settings.out / "corpus", settings.out / "shards"
    if not all(manifest_path(shards / split).is_file() for split in ("align", "instruct", "heldout")):
        print(f"== render scenes into {corpus}", flush=True)
        write_corpus(corpus, SceneSettings())
        seconds["render"] = time.perf_counter() - started
    for split in ("align", "instruct", "heldout"):
        seconds[f"preprocess {split}"] = run(f"preprocess {split} with Ray", preprocess(corpus, shards, split))
    align = pretrain(settings, "align", settings.align_steps)
    seconds["align"] = run("align: captions", align)
    initial = ("--checkpoint.initial", str(settings.out / "align"), "--data.validation-path", str(shards / "heldout"))
    instruct = pretrain(settings, "instruct", settings.instruct_steps, *initial)
    seconds["instruct"] = run("instruct: questions and answers", instruct)
    evaluate = [
        sys.executable, "-m", "pipelines.evaluate", str(settings.out / "instruct"), "--data", str(shards / "heldout"),
        "--parallel.tensor", str(settings.tensor),
    ]  # fmt: skip
    seconds["evaluate"] = run("evaluate: held-out questions, own and shuffled images", evaluate)
    found = json.loads((settings.out / "instruct" / "evaluation" / "heldout.json").read_text())
    summary = {
        "answer_accuracy": found["answer_accuracy"],
        "answer_accuracy_shuffled_images": found["answer_accuracy_shuffled_images"],
        "questions": found["questions"],
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_by_part": {name: round(value, 1) for name, value in seconds.items()},
        "runs": {stage: str(settings.out / stage) for stage in ("align", "instruct")},
    }
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def table(settings: Settings, summary: dict[str, Any]) -> str:
    """What the quickstart says at the end."""
    rows = [
        ("held-out answers exactly right, own images", f"{summary['answer_accuracy']:.3f}"),
        ("the same with images shuffled between samples", f"{summary['answer_accuracy_shuffled_images']:.3f}"),
        ("questions", str(summary["questions"])),
        *((f"seconds: {name}", f"{value:.1f}") for name, value in summary["seconds_by_part"].items()),
        ("seconds in all", f"{summary['seconds']:.1f}"),
        *((f"run: {stage}", path) for stage, path in summary["runs"].items()),
        ("summary", str(settings.out / "summary.json")),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, "", f"watch it:  tensorboard --logdir {settings.out} --host 127.0.0.1"])


def main() -> None:
    settings = parse_settings(Settings, sys.argv[1:], "python -m pipelines.quickstart")
    settings.out.mkdir(parents=True, exist_ok=True)
    print("\n" + table(settings, quickstart(settings)))


if __name__ == "__main__":
    run_main(main)
