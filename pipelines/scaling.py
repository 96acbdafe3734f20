"""Run a scaling series: one recipe on several numbers of ranks, each in its own run.

    python -m pipelines.scaling tiny_align --world-sizes 1 2 4 --mode weak --train.steps 30
    python -m pipelines.scaling qwen2_0_5b_align --world-sizes 8 16 32 --train.steps 60 --submit
    python -m tools.scaling_report runs/tiny_align-weak

`weak`: the global batch grows with the number of ranks, from the one given for the smallest size; `strong`: it stays. Flags
with a section (`--section.field value`) apply to every run, and are checked for every size before anything starts. Runs are in
RUNS/RECIPE-weak-004 and so on; RUNS/RECIPE-weak/series.json lists them. The same command continues a series: finished sizes are
skipped. A run that fails or is killed is reported, and the series continues with the next size.
Exit code 0: all sizes have finished (or are submitted); 1: some have not; 85: stopped on request, saved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from himix_megatron.config import Config, Count, check_ranks
from himix_megatron.monitoring.run_status import followed_status
from himix_megatron.runtime import typed_json
from himix_megatron.runtime.durable_files import publish
from himix_megatron.runtime.process import bulk_import
from himix_megatron.runtime.stop_signals import COMMAND_STOP_SIGNALS, EXIT_REQUEUE, StopRequest
from pipelines.cli import parse, parse_settings, run_main, split_recipe_flags
from pipelines.flags import current_flags
from pipelines.launchers.local_ranks import run_ranks
from pipelines.pretrain import with_data

PROGRAM = "python -m pipelines.scaling"
BATCH_SCRIPT = Path("slurm/pretrain_himix.sh")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the series; every flag with a dot in its name (--train.steps 30) is a setting of all its runs."""

    world_sizes: tuple[int, ...]
    """Numbers of ranks (GPUs), with one run for each."""
    mode: Literal["weak", "strong"] = "weak"
    """weak: the global batch grows with the ranks, and the given batch is that of the smallest size; strong: it stays."""
    runs: Path = Path("runs")
    """Folder that holds the run folders."""
    name: str | None = None
    """Name of the series. None: RECIPE-MODE, or RECIPE-METHOD-MODE. Series with different settings need different names."""
    submit: bool = False
    """Submit each run with sbatch instead of starting its ranks on this machine."""
    gpus_per_node: Count = 8
    """With --submit: GPUs per node; larger sizes use whole nodes."""
    sbatch: str = ""
    """With --submit: further arguments of sbatch, e.g. --sbatch="--partition=gpu --time=30"."""

    def __post_init__(self) -> None:
        sizes = self.world_sizes
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise ValueError(f"--world-sizes is {' '.join(map(str, sizes))}: wanted different numbers of ranks, each 1 or more")
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"--name is {self.name!r}: it names folders, so wanted letters, digits and . _ -")


@dataclass(frozen=True, slots=True)
class Member:
    """One size of a series."""

    world_size: int
    words: tuple[str, ...]
    """What follows `pipelines.pretrain`."""
    config: Config

    @property
    def finished(self) -> bool:
        """Whether its run folder holds the checkpoint of the last step."""
        from himix_megatron.checkpoint.manifest import complete_checkpoints

        saved = complete_checkpoints(self.config.run_dir)
        return bool(saved) and int(saved[-1].name.removeprefix("step-")) >= (self.config.train.steps or 0)

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"{ranks}, {self.config.global_batch} {'packs' if self.config.data.packs else 'samples'} a step"


@dataclass(frozen=True, slots=True)
class _SeriesFile:
    """What series.json holds."""

    recipe: str
    mode: str
    flags: list[str]
    runs: dict[str, dict[str, Any]]
    """By number of ranks."""


def read_series_file(file: Path) -> dict[str, Any]:
    """A series.json. Raises: ValueError, one line, for a file that is none."""
    return dataclasses.asdict(typed_json.build(_SeriesFile, typed_json.read(file), str(file)))


