"""One hostile case: files made from the world, the real entry that reads them in a forked child, and a look at what it left.

Flows in: a seed and a number, which decide everything about a case; out: an `Outcome`, whose `error` is None when the case
ended as it may: exit code 0, 2 with a line, or what else the call allows, within time and memory, and nothing changed outside.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil

from tests.support import ROOT, hostile_world

HANG_SECONDS = 20.0
MEMORY_BYTES = 2 << 30
"""More than the imports take. Address space is limited to twice as much, so that a bomb ends the child and not the machine."""
FILE_BYTES = 1 << 30
_HASHED_BYTES = 32 << 20
_ALWAYS = ("out", "home", "tmp", "stdout", "stderr")


@dataclass
class Call:
    """What reads a case's files."""

    module: str
    words: tuple[str, ...] = ()
    may_change: tuple[str, ...] = ()
    """Places below the case's folder that the entry may write, beside `out`."""
    codes: tuple[int, ...] = (0, 2)
    run: Callable[[], Any] | None = None
    """Instead of the module's `main`."""

    @property
    def shown(self) -> str:
        """In words."""
        return " ".join([self.module, *self.words])


@dataclass
class Case:
    """A case being made."""

    world: Path
    folder: Path
    draw: random.Random
    told: list[str] = field(default_factory=list)

    def need(self, *names: str) -> None:
        """Copy these parts of the world."""
        for name in names:
            shutil.copytree(self.world / name, self.folder / name, symlinks=True)

    @property
    def victim(self) -> Path:
        """What must stay as it is."""
        return self.folder / "victim"


@dataclass
class Outcome:
    """How a case ended."""

    number: int
    target: str
    call: str
    told: list[str]
    """What was done to the files."""
    exit_code: int | None
    seconds: float
    memory_mib: int
    """Above that of the parent."""
    error: str | None
    """None: as it may."""
    cause: str = ""
    """Failures of one cause have one text."""
    last_lines: str = ""


def preload() -> None:
    """Import what the entries need, once for all children. No threads are started, and nothing is run."""
    import tests.support.preload  # noqa: F401

    modules = ("generate", "evaluate", "preprocess", "pretrain", "encode")
    for name in (
        *(f"pipelines.{module}" for module in modules),
        "tools.convert",
        "tools.conversions",
        "tools.inspect_shards.__main__",
    ):
        importlib.import_module(name)
    for name in ("exact_match", "runner"):
        importlib.import_module(f"himix_megatron.evaluation.{name}")
    gc.collect()
    gc.freeze()  # the children's collector leaves the parent's pages alone


def draw_of(seed: int, number: int) -> random.Random:
    """The random generator of a case."""
    return random.Random(f"hostile {seed} {number}")


