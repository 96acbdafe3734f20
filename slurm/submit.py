"""Submit the stages of a family to Slurm as one chain: align, then instruct when align has finished.

    python -m slurm.submit tiny --cluster.nodes 2 --cluster.tasks-per-node 2 --watch
    python -m slurm.submit qwen2_0_5b --stages align instruct --cluster.partition gpu --cluster.nodes 2 \\
        --cluster.gpus-per-node 8 --cluster.time-limit-minutes 720 --checkpoint.init-from models/qwen2_0_5b-converted \\
        --align.data.datasets data/llava-558k --instruct.data.datasets data/mix-665k

The first word is the family; its recipes are FAMILY_align and FAMILY_instruct. Every field of a recipe can be set: for all
stages (--train.steps 100), or for one (--instruct.train.steps 100). The fields are listed by
`python -m pipelines.pretrain tiny_align --help`.

  align     starts from --checkpoint.init-from: a converted language model (none for tiny). Reads --align.data.datasets.
  instruct  starts from align's run folder, unless --instruct.checkpoint.init-from says otherwise. Reads
            --instruct.data.datasets.

Everything is checked before anything is submitted: settings, layout, data, checkpoints, and whether the cluster can ever run
such a job. Each stage has its run folder, runs/FAMILY_STAGE (--align.run.dir and --instruct.run.dir change that), and what the
jobs print is under RUN/slurm. A job that is preempted or reaches its time limit saves, is requeued, and loses no step. If
align fails, instruct is removed from the queue. The same command continues the same runs.

    ... --dry-run          print the batch scripts; submit nothing
    ... --watch            submit, and follow state, step, loss and remaining time; a chain that is in the queue is only
                           followed (Ctrl-C ends the watching, not the jobs). Exits with the chain's code.
    ... --cancel           cancel the chain's jobs, running or not
    ... --executor local   without Slurm: run the stages in turn on this machine, with --cluster.tasks-per-node ranks

Exit codes: 0 submitted, or (--watch, local) all stages have finished; 2 a mistake, nothing submitted; else the failing stage's.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from himix_megatron.config import Config, check_ranks
from himix_megatron.runtime import log
from himix_megatron.runtime.process import bulk_import
from himix_megatron.runtime.stop_signals import COMMAND_STOP_SIGNALS, StopRequest
from pipelines.cli import parse, parse_settings, run_main
from pipelines.flags import flag, split_flags
from pipelines.launchers.local_ranks import run_chain
from pipelines.recipes import RECIPES
from slurm import scheduler
from slurm.follow import watch
from slurm.job import PYTHON, Cluster, Stage, StageName, Training, sbatch_parameters, training_command

logger = logging.getLogger(__name__)

PROGRAM = "python -m slurm.submit FAMILY"
STAGES: tuple[StageName, ...] = get_args(StageName)
FAMILIES = [name.removesuffix("_align") for name in RECIPES if name.endswith("_align")]
CANCEL_SECONDS = 90.0
"""Most that a cancelled job may take to save and leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of the submission itself."""

    stages: tuple[StageName, ...] = STAGES
    """Stages to run, in this order."""
    cluster: Cluster = field(default_factory=Cluster)
    executor: Literal["slurm", "local"] = "slurm"
    """`local`: run the stages on this machine, without Slurm."""
    watch: bool = False
    """Follow the jobs until they end."""
    cancel: bool = False
    """Cancel the jobs."""
    dry_run: bool = False
    """Print what would be submitted."""

    def __post_init__(self) -> None:
        if list(self.stages) != [name for name in STAGES if name in self.stages] or not self.stages:
            raise ValueError(f"--stages is {' '.join(self.stages) or 'empty'}: wanted align, instruct, or both in this order")
        chosen = [name for name in ("watch", "cancel", "dry_run") if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"--{' and --'.join(chosen).replace('_', '-')} exclude each other: choose one")
        if self.executor == "local":
            self._check_local()

    def _check_local(self) -> None:
        if self.cancel:
            raise ValueError(
                "--cancel with --executor local: the stages run in that command's terminal, Ctrl-C there ends them"
            )
        for item in dataclasses.fields(Cluster):
            if item.name not in ("gpus_per_node", "tasks_per_node") and getattr(self.cluster, item.name) != item.default:
                flag = item.name.replace("_", "-")
                raise ValueError(f"--cluster.{flag} is for Slurm: --executor local runs on this machine as it is, leave it out")


def main() -> int:
    """The command line. Returns: the exit code."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print((__doc__ or "").rstrip(), f"Families: {', '.join(FAMILIES)}.\n", sep="\n\n", flush=True)
        parse_settings(Settings, ["--help"], PROGRAM)
    log.start()
    settings, stages = read(words)
    if settings.executor == "local":
        return run_here(settings, stages)
    if settings.dry_run:
        return dry_run(settings, stages)
    scheduler.check_here()
    if settings.cancel:
        return cancel(stages)
    chain = waiting(stages, settings) or submit(settings, stages)
    if not settings.watch:
        print("the same command with --watch follows them, with --cancel it ends them")
        return 0
    try:
        return watch(chain)
    except KeyboardInterrupt:
        print("\nthe jobs continue: --watch follows them again, --cancel ends them")
        return 0