class Series:
    """series.json: the runs of a series and how each ended. Written after every change."""

    def __init__(self, settings: Settings, recipe: str, flags: Sequence[str]):
        self.name = series_name(settings, recipe, flags)
        self.folder = settings.runs / self.name
        self.file = self.folder / "series.json"
        self.content: dict[str, Any] = {"recipe": recipe, "mode": settings.mode, "flags": list(flags), "runs": {}}
        if self.file.is_file():
            found = read_series_file(self.file)
            found["flags"] = current_flags(found["flags"])
            for field in ("recipe", "mode", "flags"):
                old, new = found[field], self.content[field]
                if old != new:
                    raise ValueError(
                        f"{self.folder} is a series with another {field.removesuffix('s')}: {_shown(old)}, now {_shown(new)}: "
                        "continue it with the same words, or give this one a --name of its own"
                    )
            self.content = found

    def check(self, members: Sequence[Member]) -> None:
        """Raises: ValueError if a size would go on with another batch, as when a smaller size is added to a weak series."""
        for member in members:
            old, new = self.known(member).get("global_batch", member.config.global_batch), member.config.global_batch
            if old != new:
                raise ValueError(
                    f"{self.folder} has {member.world_size} ranks with a global batch of {old}, now it would be {new}, by the "
                    "smallest of --world-sizes: keep that one, or give this series a --name of its own"
                )

    def note(self, member: Member, **facts: Any) -> None:
        """Record facts about a run."""
        runs = self.content["runs"]
        key = str(member.world_size)
        # Relative to the series' folder: all of it can be moved.
        run_dir = os.path.relpath(member.config.run_dir, self.folder)
        runs[key] = {"run_dir": run_dir, "global_batch": member.config.global_batch} | runs.get(key, {}) | facts
        self.content["runs"] = dict(sorted(runs.items(), key=lambda item: int(item[0])))
        publish(self.file, (json.dumps(self.content, indent=2) + "\n").encode())

    def known(self, member: Member) -> dict[str, Any]:
        """The recorded facts about a run."""
        return dict(self.content["runs"].get(str(member.world_size), {}))


def main() -> int:
    settings, recipe, flags = arguments(sys.argv[1:])
    members = plan(settings, recipe, flags)
    series = Series(settings, members[0].config.recipe, flags)
    series.check(members)
    check(members, settings)
    if settings.submit:
        return submit(settings, series, members)
    return run(series, members)


# ---- what is to run ------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> tuple[Settings, str, list[str]]:
    """The series' own settings, the recipe, and the flags for its runs: those with a dot in their name."""
    (recipe, *flags), own = split_recipe_flags(argv if argv and not argv[0].startswith("-") else ["", *argv])
    settings = parse_settings(Settings, own, f"{PROGRAM} RECIPE", __doc__)
    return settings, recipe, flags


def series_name(settings: Settings, recipe: str, flags: Sequence[str]) -> str:
    """`--name`, or RECIPE-METHOD-MODE, so that series of two methods have folders of their own."""
    words = " ".join(flags).replace("=", " ").split()
    method = [words[words.index("--method") + 1]] if "--method" in words[:-1] else []
    return settings.name or "-".join([recipe.replace(":", "."), *method, settings.mode])


def plan(settings: Settings, recipe: str, flags: Sequence[str]) -> list[Member]:
    """The members, smallest first. Raises: ValueError for a setting that does not fit."""
    for flag in flags:
        if re.match(r"--run[._-]dir(=|$)", flag):
            raise ValueError("--run.dir is not for a series, which names its run folders itself: give --runs and --name")
    given = parse([recipe, *flags], PROGRAM)
    if given.train.steps is None:
        raise ValueError(
            f"{given.recipe} runs for {given.train.epochs:g} epochs, and every size of the series would: give --train.steps, "
            "e.g. 60"
        )
    sizes, name = sorted(settings.world_sizes), series_name(settings, given.recipe, flags)
    batch_flag = f"--{given.batch_flags[0].replace('_', '-')}"
    members = []
    for size in sizes:
        batch, rest = divmod(given.global_batch * (size if settings.mode == "weak" else sizes[0]), sizes[0])
        if rest:
            raise ValueError(
                f"{given.batch_flags[0]} ({given.global_batch}) of {sizes[0]} ranks is no whole number on {size}: "
                f"use {batch_flag} with a multiple of {sizes[0]}"
            )
        run_dir = settings.runs / f"{name}-{size:03d}"
        # Every step is written, so that the report sees their spread; a flag of the user's comes later and wins.
        words = (given.recipe, "--log.interval-steps", "1", *flags, batch_flag, str(batch), "--run.dir", str(run_dir))
        members.append(Member(size, words, parse(words, PROGRAM)))
    return members