def make(world: Path, folder: Path, draw: random.Random, target: Callable[[Case], Call]) -> tuple[Case, Call]:
    """The case's files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True)
    hostile_world.make_victim(folder / "victim")
    case = Case(world, folder, draw)
    return case, target(case)


def run(number: int, name: str, case: Case, call: Call, *, seconds: float) -> Outcome:
    """Run a case that was made."""
    before = snapshot(case.folder, call.may_change)
    code, took, memory = in_child(case.folder, call, seconds)
    with open(case.folder / "stderr", errors="replace") as file:
        said = file.read()[-200_000:]
    outcome = Outcome(number, name, call.shown, case.told, code, round(took, 2), max(0, memory >> 20), None)
    outcome.error, outcome.cause = judge(code, said, memory, call)
    after = snapshot(case.folder, call.may_change)
    changed = {place for place in before | after if before.get(place) != after.get(place)}
    if changed:
        outcome.error = f"changed outside the output: {', '.join(sorted(changed)[:5])}"
        outcome.cause = f"{call.module} writes to {sorted(re.sub('[0-9a-f]{16,}', '*', place) for place in changed)[0]}"
    elif any(hostile_world.SECRET in data for data in _contents(case.folder / "out")):
        outcome.error, outcome.cause = "a private file is in the output", f"{call.module} copies a private file"
    if outcome.error:
        outcome.last_lines = said[-1500:]
    return outcome


def judge(code: int | None, said: str, memory: int, call: Call) -> tuple[str | None, str]:
    """What is wrong with how a child ended, and its cause."""
    if code is None:
        return f"hangs: over {HANG_SECONDS:.0f} s", f"hang in {place_of_hang(said)}"
    if "MemoryError" in said or "can't allocate memory" in said or memory > MEMORY_BYTES:
        return f"takes {memory >> 20} MiB more than the imports", f"memory in {place_of_traceback(said) or call.module}"
    if "Traceback (most recent call last)" in said:
        what = exception_of(said)
        return f"traceback: {what[:200]}", f"{what.split(':')[0]} in {place_of_traceback(said)}"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}", f"{signal.Signals(-code).name} in {call.module}"
    if code not in call.codes:
        return f"exit code {code}", f"exit code {code} of {call.module}"
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and len(lines) != 1:
        return f"exit code 2 with {len(lines)} error lines", f"{len(lines)} error lines of {call.module}"
    if any(len(line) > 6000 for line in lines):
        return "an error line of thousands of characters", f"long line of {call.module}"
    if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", said):
        return "control characters on stderr", f"control characters of {call.module}"
    return None, ""


def exception_of(said: str) -> str:
    """The line of the last traceback that names the exception."""
    after = said.rpartition("Traceback (most recent call last)")[2].splitlines()[1:]
    return next((line for line in after if line and not line[0].isspace()), "?")


def place_of_traceback(said: str) -> str:
    """File and function of our innermost frame in the last traceback."""
    frames = re.findall(r'File "([^"]+)", line \d+, in (\S+)', said.rpartition("Traceback (most recent call last)")[2])
    return _ours(frames[::-1]) or (f"{Path(frames[-1][0]).name}:{frames[-1][1]}" if frames else "")


def place_of_hang(said: str) -> str:
    """The same where a child stood when its time was over."""
    dump = said.rpartition("Timeout (")[2]
    main = dump.rpartition("Current thread")[2] or dump
    return (
        _ours(re.findall(r'File "([^"]+)", line \d+ in (\S+)', main))
        or _ours(re.findall(r'File "([^"]+)", line \d+ in (\S+)', dump))
        or "?"
    )


def _ours(frames: list[tuple[str, str]]) -> str:
    for path, function in frames:
        with contextlib.suppress(ValueError):
            relative = Path(path).relative_to(ROOT)
            if relative.parts[0] in ("himix_megatron", "pipelines", "tools", "slurm") and relative.name != "cli.py":
                return f"{relative}:{function}"
        if path.endswith("_himix.py"):
            return f"exported/{Path(path).name}:{function}"
    return ""


def snapshot(folder: Path, may_change: tuple[str, ...]) -> dict[str, Any]:
    """What each place is, outside those that may change."""
    found = {}
    for base, folders, files in os.walk(folder):
        relative = Path(base).relative_to(folder)
        folders[:] = [name for name in folders if not _may(str(relative / name), may_change)]
        for name in (*files, *folders):
            if _may(place := str(relative / name), may_change):
                continue
            state = os.lstat(Path(base) / name)
            kind: Any = stat.S_IFMT(state.st_mode)
            if stat.S_ISLNK(state.st_mode):
                kind = os.readlink(Path(base) / name)
            elif stat.S_ISREG(state.st_mode):
                is_small = state.st_size <= _HASHED_BYTES
                kind = hashlib.sha256((Path(base) / name).read_bytes()).hexdigest() if is_small else state.st_mtime_ns
            found[ascii(place)] = (kind, stat.S_IMODE(state.st_mode))
    return found


def _may(place: str, may_change: tuple[str, ...]) -> bool:
    return any(place == name or place.startswith(f"{name}/") for name in (*_ALWAYS, *may_change))


def _contents(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= _HASHED_BYTES:
            yield path.read_bytes()


# ---- the child -----------------------------------------------------------------------------------------------------


def in_child(folder: Path, call: Call, seconds: float) -> tuple[int | None, float, int]:
    """Run in a forked process. Returns: exit code (negative: signal; None: it hung), seconds, bytes more than this one has."""
    began, own = time.monotonic(), psutil.Process().memory_info()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(folder, call, own.vms + 2 * MEMORY_BYTES, seconds)
    status = usage = None
    while time.monotonic() - began < seconds:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _, _, usage = os.wait4(pid, 0)
        return None, time.monotonic() - began, usage.ru_maxrss * 1024 - own.rss
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it left behind
    assert status is not None
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss * 1024 - own.rss


def enter(folder: Path, address_space: int, seconds: float) -> None:
    """Make this forked process one of its own, in the folder of its case."""
    os.setsid()
    for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY)
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(n, mode, errors="backslashreplace", closefd=False) for n, mode in enumerate("rww")
    )
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "MPLCONFIGDIR": str(folder / "home")}
    os.chdir(folder)
    if seconds:
        faulthandler.dump_traceback_later(0.9 * seconds, file=sys.stderr)


def _child(folder: Path, call: Call, address_space: int, seconds: float) -> NoReturn:
    code = 1
    try:
        enter(folder, address_space, seconds)
        code = entry(call)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def imported(name: str) -> Any:
    """The module that `python -m name` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def entry(call: Call) -> int:
    """The entry as a command runs it. Returns: the exit code."""
    from pipelines.cli import run_main

    sys.argv = [call.module, *call.words]
    try:
        run_main(call.run or imported(call.module).main)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
