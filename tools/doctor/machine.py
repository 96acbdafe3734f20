"""The doctor's findings on the machine: memory, limits, ports, and the folder of runs."""

from __future__ import annotations

import errno
import os
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from himix_megatron.runtime.durable_files import sync_folder, write_synced
from tools.doctor.finding import Finding

PORTS = range(16384, 32768)
"""From which himix_megatron/distributed/launch.py derives the port of a Slurm step."""
LEAST_FREE_GIB = 20.0
LEAST_SHM_GIB = 1.0
LEAST_OPEN_FILES = 4096
SLOW_SYNC_SECONDS = 0.5


def findings(folder: Path) -> Iterator[Finding]:
    """All findings."""
    yield memory()
    # Where decoding processes hand over batches.
    remedy = "containers: --shm-size 16g or --ipc=host; or --data.num-workers 0"
    yield space("shared memory", Path("/dev/shm"), LEAST_SHM_GIB, remedy)
    yield open_files()
    yield from ports()
    yield writable(folder)
    # Where checkpoints are written.
    remedy = "a checkpoint takes 4 to 14 bytes a parameter, and --checkpoint.keep-last of them are kept; or --folder DIR"
    yield space("free space", folder, LEAST_FREE_GIB, remedy)


def memory() -> Finding:
    """RAM and cores that this process may use."""
    total, available = psutil.virtual_memory().total / 2**30, psutil.virtual_memory().available / 2**30
    text = f"{len(os.sched_getaffinity(0))} CPU cores, {available:.0f} of {total:.0f} GiB of memory free"
    if available < 4:
        return Finding("memory", "warning", text, "end other programs, or request more memory")
    return Finding("memory", "ok", text)


def space(what: str, folder: Path, least_gib: float, remedy: str) -> Finding:
    """Whether enough of a folder's file system is free."""
    if not folder.is_dir():
        return Finding(what, "broken", f"{folder} is not a folder", remedy, needed=True)
    total, _, free = shutil.disk_usage(folder)
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free in {folder.absolute()}"
    return Finding(what, "warning", text, remedy) if free / 2**30 < least_gib else Finding(what, "ok", text)


def open_files() -> Finding:
    """The limit of files and sockets of one process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        more = f"up to {hard}" if hard != resource.RLIM_INFINITY else "without limit"
        return Finding("open files", "warning", f"limit {soft}", f"ulimit -n {LEAST_OPEN_FILES * 4} ({more} is allowed)")
    return Finding("open files", "ok", f"limit {'none' if soft == resource.RLIM_INFINITY else soft}")


# ---- ports -----------------------------------------------------------------------------------------------------------


def ports() -> Iterator[Finding]:
    """The range of ports at which runs under srun meet, and MASTER_PORT if this process would listen on it."""
    text = f"{PORTS.start} to {PORTS.stop - 1}, where ranks under srun meet"
    taken = listening() & set(PORTS)
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    if first < PORTS.stop and last >= PORTS.start:
        remedy = f"sysctl net.ipv4.ip_local_port_range='{PORTS.stop} {max(last, 60999)}'; a run that fails so can start again"
        yield Finding("ports", "warning", f"{text}: Linux assigns {first} to {last} to any program", remedy)
    elif taken:
        shown = ", ".join(map(str, sorted(taken)[:5]))
        yield Finding("ports", "ok", f"{text}: {len(taken)} taken ({shown}{', ...' if len(taken) > 5 else ''})")
    else:
        yield Finding("ports", "ok", f"{text}: all free")
    # Under torchrun the port is taken by torchrun itself, for its ranks.
    port = os.environ.get("MASTER_PORT", "")
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if port.isdecimal() and "TORCHELASTIC_RUN_ID" not in os.environ and rank == "0":
        yield master_port(int(port))


def master_port(port: int) -> Finding:
    """Whether rank 0 could listen there."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen()
        except (OSError, OverflowError) as error:
            used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            detail = f"MASTER_PORT {port} {'is in use' if used else f'cannot be listened on: {error}'}"
            return Finding("master port", "broken", detail, "choose another, or unset it", needed=True)
    return Finding("master port", "ok", f"MASTER_PORT {port} is free")


def listening() -> set[int]:
    """TCP ports on which a program listens."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(name).is_file():
            rows = [line.split() for line in Path(name).read_text().splitlines()[1:]]
            found |= {int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[3] == "0A"}
    return found


# ---- the folder of runs ----------------------------------------------------------------------------------------------


def writable(folder: Path) -> Finding:
    """Write, sync, rename and read back, as a checkpoint does."""
    probe = folder / f".doctor-{secrets.token_hex(8)}"
    renamed = probe.with_suffix(".renamed")
    content = secrets.token_bytes(1 << 20)
    started = time.perf_counter()
    try:
        write_synced(probe, content)
        probe.rename(renamed)
        sync_folder(folder)
        same = renamed.read_bytes() == content
    except OSError as error:
        detail = f"{folder.absolute()} ({file_system(folder)}): {error.strerror}"
        return Finding("folder", "broken", detail, "runs need a folder to write to: --folder DIR, --run.dir DIR", needed=True)
    finally:
        for left in (probe, renamed):
            if left.exists():
                left.unlink()
    seconds = time.perf_counter() - started
    text = f"{folder.absolute()} ({file_system(folder)}): 1 MiB written, synced and renamed in {seconds * 1000:.0f} ms"
    if not same:
        return Finding("folder", "broken", f"{text}, but read back other bytes", "use another file system", needed=True)
    if seconds > SLOW_SYNC_SECONDS:
        return Finding("folder", "warning", text, "checkpoints will take long: is the file system overloaded?")
    return Finding("folder", "ok", text)


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on, e.g. ext4, nfs4, lustre."""
    path = str(folder.resolve())
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    fits = [(len(where), kind) for where, kind in mounts if path == where or path.startswith(where.rstrip("/") + "/")]
    return max(fits, default=(0, "unknown"))[1]