def check(members: Sequence[Member], settings: Settings) -> None:
    """Check what can be known beforehand about every size. Raises: ValueError naming the size."""
    for first in (True, False):  # the quick checks of all sizes come before data is looked at (or rendered)
        for member in members:
            config, size = member.config, member.world_size
            try:
                data_size = check_ranks(config, size)
                if settings.submit:
                    nodes_of(size, settings.gpus_per_node)  # data and kernels are the compute nodes' to check
                elif not first:
                    check_here(with_data(config), size, data_size)
            except ValueError as error:
                raise ValueError(f"with {size} rank{'s' if size > 1 else ''}: {error}") from error


def check_here(config: Config, world_size: int, data_size: int) -> None:
    """Data, weights and devices of this machine. Raises: ValueError."""
    with bulk_import():  # not at the top: what can be checked without torch is checked first
        import torch

        from himix_megatron.training.data_setup import prepare_inputs
        from himix_megatron.training.resume import expected_checkpoint

    if (gpus := torch.cuda.device_count()) and world_size > gpus:
        raise ValueError(f"this machine has {gpus} GPUs: leave that size out, or use --submit on a cluster")
    # A run that stopped on purpose says so itself when its turn comes.
    inputs = prepare_inputs(dataclasses.replace(config, run=dataclasses.replace(config.run, ignore_stop_file=True)), data_size)
    expected_checkpoint(config, inputs.plan)


def nodes_of(world_size: int, gpus_per_node: int) -> tuple[int, int]:
    """Nodes, and GPUs on each. Raises: ValueError for a size that leaves a part of a node over."""
    if world_size <= gpus_per_node:
        return 1, world_size
    if world_size % gpus_per_node:
        raise ValueError(f"{world_size} GPUs are no whole number of nodes of {gpus_per_node}: change it, or --gpus-per-node")
    return world_size // gpus_per_node, gpus_per_node


# ---- here ----------------------------------------------------------------------------------------------------------


def run(series: Series, members: Sequence[Member]) -> int:
    """Run one size after the other on this machine. Returns: the exit code."""
    request = StopRequest(COMMAND_STOP_SIGNALS, on_request=lambda _: None)  # `watch` sees it, and lets the ranks save first
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for one rank too: sizes are to be compared
    unfinished: list[str] = []
    for number, member in enumerate(members, 1):
        title = f"[{number}/{len(members)}] {member}"
        if member.finished:
            print(f"{title}: has finished before", flush=True)
            series.note(member, state="finished")
        elif outcome := run_one(series, member, title, request):
            unfinished.append(f"{title}: {outcome}")
        if request.received:
            print(f"stop requested ({request.received}): the same command continues the series", flush=True)
            return EXIT_REQUEUE
    for line in unfinished:
        print(f"not finished: {line}", flush=True)
    print(f"report: python -m tools.scaling_report {series.folder}", flush=True)
    return 1 if unfinished else 0


def run_one(series: Series, member: Member, title: str, request: StopRequest) -> str | None:
    """Run one size from start to end. Returns: None if it has finished, else the outcome."""
    command = [sys.executable, "-m", "pipelines.pretrain", *member.words]
    output = series.folder / f"output-{member.world_size:03d}.txt"
    print(f"{title}: {member.config.run_dir} (what its ranks print: {output})", flush=True)
    series.note(member, state="running", cpus=len(os.sched_getaffinity(0)), command=shlex.join(["python", *command[1:]]))
    started, progress = time.monotonic(), Progress(title, member.config.run_dir)

    def watch() -> bool:
        progress.show()
        return request.received is not None

    ending = run_ranks(command, member.world_size, watch, output)
    seconds = time.monotonic() - started
    outcome = None if ending.code == 0 and member.finished else str(ending)
    series.note(member, state=outcome or "finished", exit_code=ending.code, seconds=round(seconds, 1))
    progress.end(f"{title}: {outcome or 'finished'} after {seconds:.0f} s")
    return outcome and f"{outcome} (see {output})"


