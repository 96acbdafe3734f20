"""Run commands of this project in separate processes, and read what a run leaves behind.

Each gets the environment with which this process started (a check may have changed it since), one thread, and the end of the
budget as its time limit. Loading libraries takes ten seconds, so commands that need no separate process share one: `in_turn`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tools.gpu_check.runner import Context

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
_TAIL = 6_000
_LEAST_SECONDS = 1.0
Command = tuple[str | Path, ...]
"""A module with a `main`, or `module:function`, and its arguments."""


class ProcessError(RuntimeError):
    """A command ended otherwise than it should."""


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []
_LOCK = threading.Lock()


def scratch_folder(name: str) -> Path:
    """A fresh folder in one temporary folder for all checks, which is removed when this process ends."""
    with _LOCK:  # checks that run at once would make two, and the first to be forgotten takes its files along
        if not _SCRATCH:
            _SCRATCH.append(tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True))
    folder = Path(_SCRATCH[0].name) / name
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
            for child in psutil.Process(process.pid).children(recursive=True):  # torchrun's ranks have sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
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


def in_turn(context: Context, commands: Sequence[Command], *, on_cpu: bool = False, wanted: int = 0) -> ProcessError | None:
    """Run these one after the other in one process; one that fails does not stop the others.

    Returns: what went wrong, to be raised after the others' results were reported. Args: as for `python`.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    try:
        python(context, "-m", "tools.gpu_check.processes", words, on_cpu=on_cpu, wanted=wanted)
    except ProcessError as error:
        return error
    return None


def complain(error: ProcessError | None) -> None:
    """Raises: it, if there is one."""
    if error:
        raise error


def main() -> int:
    """The process of `in_turn`. Returns: the exit code."""
    failed = 0
    for number, (entry, *words) in enumerate(json.loads(sys.argv[1])):
        if number:
            _start_afresh()
        module, _, function = entry.partition(":")
        sys.argv = [module, *words]
        try:
            code = getattr(importlib.import_module(module), function or "main")(*(words if function else ()))
            if isinstance(code, int) and code:
                raise RuntimeError(f"exit code {code}")
        except (Exception, SystemExit):  # whatever it is, the next command may do better
            traceback.print_exc()
            print(f"failed: {entry} {shlex.join(words)}", flush=True)
            failed += 1
    return int(failed > 0)


def _start_afresh() -> None:
    """Undo what a training run or an evaluation leaves in its process."""
    import torch.distributed

    from himix_megatron.distributed.topology import shutdown_distributed
    from himix_megatron.runtime import log

    gc.collect()  # recorded graphs, before the groups whose collectives they hold
    if torch.distributed.is_initialized():
        shutdown_distributed()
    log.stop()


def pretrain(recipe: str, *flags: str | Path) -> Command:
    """A training run that keeps a ledger, on one rank."""
    quiet = ("--log.ledger", "--log.predictions-interval-steps", "0", "--data.num-workers", "0")
    return ("pipelines.pretrain", recipe, *flags, *quiet)


def losses(run: Path, field: str = "loss") -> dict[int, list[float]]:
    """Every step's loss (or `grad_norm`) to the bit, as often as the run did the step; none of a run that took none."""
    found: dict[int, list[float]] = defaultdict(list)
    file = run / "ledger" / "steps.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        step = json.loads(line)
        found[step["step"]].append(float.fromhex(step[field]))
    return dict(found)


def apart(one: Path, other: Path, steps: Iterable[int], field: str = "loss") -> float:
    """The largest relative difference of two runs' losses, each step as it was done last; infinite if one is missing."""
    left, right = losses(one, field), losses(other, field)
    return widest((left.get(step, [math.nan])[-1], right.get(step, [math.nan])[-1]) for step in steps)


def widest(pairs: Iterable[Sequence[float]]) -> float:
    """The largest relative difference between the numbers of a group; infinite where one is no number."""
    wide = 0.0
    for group in pairs:
        if any(math.isnan(number) for number in group):
            return math.inf
        wide = max(wide, (max(group) - min(group)) / max(abs(number) for number in group))
    return wide


if __name__ == "__main__":
    sys.exit(main())
