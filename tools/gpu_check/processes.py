"""Commands of this project as processes of their own, and what a run leaves behind.

Each gets the environment that this process started with (a check may have changed its own since), one thread, and a time limit:
the budget's end. One that fails is reported with the end of its output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tools.gpu_check.runner import Context

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
_TAIL = 6_000
_LEAST_SECONDS = 1.0
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


class ProcessError(RuntimeError):
    """A command ended otherwise than it should."""


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """One temporary folder for all checks, removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True)


def room(name: str) -> Path:
    """A fresh folder in it."""
    folder = Path(scratch().name) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def python(context: Context, *words: str | Path, on_cpu: bool = False, wanted: int = 0) -> str:
    """Run `python words` in the project's folder. Returns: its output.

    Args:
        on_cpu: hide the GPU from it.
        wanted: the exit code that it should have; -9 for one that kills itself.

    Raises: ProcessError for any other code, and when the budget ends first.
    """
    environment = {**_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *map(str, words)]
    with tempfile.TemporaryFile("w+") as output:
        # A session of its own: what it starts ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | str = process.wait(max(_LEAST_SECONDS, context.remaining()))
        except subprocess.TimeoutExpired:
            code = "no exit code when the budget ended"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing that it started is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()
    if code != wanted:
        shown = shlex.join(["python", *command[1:]])
        raise ProcessError(f"{shown}\n  ended with {code}, wanted {wanted}; its output ends:\n{said[-_TAIL:]}")
    return said


def attempt(context: Context, calls: Mapping[Key, Callable[[], Result]]) -> tuple[dict[Key, Result], list[Exception]]:
    """All of them at the same time (two at a time without a GPU). Returns: what they return, and what the others raise."""
    with ThreadPoolExecutor(2 if context.tiny else len(calls)) as pool:
        futures = {key: pool.submit(call) for key, call in calls.items()}
    results, errors = {}, []
    for key, future in futures.items():
        try:
            results[key] = future.result()
        except Exception as error:  # told when what the others found has been
            error.add_note(f"in {key}")
            errors.append(error)
    return results, errors


def together(context: Context, *calls: Callable[[], Result]) -> list[Result]:
    """The same for calls that all have to succeed. Raises: ExceptionGroup of what they raise, all having run."""
    results, errors = attempt(context, dict(enumerate(calls)))
    complain(errors)
    return list(results.values())


def complain(errors: Sequence[Exception]) -> None:
    """Raises: ExceptionGroup if there are any."""
    if errors:
        raise ExceptionGroup(f"{len(errors)} processes failed", errors)


def pretrain(context: Context, recipe: str, *flags: str | Path, on_cpu: bool = False, wanted: int = 0) -> None:
    """A training run that keeps a ledger, on one rank."""
    quiet = ("--log.ledger", "--log.pictures-interval-steps", "0", "--data.num-workers", "0")
    python(context, "-m", "pipelines.pretrain", recipe, *flags, *quiet, on_cpu=on_cpu, wanted=wanted)


def losses(run: Path) -> dict[int, list[float]]:
    """Every step's loss to the bit, as often as the run did the step."""
    found: dict[int, list[float]] = defaultdict(list)
    for line in (run / "ledger" / "steps.jsonl").read_text().splitlines():
        step = json.loads(line)
        found[step["step"]].append(float.fromhex(step["loss"]))
    return dict(found)


def apart(one: Path, other: Path, steps: Iterable[int] | None = None) -> float:
    """The largest relative difference of two runs' losses, each step as it was done last.

    Raises: ValueError if a step of either is missing.
    """
    left, right = losses(one), losses(other)
    compared = sorted(left | right) if steps is None else list(steps)
    missing = [step for step in compared if step not in left or step not in right]
    if missing or not compared:
        raise ValueError(f"steps {missing} are not in both ledgers: {sorted(left)} and {sorted(right)}")
    return widest((left[step][-1], right[step][-1]) for step in compared)


def widest(pairs: Iterable[Sequence[float]]) -> float:
    """The largest relative difference between the numbers of a group; infinite where one is no number."""
    found = [(max(group) - min(group)) / max(abs(number) for number in group) for group in pairs]
    return max(value if value == value else float("inf") for value in found)
