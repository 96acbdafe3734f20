"""A private Slurm of two nodes on this machine, for users without a cluster and for tests.

    eval "$(python -m tools.dev_slurm up)"      # starts it, and points sbatch, squeue ... of this shell at it
    sbatch --nodes 2 slurm/pretrain_himix.sh
    python -m tools.dev_slurm status            # where its slurm.conf is, its nodes and jobs
    python -m tools.dev_slurm down              # ends its jobs and its daemons

Real slurmctld, munged and two slurmd (`n1`, `n2`), each node with 4 CPUs and 2 `gpu`s that are only counted; no database, no
cgroups, any user. Jobs go to the partition `main`; a job of the partition `urgent` preempts them: they get TERM, 30 seconds to
save, and are requeued. Each cluster has its own ports, keys and state, so several run side by side, one per --dir, and beside a
Slurm that serves the machine. `up` starts what does not run, so it also restarts a killed daemon.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import psutil

from pipelines.cli import parse_settings, run_main
from pipelines.flags import Word

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", *NODES)
START_SECONDS = 30.0
STOP_SECONDS = 10.0
MARK = "HIMIX_DEV_SLURM"
"""Names the cluster's folder in the environment of its daemons, and so of what they start."""
INSTALL = "Debian: apt-get install slurmctld slurmd slurm-client munge"

