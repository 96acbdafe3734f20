"""What a process needs from its machine: open files, a free port, a quick start, and an end with its parent."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import resource
import secrets
import socket
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def bulk_import() -> Iterator[None]:
    """Import large libraries without the garbage collector, and keep all that is alive after it out of its sight for good.

    torch and megatron-core make some 450,000 objects that live as long as the process. The collector would walk through them
    again and again while they come: a third of the CPU time of a start, and a tenth of a second in the middle of later steps.
    It is for a start: a cycle that is garbage by then is never freed. Where nothing had to be imported, nothing is kept.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()


def allow_files(num_sockets: int) -> None:
    """Raise the limit of open files, 1,024 by default, for so many sockets: each is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_sockets + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now: below those that Linux hands out by itself, so that no socket that is opened
    meanwhile (gloo's, for example) takes it before it is used."""
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as listener:
            try:
                listener.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


def die_with_parent(*_: object) -> None:
    """End this worker of `multiprocessing` when the process that asked for it ends, however it ends.

    The parent process id does not tell: it is the fork server's, which lives as long as its children do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()
