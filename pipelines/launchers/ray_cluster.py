"""Preprocess on all nodes of a Slurm job: Ray for as long as the job needs it.

    srun --ntasks-per-node 1 python -m pipelines.launchers.ray_cluster --source llava ...  (as slurm/preprocess_ray.sh does)

Arguments are those of pipelines.preprocess. One task per node: each starts Ray's daemons with ports and a temporary folder of
their own, bound to the address at which the nodes see each other, without a dashboard; the first one runs the preprocessing.
Every task holds a connection to the first: when that ends, however it ends, so do they. Daemons that leave their parent are
adopted by the task that started them, so nothing of Ray outlives it. With RAY_AUTH_TOKEN (the script makes one) Ray, and the
first task, serve only those who have it.

On TERM, USR1 and USR2 everything is taken down and the exit code is 85: the same command continues where it stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import psutil

from himix_megatron.data.shards.storage import Folder, folder_at
from himix_megatron.distributed.launch import Launch, address_of, launch_from_environment
from himix_megatron.runtime.process import free_port
from himix_megatron.runtime.stop_signals import EXIT_REQUEUE, STOP_SIGNALS, handle_signals, unsaved_code
from pipelines.cli import parse_settings, run_main
from pipelines.preprocess import Settings

MEET_SECONDS = 180.0
START_ATTEMPTS = 3
"""Ray gives its daemons 30 seconds, which a busy node may not be able to keep; and a free port may be gone a moment later."""
END_SECONDS = 5.0
OBJECT_STORE_BYTES = 256 << 20
"""It holds the texts of the tasks under way, nothing else."""
_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """One task's part. Returns: the preprocessing's exit code on the first node, 0 on the others, 85 after a stop request."""
    arguments = sys.argv[1:]
    settings = parse_settings(Settings, arguments, "sbatch slurm/preprocess_ray.sh", __doc__)
    if settings.engine != "ray":
        raise ValueError(f"--engine is {settings.engine}: a job of several nodes needs Ray, leave it out")
    launch = launch_from_environment(os.environ)
    handle_signals(_leave_unsaved)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The path of a Unix socket ends at 107 characters, and Ray adds 62 to this one.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=None if len(tempfile.gettempdir()) <= 30 else "/tmp"))
    try:
        return lead(launch, arguments, folder_at(str(settings.out)), folder) if launch.rank == 0 else follow(launch, folder)
    finally:
        handle_signals(signal.SIG_IGN)
        end_children()
        shutil.rmtree(folder, ignore_errors=True)


def lead(launch: Launch, arguments: Sequence[str], out: Folder, folder: Path) -> int:
    """The first node: gather the others, start Ray on all, preprocess into `out`. Returns: its exit code."""
    before = out.receipts()
    with contextlib.ExitStack() as held:
        others = [held.enter_context(other) for other in gathered(launch)]
        # The address at which another node has reached this one; names may resolve to a loopback address here.
        own = others[0].getsockname()[0] if others else "127.0.0.1"
        address = f"{own}:{free_port(own)}"
        start_ray(folder, own, "--head", "--port", address.split(":")[1], "--include-dashboard", "false")
        for other in others:
            other.sendall(f"{address}\n".encode())
        for other in others:
            if _line(other) != "ready":
                raise RuntimeError("Ray did not start on another node of this job: its own lines say why")
        print(f"Ray runs on {launch.world_size} nodes, at {address}", file=sys.stderr, flush=True)

        def leave(*_: object) -> NoReturn:
            raise SystemExit(code_when_asked(out, before))

        handle_signals(leave)
        command = [sys.executable, "-m", "pipelines.preprocess", *arguments]
        code = subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}, check=False).returncode
    return code_when_asked(out, before) if -code in STOP_SIGNALS else code


def code_when_asked(out: Folder, before: list[str]) -> int:
    """85; or, where no further shard is finished, what the batch script wants then: it must not go on like this for ever."""
    return unsaved_code() if out.receipts() == before else EXIT_REQUEUE


def follow(launch: Launch, folder: Path) -> int:
    """Another node: start Ray, and stay until the first one is done."""
    with _connected(launch) as first:
        first.sendall(f"{_token()}\n".encode())
        address = _line(first)
        if not address:
            raise RuntimeError("the first node of this job ended before Ray started: its own lines say why")
        start_ray(folder, first.getsockname()[0], "--address", address)
        first.sendall(b"ready\n")
        first.settimeout(None)
        first.recv(1)  # nothing comes: the connection ends with the first node's work
    return 0


def gathered(launch: Launch) -> list[socket.socket]:
    """Connections of all other tasks. Raises: RuntimeError when they do not come."""
    others: list[socket.socket] = []
    if launch.world_size == 1:
        return others
    with socket.create_server(("", launch.port)) as server:
        deadline = time.monotonic() + MEET_SECONDS
        while len(others) < launch.world_size - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                other, _ = server.accept()
            except TimeoutError:
                raise RuntimeError(
                    f"{len(others)} of {launch.world_size - 1} other nodes came to port {launch.port} "
                    f"within {MEET_SECONDS:.0f} s"
                ) from None
            other.settimeout(MEET_SECONDS)
            if secrets.compare_digest(_line(other), _token()):
                others.append(other)
            else:
                other.close()  # a stranger
    return others


def start_ray(folder: Path, own: str, *arguments: str) -> None:
    """Ray's daemons on this node; they become children of this process. Raises: RuntimeError with Ray's last words."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
    command += ["--node-ip-address", own, "--num-cpus", os.environ.get("SLURM_CPUS_ON_NODE", str(os.cpu_count()))]
    command += ["--temp-dir", str(folder), "--object-store-memory", str(OBJECT_STORE_BYTES), "--disable-usage-stats"]
    for _ in range(START_ATTEMPTS):
        # Workers take any free port; these daemons have fixed ones, which would collide with another job's.
        names = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent")
        ports = [f"--{name}-port={free_port(own)}" for name in names]
        done = subprocess.run([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode == 0:
            return
        words = " ".join(done.stdout.split())[-300:]
        print(f"ray start failed on {socket.gethostname()}: {words} {_raylet_words(folder)}", file=sys.stderr, flush=True)
        end_children()
    raise RuntimeError(f"ray start failed {START_ATTEMPTS} times on {socket.gethostname()}")


def _raylet_words(folder: Path) -> str:
    """The last lines of Ray's daemon of this node."""
    logs = [log.read_text(errors="replace").splitlines()[-3:] for log in sorted(folder.glob("session_2*/logs/raylet.*"))]
    return "; ".join(line for lines in logs for line in lines)[-1000:]


def end_children() -> None:
    """Every process that descends from this one, in a few seconds."""
    this = psutil.Process()
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        children = this.children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(child)
        psutil.wait_procs(children, timeout=END_SECONDS)


def _leave_unsaved(number: int, _: object) -> NoReturn:
    raise SystemExit(unsaved_code())


def _token() -> str:
    return os.environ.get("RAY_AUTH_TOKEN", "")


def _connected(launch: Launch) -> socket.socket:
    """To the first task, once it listens. Raises: RuntimeError."""
    deadline = time.monotonic() + MEET_SECONDS
    host = address_of(launch.host)
    while True:
        try:
            return socket.create_connection((host, launch.port), timeout=MEET_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"the first node of this job ({host}) does not answer at port {launch.port}: {error}"
                ) from None
            time.sleep(0.3)


def _line(connection: socket.socket) -> str:
    """One line, at most a few hundred bytes; empty where the other side has gone."""
    received = b""
    with contextlib.suppress(OSError):
        while not received.endswith(b"\n") and len(received) < 500:
            more = connection.recv(1)
            if not more:
                return ""
            received += more
    return received.decode(errors="replace").strip()


if __name__ == "__main__":
    run_main(main)
