"""The batch scripts against hostile words, paths and environments: words arrive as they were written, a mistake is one line.

`srun`, `scontrol`, `apptainer` and `module` are small real programs here that record what they are called with, so that no
cluster is needed. What a test plants (`touch pwned`) must never run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import parse
from tests.support import ROOT

HOSTILE = [
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "a b  c",
    'it\'s "quoted" \\ twice',
    "line one\nline two; touch pwned",
    "*",
    "~/x",
    "${IFS}touch${IFS}pwned",
    "& touch pwned &",
    "> pwned",
    "| touch pwned",
    "%j %N %t",
    "",
    "Grüße 🦊",
    "a=b,c:d",
    "--",
    "!!",
]
RECORD = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if sys.argv[1:] == ["--help"]:
    print(os.environ.get("SRUN_HELP", ""))
if sys.argv[1:3] == ["show", "job"]:
    print("JobId=7 JobState=RUNNING", os.environ.get("JOB_SHOWN", ""), "WorkDir=/a")
sys.exit(int(os.environ.get(os.path.basename(sys.argv[0]).upper() + "_CODE", "0")))
"""


class Scripts:
    """A checkout (links to this one's code) in a folder of any name, and recorders in front of PATH."""

    def __init__(self, folder: Path, name: str = "checkout"):
        self.root, self.record = folder / name, folder / "record"
        self.root.mkdir()
        for link in ("himix_megatron", "pipelines", "slurm"):
            (self.root / link).symlink_to(ROOT / link)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program("srun")
        self.program("scontrol")
        environment = self.root / ".venv" / "bin"
        environment.mkdir(parents=True)
        (environment / "python").symlink_to(sys.executable)

    def program(self, name: str) -> None:
        """A recorder of this name."""
        (self.bin / name).write_text(RECORD.format(python=sys.executable))
        (self.bin / name).chmod(0o755)

    def run(
        self, *words: str, script: str = "pretrain_himix.sh", cwd: Path | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """The script as Slurm runs it: a copy elsewhere, in the folder it was submitted from."""
        copy = self.bin.parent / "slurm_script"
        copy.write_text((ROOT / "slurm" / script).read_text())
        environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.root),
            "RECORD": str(self.record),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "1",
        }
        return subprocess.run(
            ["bash", str(copy), *words],
            cwd=cwd or self.root,
            env={name: value for name, value in (environment | extra).items() if value != "UNSET"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    @property
    def calls(self) -> list[list[str]]:
        """What was called, with its arguments."""
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.is_file() else []

    def arguments(self) -> list[str]:
        """What the last step hands to the Python module."""
        call = next(call for call in reversed(self.calls) if call[0] == "srun" and "-m" in call)
        return call[call.index("-m") + 2 :]

    def nothing_ran(self) -> bool:
        """Neither a step nor what a test has planted."""
        return not [call for call in self.calls if call[1:] != ["--help"]] and not list(self.root.parent.rglob("pwned*"))


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


@pytest.mark.parametrize("word", HOSTILE)
@pytest.mark.parametrize("script", ["pretrain_himix.sh", "preprocess_ray.sh"])
def test_words_arrive_as_they_were_written(scripts: Scripts, script: str, word: str) -> None:
    done = scripts.run("tiny_align", "--run.dir", word, f"--data.datasets={word}", script=script)
    assert done.returncode == 0, done.stderr
    assert scripts.arguments() == ["tiny_align", "--run.dir", word, f"--data.datasets={word}"]
    assert not list(scripts.root.rglob("pwned*"))


@pytest.mark.parametrize("name", [word for word in HOSTILE if word and "/" not in word])
def test_a_checkout_may_have_any_name(tmp_path: Path, name: str) -> None:
    scripts = Scripts(tmp_path, name)
    done = scripts.run("tiny_align")
    assert done.returncode == 0, done.stderr
    assert scripts.arguments() == ["tiny_align"]
    assert str(scripts.root / ".venv" / "bin" / "python") in scripts.calls[-1]
    assert not list(tmp_path.rglob("pwned*"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_JOB_ID": "UNSET"}, "this is a batch script: start it with sbatch"),
        ({"SLURM_JOB_ID": "7; touch pwned"}, "this is a batch script"),
        ({"SLURM_JOB_ID": "$(touch pwned)"}, "this is a batch script"),
        ({"HIMIX_VENV": "/nowhere"}, "no environment in /nowhere: run 'make setup'"),
        ({"HIMIX_VENV": "$(touch pwned)"}, "no environment in $(touch pwned)"),
        ({"HIMIX_VENV": "a\nb; touch pwned"}, "no environment in a?b; touch pwned"),
        ({"HIMIX_VENV": "-rf"}, "no environment in -rf"),
        ({"HIMIX_MODULES": "cuda; touch pwned"}, "HIMIX_MODULES is 'cuda; touch pwned': wanted names of modules"),
        ({"HIMIX_MODULES": "$(touch pwned)"}, "wanted names of modules"),
        ({"HIMIX_MODULES": "cuda\ntouch pwned"}, "wanted names of modules"),
        ({"HIMIX_MODULES": "*"}, "wanted names of modules"),
        ({"HIMIX_MODULES": "cuda/12.8"}, "there is no command 'module'"),
        ({"HIMIX_SRUN": "touch pwned"}, "HIMIX_SRUN has 'touch': wanted options as --name=value"),
        ({"HIMIX_SRUN": "--mpi=none; touch pwned"}, "HIMIX_SRUN has 'touch'"),
        ({"HIMIX_SRUN": "--mpi=none -- bash"}, "HIMIX_SRUN has '--'"),
        ({"HIMIX_SRUN": "*"}, "HIMIX_SRUN has '*'"),
        ({"HIMIX_CONTAINER": "/nowhere/image.sif"}, "HIMIX_CONTAINER: there is no '/nowhere/image.sif'"),
        ({"HIMIX_CONTAINER": "$(touch pwned).sqsh"}, "HIMIX_CONTAINER: there is no '$(touch pwned).sqsh'"),
        ({"HIMIX_CONTAINER": "--help"}, "HIMIX_CONTAINER is '--help': wanted an image"),
        ({"HIMIX_CONTAINER": "docker://image"}, "no --container-image (pyxis) and apptainer is not installed"),
        ({"HIMIX_CONTAINER": "docker://image", "HIMIX_VENV": "/venv"}, "both set"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line_and_nothing_runs(
    scripts: Scripts, environment: dict[str, str], said: str
) -> None:
    for script in ("pretrain_himix.sh", "preprocess_ray.sh"):
        done = scripts.run("tiny_align", script=script, **environment)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
        assert scripts.nothing_ran()


@pytest.mark.parametrize("name", ["elsewhere", "a\nb; touch pwned"])
def test_submitted_from_elsewhere_is_one_line(scripts: Scripts, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    done = scripts.run("tiny_align", cwd=tmp_path / name)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not the root of himix-megatron: submit from there, or with sbatch --chdir" in done.stderr
    assert scripts.nothing_ran()


@pytest.mark.parametrize(
    "words",
    [["tiny_align; touch pwned"], ["$(touch pwned)"], [""], ["tiny_align\n"], ["../tiny_align"], ["*"], ["-"],
     ["tiny_align", "--train.steps", "$(touch pwned)"], ["tiny_align", "--train.steps", "1; touch pwned"],
     ["tiny_align", "--train.steps", "-1"], ["tiny_align", "--train.steps", "1e400"], ["tiny_align", "--train.steps"],
     ["tiny_align", "--;touch pwned"], ["tiny_align", "--run.dir"], ["tiny_align", "--parallel.tensor", "0x2"],
     ["tiny_align", "--train.precision", "`touch pwned`"], ["tiny_align", "touch", "pwned"],
     ["tiny_align", "--recipe", "x"], ["tiny_align", "--train.trainable-parts", "tower;touch pwned"], ["--train.steps", "5"]],
)  # fmt: skip
def test_hostile_settings_are_one_line(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r".") as mistake:
        parse(words)
    assert str(mistake.value).strip()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("step", "job"), [("0", 0), ("101", 1), ("102", 2), ("103", 3), ("84", 85), ("85", 85), ("137", 137), ("139", 139)]
)
def test_only_who_was_asked_to_stop_is_requeued(scripts: Scripts, step: str, job: int) -> None:
    done = scripts.run("tiny_align", SRUN_CODE=step)
    assert done.returncode == job
    requeued = ["scontrol", "requeue", "7"] in scripts.calls
    assert requeued == (job == 85)


@pytest.mark.parametrize("name", ["SLURM_JOB_NUM_NODES", "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE"])
@pytest.mark.parametrize("value", ["PATH[$(touch pwned)]", "a[`touch pwned`]", "08", "-1", "1 2", "1" * 30])
def test_numbers_of_slurm_are_numbers_before_bash_reckons_with_them(scripts: Scripts, name: str, value: str) -> None:
    numbers = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "64", "SRUN_CODE": "1"}
    for script in ("pretrain_himix.sh", "preprocess_ray.sh"):
        done = scripts.run("tiny_align", script=script, **numbers | {name: value})
        assert (done.returncode, scripts.nothing_ran()) == (2, True)
        assert done.stderr == f"error: {name} is '{value}': wanted a whole number, as Slurm sets it\n"


@pytest.mark.parametrize(
    ("shown", "count"),
    [("", 1), ("Comment=himix-unbegun-1", 2), ("Comment=himix-unbegun-08", None), ("Comment=himix-unbegun-" + "9" * 30, None),
     ("Comment=himix-unbegun-02", 3), ("Comment=mine", 0)],
)  # fmt: skip
def test_starts_without_a_step_are_counted_in_the_comment(scripts: Scripts, shown: str, count: int | None) -> None:
    """`count`: what the comment says afterwards; None: the job is not requeued, 0: the user's comment stays."""
    done = scripts.run("tiny_align", SRUN_CODE="84", JOB_SHOWN=shown)
    comments = [call[3] for call in scripts.calls if call[:2] == ["scontrol", "update"]]
    assert comments == ([f"Comment=himix-unbegun-{count}"] if count else [])
    assert (["scontrol", "requeue", "7"] in scripts.calls) == (count is not None)
    assert (done.returncode, len(done.stderr.splitlines())) == ((3, 1) if count is None else (85, 0)), done.stderr
    assert ("asked to stop before the first step" in done.stderr) == (count is None)


def test_a_step_taken_counts_from_the_beginning(scripts: Scripts) -> None:
    scripts.run("tiny_align", SRUN_CODE="85", JOB_SHOWN="Comment=himix-unbegun-4")
    assert ["scontrol", "update", "JobId=7", "Comment=himix-unbegun-0"] in scripts.calls


def test_a_job_that_cannot_be_requeued_says_what_to_do(scripts: Scripts) -> None:
    done = scripts.run("tiny_align", SRUN_CODE="85", SCONTROL_CODE="1")
    assert done.returncode == 85
    assert "submit the same command again" in done.stderr


@pytest.mark.parametrize(
    ("shell", "code"),
    [("exit 0", 0), ("exit 1", 101), ("exit 2", 102), ("exit 3", 103), ("exit 85", 85), ("kill -9 $$", 137)]
    + [(f"kill -{name} $$", 84) for name in ("TERM", "USR1", "USR2")],
)
def test_a_rank_that_fails_outweighs_one_that_was_asked_to_stop(scripts: Scripts, shell: str, code: int) -> None:
    """srun reports the highest code of all ranks: failures must lie above 85."""
    scripts.run("tiny_align")
    call = scripts.calls[-1]
    wrapper = call[call.index("bash") : call.index("rank") + 1]
    assert subprocess.run([*wrapper, "bash", "-c", shell], capture_output=True, check=False).returncode == code


def test_bare_sbatch_runs_tiny_align(scripts: Scripts) -> None:
    scripts.run()
    assert scripts.arguments() == ["tiny_align"]
    scripts.run("--train.steps", "5")
    assert scripts.arguments() == ["tiny_align", "--train.steps", "5"]


def test_a_rank_per_gpu_and_cpus_as_asked(scripts: Scripts) -> None:
    asked = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    scripts.run("tiny_align", **asked, SLURM_CPUS_ON_NODE="64")
    assert {"--ntasks=16", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--export=ALL"} <= set(scripts.calls[-1])
    assert "--overcommit" not in scripts.calls[-1]
    few = scripts.run("tiny_align", **asked, SLURM_CPUS_ON_NODE="1")
    assert "--overcommit" in scripts.calls[-1]
    assert "8 ranks share 1 CPUs on a node: sbatch --cpus-per-gpu N" in few.stderr
    scripts.run("tiny_align", **asked, SLURM_CPUS_ON_NODE="64", SLURM_NTASKS="4", SLURM_CPUS_PER_TASK="3")
    assert not [word for word in scripts.calls[-1] if word.startswith("--ntasks")]
    assert "--cpus-per-task=3" in scripts.calls[-1]


def test_options_of_srun_are_words_and_nothing_else(scripts: Scripts) -> None:
    done = scripts.run("tiny_align", HIMIX_SRUN="--mpi=none --cpu-bind=$(touch${IFS}pwned)\n --x=*")
    assert done.returncode == 0, done.stderr
    assert {"--mpi=none", "--cpu-bind=$(touch${IFS}pwned)", "--x=*"} <= set(scripts.calls[-1])
    assert not list(scripts.root.rglob("pwned*"))


def test_modules_are_loaded_by_name(scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "site").write_text('module() { printf "%s\\n" "$@" >> "$RECORD.modules"; [[ $* != *missing* ]]; }\n')
    assert scripts.run("tiny_align", HIMIX_MODULES="cuda/12.8  nccl", BASH_ENV=str(tmp_path / "site")).returncode == 0
    assert (tmp_path / "record.modules").read_text().split() == ["load", "cuda/12.8", "nccl"]
    done = scripts.run("tiny_align", HIMIX_MODULES="missing", BASH_ENV=str(tmp_path / "site"))
    assert (done.returncode, done.stderr) == (2, "error: module load missing failed\n")


def test_a_container_by_apptainer(scripts: Scripts, tmp_path: Path) -> None:
    scripts.program("apptainer")
    image = tmp_path / "an image.sif"
    image.touch()
    done = scripts.run("tiny_align", "--run.dir", "a b", HIMIX_CONTAINER=str(image), HIMIX_MOUNTS="/data,/a b:/c")
    assert done.returncode == 0, done.stderr
    call = scripts.calls[-1]
    started = call[call.index("rank") + 1 :]
    root = str(scripts.root)
    nvidia = ["--nv"] * os.path.exists("/dev/nvidiactl")
    assert started == [
        str(scripts.bin / "apptainer"), "exec", *nvidia, "--pwd", root, "--bind", f"{root},/data,/a b:/c", str(image), "python",
        "-m", "pipelines.pretrain", "tiny_align", "--run.dir", "a b",
    ]  # fmt: skip


def test_a_container_by_pyxis(scripts: Scripts, tmp_path: Path) -> None:
    done = scripts.run(
        "tiny_align", HIMIX_CONTAINER="site#himix:1", HIMIX_MOUNTS="/data,/a b:/c", SRUN_HELP="  --container-image=IMAGE"
    )
    assert done.returncode == 0, done.stderr
    root = str(scripts.root)
    wanted = {"--container-image=site#himix:1", f"--container-mounts={root}:{root},/data:/data,/a b:/c"}
    assert wanted | {f"--container-workdir={root}"} <= set(scripts.calls[-1])
    assert scripts.calls[-1][-4:] == ["python", "-m", "pipelines.pretrain", "tiny_align"]


def test_a_checkout_that_a_container_cannot_be_shown_is_one_line(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path, "a:b")
    done = scripts.run("tiny_align", HIMIX_CONTAINER="docker://image")
    assert done.returncode == 2
    assert "cannot be shown in a container: its name has a comma or a colon" in done.stderr
    assert scripts.nothing_ran()