# ---- words -> stages -------------------------------------------------------------------------------------------------


def read(words: Sequence[str]) -> tuple[Settings, list[Stage]]:
    """`FAMILY --cluster... --section.field value ...` as settings of the submission and stages.

    Raises: ValueError (one line) for whatever can be seen without looking at data, checkpoints or cluster.
    """
    if not words or words[0].startswith("-"):
        raise ValueError(f"no family given: use {PROGRAM} ..., with FAMILY one of {', '.join(FAMILIES)}")
    family = words[0] if ":" in words[0] else words[0].replace("-", "_")
    if ":" not in family and family not in FAMILIES:
        near = difflib.get_close_matches(family.lower(), FAMILIES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown family {words[0]}: {hint}There are {', '.join(FAMILIES)}")
    own, shared, of_stage = split(words[1:])
    settings = parse_settings(Settings, own, PROGRAM)
    for name in STAGES:
        if of_stage[name] and name not in settings.stages:
            raise ValueError(f"--{name}.{of_stage[name][0][2:]} is given, but --stages has no {name}")
    stages: list[Stage] = []
    for name in settings.stages:
        # What all stages start from is for the first: the next one starts from the one before it.
        initial = ["--checkpoint.init-from", str(stages[-1].config.run_dir)] if stages else []
        line = [f"{family}_{name}", *shared, *initial, *of_stage[name]]
        try:
            stages.append(Stage(name=name, words=tuple(line), config=parse(line)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if len({stage.run_dir for stage in stages}) < len(stages):
        raise ValueError(
            f"both stages would use the run folder {stages[0].config.run_dir}: give --align.run.dir and --instruct.run.dir"
        )
    return settings, stages


def split(words: Sequence[str]) -> tuple[list[str], list[str], dict[StageName, list[str]]]:
    """Flags with their values: of the submission, of every stage, of one stage (its name taken off)."""
    sections = [item.name for item in dataclasses.fields(Config) if item.name != "recipe"]
    ours = [item.name for item in dataclasses.fields(Settings)]

    def group(name: str) -> str:
        section = name.split(".")[0]
        if not name or (section in STAGES and "." in name):
            return section
        if section.removeprefix("no_") in ours:
            return "own"
        if section in sections:
            return "shared"
        near = difflib.get_close_matches(section, [*ours, *sections, *STAGES], n=1, cutoff=0.5)
        hint = f"did you mean {flag(near[0])}?" if near else "it belongs to no section"
        raise ValueError(f"unknown setting {flag(name)}: {hint} ({PROGRAM} --help)")

    found = split_flags(words, group)
    if "" in found:
        raise ValueError(f"{found[''][0]!r} belongs to no setting: after the family come --name value ...")
    of_stage = {name: [re.sub(rf"^--{name}\.", "--", word) for word in found.get(name, [])] for name in STAGES}
    return found.get("own", []), found.get("shared", []), of_stage


# ---- checks that look at data, checkpoints and cluster -----------------------------------------------------------------


def check(settings: Settings, stages: Sequence[Stage]) -> None:
    """Raises: ValueError for what would end a stage's job before its first step."""
    before: Stage | None = None
    for stage in stages:
        try:
            check_stage(stage, settings.cluster.ranks, before)
        except ValueError as error:
            raise ValueError(f"{stage.name}: {error}") from error
        before = stage


def check_stage(stage: Stage, ranks: int, before: Stage | None) -> None:
    """What the job itself would check, but for the GPUs and kernels of its nodes. Raises: ValueError."""
    parallel = stage.config.parallel
    if ranks % (parallel.tensor * parallel.pipeline):
        raise ValueError(
            f"{ranks} rank{'s' if ranks > 1 else ''} (cluster.nodes x gpus_per_node or tasks_per_node) cannot hold "
            f"parallel.tensor ({parallel.tensor}) x parallel.pipeline ({parallel.pipeline}): "
            f"use a multiple of {parallel.tensor * parallel.pipeline}"
        )
    data_size = check_ranks(stage.config, ranks)
    with bulk_import():  # torch takes seconds: after the cheap checks
        from himix_megatron.checkpoint.description import architecture
        from himix_megatron.checkpoint.manifest import complete_checkpoints
        from himix_megatron.training.data_setup import prepare_inputs
        from himix_megatron.training.resume import expected_checkpoint
        from pipelines.pretrain import with_data

    config = with_data(stage.config)
    config = replace(
        config,
        model=replace(config.model, layer_spec="torch", attention_core="auto"),
        train=replace(config.train, fp8="none", cuda_graphs="off"),
    )  # the nodes' matter
    if before is not None and config.checkpoint.init_from == str(before.config.run_dir):
        old, new = architecture(before.config), architecture(config)
        differs = [name for name in new if old[name] != new[name]]
        if differs:
            name = differs[0]
            raise ValueError(f"{name} is {new[name]}, but {old[name]} in {before.name}, whose weights it starts from")
        if not complete_checkpoints(before.config.run_dir):
            config = replace(config, checkpoint=replace(config.checkpoint, init_from=None))
    expected_checkpoint(config, prepare_inputs(config, data_size).plan)


def waiting(stages: Sequence[Stage], settings: Settings) -> list[tuple[Stage, str]]:
    """The chain's jobs that are in the queue. Raises: ValueError if there are any and they are not to be watched."""
    found = [(stage, job) for stage in stages for job in scheduler.jobs_of(stage.folder)]
    if found and not settings.watch:
        stage, job = found[0]
        raise ValueError(
            f"job {job.job_id} ({job.state.lower()}) has the run folder {stage.config.run_dir}: "
            "the same command with --watch follows it, with --cancel it ends it"
        )
    for stage, job in found:
        print(f"{stage.name} is in the queue as job {job.job_id}, with the settings that it was submitted with")
    return [(stage, job.job_id) for stage, job in found]


# ---- what is done ----------------------------------------------------------------------------------------------------


def script(settings: Settings, stage: Stage, after: str | None) -> str:
    """The text of a stage's batch script, as submitit writes it."""
    from submitit.slurm.slurm import _make_sbatch_string  # SlurmExecutor's own; it wants Slurm installed, this does not

    command = f"{PYTHON} -u -m submitit.core._submit {shlex.quote(str(stage.folder))}"
    return _make_sbatch_string(command, stage.folder, **sbatch_parameters(stage, settings.cluster, after)) + "\n"


def dry_run(settings: Settings, stages: Sequence[Stage]) -> int:
    """Check all, print the batch scripts. Returns: 0."""
    for stage in stages:
        stage.check_folders()
    check(settings, stages)
    for number, stage in enumerate(stages):
        print(f"# ---- {stage.name}: each rank runs {shlex.join(training_command(stage.words))}")
        print(script(settings, stage, "JOB_OF_ALIGN" if number else None))
    return 0


def submit(settings: Settings, stages: Sequence[Stage]) -> list[tuple[Stage, str]]:
    """All stages, or none. Returns: each with its job id. Raises: ValueError for what cannot run."""
    for stage in stages:
        stage.check_folders()
    check(settings, stages)
    for stage in stages:
        scheduler.check_script(stage.name, script(settings, stage, None))
    chain: list[tuple[Stage, str]] = []
    for stage in stages:
        sweep(stage)
        try:
            job_id = submit_stage(settings, stage, chain[-1][1] if chain else None)
        except BaseException:  # Ctrl-C too: no half of a chain stays in the queue
            for _, earlier in reversed(chain):
                scheduler.cancel(earlier)
            raise
        chain.append((stage, job_id))
        after = f", after job {chain[-2][1]}" if len(chain) > 1 else ""
        print(f"{stage.name}: job {job_id}{after}; prints to {stage.output(job_id)}", flush=True)
    return chain


def submit_stage(settings: Settings, stage: Stage, after: str | None) -> str:
    """Returns: the job's id. Raises: ValueError if Slurm refuses it."""
    import submitit

    executor = submitit.SlurmExecutor(stage.folder, python=PYTHON)
    executor.update_parameters(**sbatch_parameters(stage, settings.cluster, after))
    ours = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    try:
        with submitit.helpers.clean_env():  # submitted from within a job: nothing of that one's
            os.environ.update(ours)
            job = executor.submit(Training(stage.words))
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"{stage.name}: Slurm refuses: {error}") from error
    return str(job.job_id)


def sweep(stage: Stage) -> None:
    """Remove the save files and scripts of jobs that have ended (none is in the queue now); what they printed stays.

    Slurm may give an id out again: a job of that id would find the old save file, and run what it says.
    """
    for pattern in ("*_submitted.pkl", "*_result.pkl", "*_submission.sh", ".submission_file_*.sh", "[0-9a-f]*.pkl"):
        for file in stage.folder.glob(pattern):
            file.unlink(missing_ok=True)


def cancel(stages: Sequence[Stage]) -> int:
    """Take the chain's jobs out of the queue, the last first, and wait until they have left. Returns: 0."""
    found = [(stage, job) for stage in reversed(stages) for job in scheduler.jobs_of(stage.folder)]
    if not found:
        print(f"no job in the queue has {' or '.join(str(stage.config.run_dir) for stage in stages)}")
    for stage, job in found:
        scheduler.cancel(job.job_id)
        print(f"{stage.name}: job {job.job_id} ({job.state.lower()}) cancelled", flush=True)
    deadline = time.monotonic() + CANCEL_SECONDS
    while any(scheduler.jobs_of(stage.folder) for stage, _ in found):
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {CANCEL_SECONDS:.0f} s a cancelled job is still there: scontrol show job says why")
        time.sleep(1.0)
    return 0


def run_here(settings: Settings, stages: Sequence[Stage]) -> int:
    """`--executor local`. Returns: the exit code."""
    request = StopRequest((*COMMAND_STOP_SIGNALS, signal.SIGHUP), on_request=lambda _: None)  # the running stage saves first
    check(settings, stages)
    if settings.dry_run:
        for stage in stages:
            print(f"{settings.cluster.ranks} x {shlex.join(training_command(stage.words))}")
        return 0
    chain = [(stage.name, stage.run_dir, training_command(stage.words)) for stage in stages]
    return run_chain(chain, settings.cluster.ranks, request)


if __name__ == "__main__":
    run_main(main)
