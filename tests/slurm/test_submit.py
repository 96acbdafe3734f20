"""`python -m slurm.submit`: what it writes, what it refuses, and how it runs a chain without Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from himix_megatron.checkpoint.manifest import Description, Position, sync_and_digest, write_manifest
from himix_megatron.data.loading.plan import START
from pipelines.cli import run_main
from pipelines.recipes import tiny_align
from slurm import submit
from slurm.job import Cluster, Stage
from slurm.submit import Settings, read, script, sweep

from .cluster import ROOT, Slurm, steps_taken

LINE = re.compile(r"error: [^\n]+\n")


@pytest.fixture
def places(mixed_dataset: Path, tmp_path: Path) -> dict[str, str]:
    """Words that stand for folders in the tables below."""
    for name in ("EMPTY", "STOPPED", "OTHER"):
        (tmp_path / name).mkdir()
    (tmp_path / "FILE").write_text("no folder")
    (tmp_path / "STOPPED" / "STOP").write_text("too many bad samples\n")
    checkpoint = tmp_path / "OTHER" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    position = Position(step=1, place=START, data={})
    description = Description(
        position=position,
        parts=(),
        architecture={"model.num_layers": 7},
        distributed_optimizer=False,
        tower=None,
        validation_loss=None,
    )
    (checkpoint / "himix.json").write_text(json.dumps(asdict(description)))
    write_manifest(checkpoint, sync_and_digest(checkpoint, ["himix.json"]))
    names = ("EMPTY", "STOPPED", "OTHER", "FILE", "MARK", "A", "B", "GONE")
    return {"DATA": str(mixed_dataset)} | {name: str(tmp_path / name) for name in names}


def words_of(text: str, places: dict[str, str]) -> list[str]:
    """A table's entry as words; `_` stands for a space within one, capitals for folders."""
    pattern = re.compile("|".join(rf"\b{name}\b" for name in sorted(places, key=len, reverse=True)))
    return [pattern.sub(lambda found: places[found.group()], word.replace("␠", " ")) for word in text.split(" ")]


def refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], conf: str = os.devnull
) -> str:
    """The one line that a mistake is answered with. `conf`: the cluster; usually there is none to submit to."""
    monkeypatch.setattr(sys, "argv", ["submit", *words])
    monkeypatch.setenv("SLURM_CONF", conf)
    with pytest.raises(SystemExit) as stopped:
        run_main(submit.main)
    shown = capsys.readouterr()
    assert stopped.value.code == 2, shown
    assert LINE.fullmatch(shown.err), shown.err
    assert not shown.out
    return shown.err


SAID = {
    "": "no family given",
    "--watch": "no family given",
    "tinny": "unknown family tinny: did you mean tiny?",
    "tiny_align": "unknown family tiny_align: did you mean tiny?",
    "../tiny": "unknown family",
    "$(touch␠MARK)": "unknown family",
    "tiny instruct": "'instruct' belongs to no setting",
    "tiny --stages": "--stages",
    "tiny --stages instruct align": "--stages is instruct align: wanted align, instruct, or both in this order",
    "tiny --stages align align": "--stages is align align",
    "tiny --stages pretrain": "--stages",
    "tiny --stages instruct --align.train.steps 2": "--align.train.steps is given, but --stages has no align",
    "tiny --wach": "unknown setting --wach: did you mean --watch?",
    "tiny --cluster.node 2": "unknown setting --cluster.node: did you mean --cluster.nodes?",
    "tiny --align.train.step 2": "align: unknown setting --train.step: did you mean --train.steps?",
    "tiny --instruct.train.steps many": "instruct: --train.steps is 'many'",
    "tiny --train.steps -1": "align: train.steps is -1: wanted 1 or more",
    "tiny --watch --cancel": "--watch and --cancel exclude each other",
    "tiny --dry-run --cancel": "--cancel and --dry-run exclude each other",
    "tiny --executor ssh": "--executor is 'ssh': wanted one of slurm, local",
    "tiny --executor local --cancel": "--cancel with --executor local",
    "tiny --executor local --cluster.nodes 2": "--cluster.nodes is for Slurm",
    "tiny --executor local --cluster.partition gpu": "--cluster.partition is for Slurm",
    "tiny --cluster.partition a;touch␠MARK": "cluster.partition is 'a;touch ",
    "tiny --cluster.partition $(touch␠MARK)": "cluster.partition is '$(touch ",
    "tiny --cluster.partition a\n#SBATCH␠--uid=0": r"cluster.partition is 'a\n#SBATCH --uid=0'",
    "tiny --cluster.partition ␠": "cluster.partition is ' '",
    "tiny --cluster.partition=--uid=0": "cluster.partition is '--uid=0'",
    "tiny --cluster.account `touch␠MARK`": "cluster.account is '`touch ",
    "tiny --cluster.qos a␠b": "cluster.qos is 'a b'",
    "tiny --cluster.constraint a'b": "cluster.constraint is",
    "tiny --cluster.nodes 0": "cluster.nodes is 0: wanted 1 to 65536",
    "tiny --cluster.nodes -3": "cluster.nodes is -3",
    "tiny --cluster.nodes 1e9": "--cluster.nodes is '1e9': wanted a whole number",
    "tiny --cluster.nodes 99999999": "cluster.nodes is 99999999",
    "tiny --cluster.gpus-per-node -1": "cluster.gpus_per_node is -1",
    "tiny --cluster.gpus-per-node 4 --cluster.tasks-per-node 2": "each rank takes one GPU",
    "tiny --cluster.cpus-per-task 0": "cluster.cpus_per_task is 0",
    "tiny --cluster.memory-gib 0": "cluster.memory_gib is 0",
    "tiny --cluster.time-limit-minutes 0": "cluster.time_limit_minutes is 0",
    "tiny --cluster.time-limit-minutes 1": "leaves nothing of cluster.time_limit_minutes (1)",
    "tiny --cluster.save-seconds -5": "cluster.save_seconds is -5",
    "tiny --run.dir A": "both stages would use the run folder",
    "tiny --align.run.dir A --instruct.run.dir A/x/..": "both stages would use the run folder",
    "tiny --instruct.parallel.tensor 4": "instruct: model.num_query_groups (2) does not divide over parallel.tensor (4)",
}
"""What the words alone say. `␠`: a space within a word."""