SLURM_CONF = """\
ClusterName=himix
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job may start again this many seconds after it was requeued, plus one.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
# Ranks and Ray derive the port at which they meet from the job's number: jobs of two clusters should not have the same.
FirstJobId={first_job}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n1,n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=4 CoresPerSocket=4 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


@dataclass(frozen=True)
class Arguments:
    """Start, stop or describe a private Slurm of two nodes."""

    command: Annotated[Literal["up", "down", "status"], Word("COMMAND")]
    """`up` starts what does not run; `down` ends jobs and daemons and removes the folder; `status` prints what runs."""
    dir: Path = Path(tempfile.gettempdir()) / f"himix-slurm-{os.getuid()}"
    """The cluster's own folder, made by `up`; another folder is another cluster."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The cluster's folder: slurm.conf, log/, state, and daemons.json (each daemon's pid and start time)."""

    folder: Path

    @property
    def conf(self) -> Path:
        """The slurm.conf that clients are pointed at."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Environment of daemons and clients, without anything of a job that this process may be part of."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SQUEUE"))}
        return clean | {"SLURM_CONF": str(self.conf)}

    def daemons(self) -> dict[str, psutil.Process]:
        """The daemons that run."""
        with contextlib.suppress(FileNotFoundError):
            recorded = json.loads((self.folder / "daemons.json").read_text())
            return {name: found for name, known in recorded.items() if (found := _process(*known)) is not None}
        return {}

    def client(self, *command: str) -> str:
        """What one of Slurm's commands prints. Raises: RuntimeError if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """Each node's state (`idle`, `mixed`, ...); nothing while the controller does not answer."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            return dict(line.split() for line in self.client("sinfo", "-h", "-N", "-o", "%N %T", "-p", "main").splitlines())
        return {}


def main() -> int:
    """The command line. Returns: 0; `status` 1 if the cluster does not run."""
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.dev_slurm", __doc__)
    cluster = Cluster(checked(arguments.dir))
    if arguments.command == "up":
        with locked(cluster):
            up(cluster)
        print(f"export SLURM_CONF={cluster.conf}")
        print(
            f"Two nodes ({', '.join(NODES)}) are up. sbatch, squeue, scontrol ... of a shell with that export", file=sys.stderr
        )
        print("talk to them. More: python -m tools.dev_slurm --help", file=sys.stderr)
        return 0
    if arguments.command == "down":
        if cluster.folder.exists():
            with locked(cluster):
                down(cluster)
        return 0
    return status(cluster)


def checked(folder: Path) -> Path:
    """The folder, absolute. Raises: ValueError for one that Slurm cannot use, or that holds something else."""
    folder = Path(os.path.abspath(folder))
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", str(folder)):
        raise ValueError(f"--dir is {str(folder)!r}: slurm.conf takes letters, digits, and . _ - / only")
    longest = 107 - len("/munge.socket") - 8  # of a Unix socket's path; Slurm's own are a little longer than munge's
    if len(str(folder)) > longest:
        raise ValueError(f"--dir has {len(str(folder))} characters: a socket's path allows {longest}, give a shorter one")
    if folder.exists() and not (folder / "lock").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--dir {folder} holds something else: name a folder that is empty or does not exist")
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise ValueError(f"--dir {folder} belongs to another user: name another folder")
    return folder


@contextlib.contextmanager
def locked(cluster: Cluster) -> Iterator[None]:
    """Hold the cluster's lock, so that nobody else starts or stops it."""
    cluster.folder.mkdir(parents=True, exist_ok=True)
    cluster.folder.chmod(0o755)  # munged wants its socket reachable
    with (cluster.folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- up ------------------------------------------------------------------------------------------------------------


def up(cluster: Cluster) -> None:
    """Start what does not run, and wait until both nodes take jobs.

    Raises: ValueError if Slurm or munge is not installed, or a daemon does not start (with its last words).
    """
    programs = {name: program(name) for name in ("munged", "slurmctld", "slurmd", "sinfo", "sbatch")}
    running = cluster.daemons()
    if not cluster.conf.exists():
        write_files(cluster)
    (cluster.folder / "daemons.json").write_text(json.dumps({name: [p.pid, p.create_time()] for name, p in running.items()}))
    folder = cluster.folder
    munge_files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    commands = {
        "munged": ["--foreground", *(f"--{name}={folder / file}" for name, file in munge_files.items())],
        "slurmctld": ["-D", "-f", str(cluster.conf)],
        **{node: ["-D", "-f", str(cluster.conf), "-N", node] for node in NODES},
    }
    for name, arguments in commands.items():
        if name not in running:
            if name == "munged":
                (folder / "munge.socket").unlink(missing_ok=True)
            running[name] = start(cluster, name, [programs.get(name, programs["slurmd"]), *arguments])
            if name == "munged":
                wait_until(cluster, running, lambda: (folder / "munge.socket").exists())
    usable = {"idle", "mixed", "allocated", "completing"}
    wait_until(cluster, running, lambda: {cluster.states().get(node) for node in NODES} <= usable)


def program(name: str) -> str:
    """Where a program is; daemons may be in folders that a user's PATH lacks. Raises: ValueError."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        raise ValueError(f"{name} is not installed ({INSTALL})")
    return found


def write_files(cluster: Cluster) -> None:
    """slurm.conf with free ports, gres.conf and a munge key."""
    for name in ("state", "log", *NODES):
        (cluster.folder / name).mkdir(exist_ok=True)
    key = cluster.folder / "munge.key"
    key.unlink(missing_ok=True)
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
        file.write(secrets.token_bytes(128))
    controller_port, *node_ports = free_ports(1 + len(NODES))
    # Slurm counts GPUs by their device files, and opens none of them.
    (cluster.folder / "gres.conf").write_text("NodeName=n1,n2 Name=gpu File=/dev/null,/dev/zero\n")
    cluster.conf.write_text(
        SLURM_CONF.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            folder=cluster.folder,
            controller_port=controller_port,
            node_ports=",".join(map(str, node_ports)),
            first_job=1000 + secrets.randbelow(1024),
        )
    )


def free_ports(count: int) -> list[int]:
    """Free ports, below those that Linux assigns by itself and those that a run derives for its ranks (distributed/launch.py:
    from 16384)."""
    ports: list[int] = []
    while len(ports) < count:
        port = 8192 + secrets.randbelow(8192)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("0.0.0.0", port))
            ports += [port] * (port not in ports)
    return sorted(ports)


def start(cluster: Cluster, name: str, command: list[str]) -> psutil.Process:
    """Start a daemon in its own session, with its output in log/NAME.log, and record it in daemons.json."""
    with (cluster.folder / "log" / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            command,
            env=cluster.environment | {MARK: str(cluster.folder)},
            cwd=cluster.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    process = psutil.Process(child.pid)
    known = cluster.folder / "daemons.json"
    known.write_text(json.dumps(json.loads(known.read_text()) | {name: [process.pid, process.create_time()]}))
    return process


def wait_until(cluster: Cluster, running: dict[str, psutil.Process], ready: Callable[[], bool]) -> None:
    """Raises: ValueError with the log's last line when a daemon ends, or the time is over."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        gone = [name for name, process in running.items() if not _alive(process)]
        if gone or time.monotonic() > deadline:
            name = (gone or ["slurmctld"])[0]
            log = cluster.folder / "log" / f"{name}.log"
            words = log.read_text(errors="replace").split("\n")[-2:][0] if log.is_file() else ""
            what = "ended" if gone else f"does not answer after {START_SECONDS:.0f} s"
            raise ValueError(f"{name} {what}: {words} (all of it: {log}; `down` and `up` start anew)")
        time.sleep(0.2)


# ---- down and status -------------------------------------------------------------------------------------------------


def down(cluster: Cluster) -> None:
    """End jobs, daemons and whatever they left behind; remove the folder."""
    daemons = cluster.daemons()
    if "slurmctld" in daemons:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, FileNotFoundError):
            cluster.client("scancel", "--signal=KILL", "--full", "--user", getpass.getuser())
            cluster.client("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + STOP_SECONDS
            while cluster.client("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.2)
    end([daemons[name] for name in reversed(DAEMONS) if name in daemons])
    end(leftovers(cluster))
    shutil.rmtree(cluster.folder)


def end(processes: list[psutil.Process]) -> None:
    """End processes with TERM, and after a while KILL."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(stubborn, timeout=STOP_SECONDS)


def leftovers(cluster: Cluster) -> list[psutil.Process]:
    """Processes that this cluster's daemons started, job steps above all, and what those started."""
    marks = {(MARK, str(cluster.folder)), ("SLURM_CONF", str(cluster.conf))}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = environment_of(process)
            # A shell in which SLURM_CONF was exported is no job.
            if marks & environment.items() and (MARK in environment or "SLURM_JOB_ID" in environment):
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in ours]


def environment_of(process: psutil.Process) -> dict[str, str]:
    """What a process was started with; nothing if it may not be read. slurmstepd writes its title over the first part, where
    psutil would stop."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        return dict(word.decode(errors="replace").split("=", 1) for word in words if b"=" in word)
    return {}


def status(cluster: Cluster) -> int:
    """Print slurm.conf's path, the daemons, nodes and jobs. Returns: 0, or 1 if it does not run."""
    daemons = cluster.daemons()
    if not daemons:
        print(f"no cluster runs in {cluster.folder}: python -m tools.dev_slurm up")
        return 1
    print(f"export SLURM_CONF={cluster.conf}")
    for name in DAEMONS:
        print(f"{name}: {f'pid {daemons[name].pid}' if name in daemons else 'not running (up starts it)'}")
    if "slurmctld" in daemons:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            print(cluster.client("sinfo", "-N", "-o", "%.6N %.10P %.12T %.6c %.8G").rstrip())
            print(cluster.client("squeue", "-o", "%.8i %.10P %.20j %.10T %.10M %.6D %R").rstrip())
    return 0


def _process(pid: int, created: float) -> psutil.Process | None:
    """The process of this pid, if it is the one that was started then and runs."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 1 and _alive(process):
            return process
    return None


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    run_main(main)