class Progress:
    """How far a run is, from its status.json: one line that is rewritten on a terminal, elsewhere one every 30 s."""

    def __init__(self, title: str, run_dir: Path):
        self.title, self.run_dir, self.started_at = title, run_dir, time.time()
        self.is_terminal = sys.stdout.isatty()
        self.interval_seconds = 1.0 if self.is_terminal else 30.0
        self.next = time.monotonic() + self.interval_seconds

    def show(self) -> None:
        """Print if it is time to."""
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + self.interval_seconds
            line = f"{self.title}: {self._progress()}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}" if self.is_terminal else line, end="" if self.is_terminal else "\n", flush=True)

    def _progress(self) -> str:
        status = followed_status(self.run_dir)
        if status is None or status.started_at < self.started_at or not status.step:  # of an earlier launch, or no step yet
            return "starting"
        rate = "" if status.step_seconds is None else f"  {status.step_seconds:.3f} s/step"
        loss = "" if status.loss is None else f"  loss {status.loss:.6f}"
        return f"step {status.step}/{status.planned_steps}{loss}{rate}"

    def end(self, line: str) -> None:
        """Print the last line of this run."""
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line:<{width}}" if self.is_terminal else line, flush=True)


# ---- on a cluster --------------------------------------------------------------------------------------------------


def submit(settings: Settings, series: Series, members: Sequence[Member]) -> int:
    """Submit one job per size, with nodes and GPUs computed. Returns: the exit code."""
    check_sbatch(BATCH_SCRIPT)
    failed = 0
    for number, member in enumerate(members, 1):
        title = f"[{number}/{len(members)}] {member}"
        if member.finished:
            print(f"{title}: has finished before", flush=True)
            series.note(member, state="finished")
        elif job := waiting_job(series.known(member)):
            print(f"{title}: job {job} waits or runs", flush=True)
        else:
            failed += not submit_one(settings, series, member, title)
    print(f"report, once they run: python -m tools.scaling_report {series.folder}", flush=True)
    return 1 if failed else 0


def check_sbatch(script: Path) -> None:
    """Raises: ValueError if a batch script cannot be submitted from here."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not installed here: leave --submit out to run on this machine, or go to a login node")
    if not script.is_file():
        raise ValueError(f"{script} is not here: submit from the root of himix-megatron")


def submit_one(settings: Settings, series: Series, member: Member, title: str) -> bool:
    """Whether sbatch took it."""
    nodes, gpus = nodes_of(member.world_size, settings.gpus_per_node)
    series.folder.mkdir(parents=True, exist_ok=True)
    command = [
        "sbatch", "--parsable", "--job-name", member.config.run_dir.name, "--nodes", str(nodes), "--ntasks-per-node", str(gpus),
        "--gpus-per-node", str(gpus), "--output", str(series.folder / f"output-{member.world_size:03d}.txt"),
        *shlex.split(settings.sbatch), str(BATCH_SCRIPT), *member.words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{title}: sbatch refused: {' '.join(done.stderr.split())}", flush=True)
        series.note(member, state=f"refused: {' '.join(done.stderr.split())}")
        return False
    job = done.stdout.strip().split(";")[0]
    print(f"{title}: {nodes} node{'s' if nodes > 1 else ''} x {gpus} GPUs, job {job}", flush=True)
    series.note(member, state="submitted", job=job, command=shlex.join(command))
    return True


def waiting_job(known: dict[str, Any]) -> str | None:
    """The job of an earlier submission, if Slurm still has it waiting or running."""
    if "job" not in known:
        return None
    command = ["squeue", "--noheader", "--jobs", known["job"], "--format", "%T"]
    reply = subprocess.run(command, capture_output=True, text=True, check=False)
    return str(known["job"]) if reply.stdout.strip() else None


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else shlex.join(value) or "none"


if __name__ == "__main__":
    run_main(main)