LOOKED_UP = {
    "--data.datasets EMPTY": "align: EMPTY is not a shard dataset (no manifest.json)",
    "--instruct.data.datasets GONE": "instruct: GONE is not a shard dataset",
    "--data.datasets FILE": "align: FILE is not a shard dataset",
    "--align.run.dir STOPPED": "align: STOPPED/STOP says: too many bad samples",
    "--align.checkpoint.init-from EMPTY": "align: EMPTY holds no checkpoint",
    "--align.checkpoint.init-from OTHER": "align: checkpoint OTHER/checkpoints/step-00000001 is of another architecture",
    "--stages instruct --checkpoint.init-from GONE": "instruct: GONE holds no checkpoint",
    "--instruct.model.ffn-hidden-size 256": "instruct: model.ffn_hidden_size is 256, but 384 in align, whose weights it starts",
    "--cluster.nodes 2 --instruct.parallel.tensor 2 --instruct.parallel.pipeline 2": "instruct: 2 ranks (cluster.nodes x",
    "--cluster.tasks-per-node 3": "align: train.global_batch_samples (8) is not a multiple of 3 data-parallel ranks",
    "--align.run.dir A%j": "align: the run folder 'A%j' has '%' in its name",
    '--instruct.run.dir A"b': "instruct: the run folder",
    "--align.run.dir A\nb": "align: the run folder",
    "--instruct.data.tokenizer EMPTY": "instruct: data.tokenizer is EMPTY",
}
"""What takes a look at data, checkpoints and folders."""


