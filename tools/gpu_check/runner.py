"""Runs checks in their order within a budget of seconds. Flows in: checks; out: OUT/results.jsonl, OUT/errors.txt, stdout.

Every line is in the file, and on stdout, as soon as it is known: a machine that is taken away leaves what was found so far.
A check that raises does not end the others. Checks marked `beside` mostly wait for processes that they start; they run in
parallel with the others of their stage, one thread each, and no check of the next stage begins before they have ended.
"""

from __future__ import annotations

import json
import platform
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from himix_megatron.monitoring.environment import code_version, version
from tools.bench.measure import Line
from tools.doctor.software import nvidia_driver


@dataclass(frozen=True)
class Context:
    """Where a check runs."""

    out: Path
    """Where result files go; few and small. Everything else belongs in a temporary folder."""
    tiny: bool
    """True where there is no GPU: the same code with tiny sizes."""
    deadline: float
    """`time.monotonic()` at which the budget ends."""
    gpus: int = 1
    """Ranks that layouts are tried on: GPUs, or processes where there is none."""

    def remaining(self) -> float:
        """Seconds that are left of the budget."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    """One word, as `--only` takes it."""
    stage: Literal["correctness", "performance"]
    """Correctness runs before performance."""
    seconds: float
    """On a machine with an H200 and slow cores; a check that would not fit into what is left of the budget is skipped."""
    run: Callable[[Context], Iterable[Line]]
    """Gives lines as they come."""
    beside: bool = False
    """It waits for processes that it starts, and runs in parallel with the others of its stage."""
    gpus: int = 1
    """Least number of GPUs it needs."""


@dataclass
class Recorder:
    """Writes and prints lines; several threads may use it."""

    out: Path
    failures: list[str] = field(default_factory=list)
    """Lines that were missed and checks that failed, as they were shown."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def line(self, check: str, line: Line) -> None:
        """Record what a check found."""
        row = {"what": line.what, "value": line.value, "wanted": line.wanted, "at_most": line.at_most, "holds": line.holds}
        self.write(check, str(line), failed=not line.holds, **row)

    def failed(self, check: str, error: Exception, seconds: float) -> None:
        """Record that a check raised; the traceback goes to errors.txt."""
        text = "".join(traceback.format_exception(error))
        with self.lock, (self.out / "errors.txt").open("a") as errors:
            errors.write(f"== {check} failed after {seconds:.0f} s\n{text[-_TRACEBACK_CHARACTERS:]}\n")
        last = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        self.write(check, f"  FAILED  {last}", failed=True, error=last)

    def write(self, check: str, shown: str, *, failed: bool = False, **found: Any) -> None:
        """A line of the file, and one on stdout."""
        shown = f"{check:<22} {shown}"
        with self.lock:
            with (self.out / "results.jsonl").open("a") as results:
                results.write(json.dumps({"check": check, **found}) + "\n")
            print(shown, flush=True)
            self.failures += [shown] if failed else []


_TRACEBACK_CHARACTERS = 20_000


def run_checks(checks: Sequence[Check], context: Context) -> int:
    """Run them and print a summary. Returns: the exit code, 1 if a line is missed or a check failed."""
    context.out.mkdir(parents=True, exist_ok=True)
    (context.out / "errors.txt").unlink(missing_ok=True)
    found, recorder = header(), Recorder(context.out)
    (context.out / "results.jsonl").write_text(json.dumps(found) + "\n")
    print("; ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    for stage in ("correctness", "performance"):
        of_stage = [check for check in checks if check.stage == stage]
        with ThreadPoolExecutor(max(1, len(of_stage))) as beside:
            for check in of_stage:
                if check.beside:
                    beside.submit(run_check, check, context, recorder)
            for check in of_stage:
                if not check.beside:
                    run_check(check, context, recorder)
    number = len(recorder.failures)
    print("\n".join(["", f"{number} missed or failed:" if number else "all hold", *recorder.failures]), flush=True)
    return int(number > 0)


def run_check(check: Check, context: Context, recorder: Recorder) -> None:
    """Run one, unless the budget is too small for it."""
    if not context.tiny and check.seconds > context.remaining():
        why = f"needs {check.seconds:.0f} s, {max(0.0, context.remaining()):.0f} s are left"
        recorder.write(check.name, f" SKIPPED  {why}", skipped=why)
        return
    started = time.monotonic()
    try:
        for line in check.run(context):
            recorder.line(check.name, line)
    except Exception as error:  # whatever it is, the other checks are still worth the machine's time
        recorder.failed(check.name, error, time.monotonic() - started)
    finally:
        recorder.line(check.name, Line("seconds that it took", time.monotonic() - started))
        if torch.cuda.is_available() and not check.beside:
            torch.cuda.empty_cache()  # the next check, and processes beside it, find the memory free


def header() -> dict[str, Any]:
    """What the lines were measured on."""
    gpu = torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpu and torch.distributed.is_nccl_available() else "none"
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "driver": nvidia_driver() or "none",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "cuDNN": torch.backends.cudnn.version() if gpu else "none",
        "NCCL": nccl,
        "transformer-engine": version("transformer-engine"),
        "megatron-core": version("megatron-core"),
        "Python": platform.python_version(),
        "code": code_version(),
    }