@pytest.mark.parametrize("text", SAID)
def test_a_mistake_in_the_words_is_one_line(
    text: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(words_of(text, places) if text else [], monkeypatch, capsys)
    assert SAID[text] in said, said
    assert not Path(places["MARK"]).exists()
    assert not Path(places["A"]).exists()


@pytest.mark.parametrize("text", LOOKED_UP)
def test_a_mistake_in_what_the_words_name_is_one_line(
    text: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = f"tiny --dry-run --data.datasets DATA --train.global-batch-samples 8 --train.micro-batch-samples 2 {text}"
    said = refused(
        words_of(usual, places)
        + [f"--align.run.dir={tmp_path}/align"] * ("align.run.dir" not in text and "--stages" not in text),
        monkeypatch,
        capsys,
    )
    wanted = words_of(LOOKED_UP[text].replace(" ", "␠"), places)[0]
    assert wanted in said, said
    assert not (tmp_path / "align").exists()


def test_mistakes_that_are_refused_are_many() -> None:
    assert len(SAID) + len(LOOKED_UP) >= 50


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--cluster.partition nowhere", "align: Slurm refuses: .*[Ii]nvalid partition"),
        ("--cluster.nodes 3", "align: Slurm refuses: .*not available"),
        ("--cluster.gpus-per-node 3", "align: Slurm refuses: .*not available"),
        ("--cluster.memory-gib 999999", "align: Slurm refuses: .*not available"),
        ("--cluster.constraint h100", "align: Slurm refuses: .*feature"),
        ("--cluster.tasks-per-node 1024 --train.global-batch-samples 2048", "align: Slurm refuses: .*not available"),
    ],
)
def test_what_the_cluster_can_never_run_is_refused_before_anything_is_submitted(
    text: str,
    named: str,
    slurm: Slurm,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = "tiny --data.datasets DATA --align.run.dir A --instruct.run.dir B --train.global-batch-samples 24 "
    said = refused(
        words_of(usual + "--train.micro-batch-samples 2 " + text, places), monkeypatch, capsys, slurm.environment["SLURM_CONF"]
    )
    assert re.search(named, said), said
    assert not slurm.run("squeue", "-h").stdout
    assert not Path(places["A"]).exists()


def stage(run: Path, *words: str) -> Stage:
    config = tiny_align()
    return Stage(name="align", words=("tiny_align", *words), config=replace(config, run=replace(config.run, dir=str(run))))


def test_the_batch_script_holds_what_was_asked_for_and_no_word_of_the_training(tmp_path: Path) -> None:
    cluster = Cluster(
        partition="gpu,long", nodes=3, gpus_per_node=8, cpus_per_task=12, memory_gib=900, time_limit_minutes=720,
        save_seconds=120, account="lab", qos="high", constraint="a100|h100",
    )  # fmt: skip
    text = script(Settings(cluster=cluster), stage(tmp_path / "run", "--data.datasets", "$(touch x); `touch y`"), "77")
    for line in (
        *("--partition=gpu,long", "--nodes=3", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12"),
        *("--mem=900G", "--time=720", "--signal=USR1@120", "--account=lab", "--qos=high", "--constraint='a100|h100'"),
        *("--requeue", "--open-mode=append", "--dependency=afterok:77", "--kill-on-invalid-dep=yes"),
    ):
        assert f"\n#SBATCH {line}\n" in text, line
    assert "touch" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_jobs_run_in_the_environment_that_submits_them_or_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = stage(tmp_path / "run")
    monkeypatch.delenv("HIMIX_VENV", raising=False)
    monkeypatch.delenv("HIMIX_CONTAINER", raising=False)
    assert f"\nexport HIMIX_VENV={sys.prefix}\nsource slurm/environment.sh\n" in script(Settings(), one, None)
    (tmp_path / "a b" / "bin").mkdir(parents=True)
    (tmp_path / "a b" / "bin" / "activate").touch()
    monkeypatch.setenv("HIMIX_VENV", str(tmp_path / "a b"))
    assert f"\nexport HIMIX_VENV='{tmp_path}/a b'\n" in script(Settings(), one, None)
    monkeypatch.setenv("HIMIX_VENV", str(tmp_path))
    with pytest.raises(ValueError, match="is no virtual environment: run this with "):
        script(Settings(), one, None)
    monkeypatch.setenv("HIMIX_CONTAINER", "image.sif")
    assert "HIMIX_VENV" not in script(Settings(), one, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not the root of himix-megatron, in which jobs start: submit from there"):
        script(Settings(), one, None)


def test_what_all_stages_start_from_is_for_the_first_only() -> None:
    words = ["tiny", "--checkpoint.init-from", "converted", "--train.steps", "7", "--instruct.train.steps=9"]
    _, (align, instruct) = read(words)
    assert (align.config.checkpoint.init_from, align.config.train.steps) == ("converted", 7)
    assert (instruct.config.checkpoint.init_from, instruct.config.train.steps) == ("runs/tiny_align", 9)
    _, (align, instruct) = read([*words, "--align.run.dir", "else/where"])
    assert (align.config.run_dir, instruct.config.checkpoint.init_from) == (Path("else/where"), "else/where")
    _, (_, instruct) = read([*words, "--instruct.checkpoint.init-from", "mine"])
    assert instruct.config.checkpoint.init_from == "mine"
    _, (alone,) = read([*words, "--stages", "instruct"])
    assert alone.config.checkpoint.init_from == "converted"


def test_stale_save_files_are_swept_and_what_jobs_printed_stays(tmp_path: Path) -> None:
    """Slurm gives ids out again: job 7 of another day must not be what job 7 of today runs."""
    one = stage(tmp_path / "run")
    one.folder.mkdir(parents=True)
    names = ["7_submitted.pkl", "7_0_result.pkl", "7_submission.sh", f"{'ab' * 16}.pkl", "7_0_log.out", "notes.txt"]
    for name in names:
        (one.folder / name).write_text("old")
    (one.folder / f".submission_file_{'cd' * 16}.sh").symlink_to(one.folder / "7_submission.sh")
    sweep(one)
    assert sorted(file.name for file in one.folder.iterdir()) == ["7_0_log.out", "notes.txt"]


def command(places: dict[str, str], run: Path, *words: str, steps: int = 12) -> list[str]:
    """A small chain's command line."""
    return [
        sys.executable, "-m", "slurm.submit", "tiny", "--data.datasets", places["DATA"], "--train.steps", str(steps),
        "--train.global-batch-samples", "4", "--train.micro-batch-samples", "2", "--log.interval-steps", "1", "--log.ledger",
        "--align.run.dir", str(run / "align"), "--instruct.run.dir", str(run / "instruct"),
        "--parallel.timeout-seconds", "60", *words,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "HIMIX_"))}


def test_a_dry_run_prints_both_batch_scripts_and_leaves_nothing(places: dict[str, str], tmp_path: Path) -> None:
    words = command(places, tmp_path / "runs", "--cluster.nodes", "2", "--dry-run")
    # Where no Slurm is installed as well.
    env = environment() | {"PATH": str(tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 2
    assert "--dependency=afterok:JOB_OF_ALIGN" in done.stdout
    assert f"--checkpoint.init-from {tmp_path}/runs/align" in done.stdout
    assert not (tmp_path / "runs").exists()


class Locally:
    """`--executor local` in the background, and its ranks."""

    def __init__(self, places: dict[str, str], run: Path, *words: str, steps: int = 12):
        self.run = run
        line = command(places, run, "--executor", "local", *words, steps=steps)
        self.process = subprocess.Popen(
            line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ranks(self, stage: str, step: int) -> list[psutil.Process]:
        """Once a stage has logged a step: the processes that train."""
        log, deadline = self.run / stage / "log" / "rank-000.log", time.monotonic() + 180
        while not (log.is_file() and f" step {step}/" in log.read_text()):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = psutil.Process(self.process.pid).children()
        return sorted((child for child in children if "pipelines.pretrain" in child.cmdline()), key=lambda child: child.pid)

    def end(self) -> tuple[int, str]:
        """Exit code, and what it said."""
        said, _ = self.process.communicate(timeout=240)
        return self.process.returncode, said


def test_a_local_chain_starts_a_stage_again_that_was_asked_to_save(places: dict[str, str], tmp_path: Path) -> None:
    local = Locally(places, tmp_path, steps=30)
    (rank,) = local.ranks("align", 3)
    rank.send_signal(signal.SIGUSR1)
    code, said = local.end()
    assert code == 0, said
    assert "align saved and is started again" in said
    for name in ("align", "instruct"):
        assert steps_taken(tmp_path / name) == list(range(1, 31))
        assert f"{name} has finished" in said
    assert "weights from" in (tmp_path / "instruct" / "log" / "rank-000.log").read_text()


@pytest.mark.campaign
def test_a_local_rank_that_is_killed_ends_the_others_and_the_chain(places: dict[str, str], tmp_path: Path) -> None:
    local = Locally(places, tmp_path, "--cluster.tasks-per-node", "2", steps=100_000)
    ranks = local.ranks("align", 2)
    assert len(ranks) == 2
    ranks[1].kill()
    code, said = local.end()
    assert code not in (0, 2, 85), said
    assert "instruct not started" in said
    assert not any(rank.is_running() for rank in ranks)
    assert not (tmp_path / "instruct").exists()


@pytest.mark.campaign
def test_a_local_chain_that_is_told_to_stop_saves_and_goes_on_later(places: dict[str, str], tmp_path: Path) -> None:
    local = Locally(places, tmp_path, "--cluster.tasks-per-node", "2", steps=300)
    local.ranks("align", 5)
    local.process.send_signal(signal.SIGINT)
    code, said = local.end()
    assert code == 85, said
    assert "align saved: the same command goes on from here; instruct not started" in said
    code, said = Locally(places, tmp_path, "--cluster.tasks-per-node", "2", steps=300).end()
    assert code == 0, said
    assert steps_taken(tmp_path / "align") == list(range(1, 301))
