"""Files and texts that came from outside: a dataset, a model or run folder from somebody else, a folder of pictures.

Flows in: paths and text; out: descriptors of regular files, folders in which it is safe to write, and text that a terminal
shows as it is. A file that somebody hands over can be a link to a file of ours, a FIFO that never ends, or a device: nothing
here follows a link below the folder that was handed over, waits, or empties a file.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MAX_SHOWN = 300
"""Characters of one word that a message repeats."""


class LinkError(ValueError):
    """A name leads out of the folder that it came from: by a symbolic link, `..` or an absolute path."""


def open_regular(path: Path | str, limit: int | None = None) -> io.BufferedReader:
    """A file for reading that the user named; links to it are followed.

    Raises: FileNotFoundError, OSError; ValueError for what is no regular file (opening it neither waits nor reads), or one of
    more than `limit` bytes.
    """
    return open(_checked(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), str(path), limit), "rb")


def read_regular(path: Path | str, limit: int | None = None) -> bytes:
    """The content of such a file. Raises: as `open_regular`."""
    with open_regular(path, limit) as file:
        return file.read()


def open_below(folder: Path, name: str, limit: int | None = None) -> io.BufferedReader:
    """A file for reading in a folder that somebody handed over, by its name in there, with slashes.

    Raises: LinkError; otherwise as `open_regular`.
    """
    return open(descriptor_below(folder, name, limit), "rb")


def descriptor_below(folder: Path, name: str, limit: int | None = None) -> int:
    """The descriptor of such a file, for the caller to close. Raises: as `open_below`."""
    return _checked(_open_below(folder, name, os.O_RDONLY), f"{folder}/{name}", limit)


def read_below(folder: Path, name: str, limit: int | None = None) -> bytes:
    """The content of such a file. Raises: as `open_below`."""
    with open_below(folder, name, limit) as file:
        return file.read()


def size_below(folder: Path, name: str) -> int:
    """Bytes of such a file. Raises: as `open_below`."""
    with open_below(folder, name) as file:
        return os.fstat(file.fileno()).st_size


def open_lock(folder: Path, name: str) -> io.FileIO:
    """A lock file in a folder that somebody handed over; it is made where there is none, and never changed.

    Raises: LinkError; OSError; ValueError for what is no regular file.
    """
    return io.FileIO(_checked(_open_below(folder, name, os.O_RDWR | os.O_CREAT), str(folder / name)), "r+")


def folder_below(folder: Path, name: str) -> Path:
    """A folder below one that somebody handed over, by its name in there, to write into; it is made where there is none.

    Raises: LinkError; OSError.
    """
    place = folder
    for part in _parts(folder, name):  # whoever handed the folder over is gone: what is looked at stays as it is
        place /= part
        if place.is_symlink():
            raise _link(folder, place)
        place.mkdir(exist_ok=True)
    return place


def refuse_links(folder: Path, *patterns: str) -> None:
    """Raises: LinkError for a link among what these patterns name in the folder: writing there would lead out of it."""
    for pattern in patterns:
        for place in folder.glob(pattern):
            if place.is_symlink():
                raise _link(folder, place)


def printable(text: str) -> str:
    """Text as one line for a terminal: control characters are spelled out, and what is too long for a reader is cut."""
    words = [word if len(word) <= MAX_SHOWN else f"{word[:MAX_SHOWN]}... ({len(word)} characters)" for word in text.split()]
    return escaped(" ".join(words))


def escaped(text: str) -> str:
    """Text in which characters that move a terminal's cursor, or are no text, are spelled out; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _parts(folder: Path, name: str) -> list[str]:
    """The parts of a name, from the outside in. Raises: LinkError."""
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts or "\0" in name:
        raise LinkError(f"{name!r} is no name of a file in {folder}: wanted one without .., // or a leading /")
    return parts


def _open_below(folder: Path, name: str, flags: int) -> int:
    """Each folder is opened in the one before, so that no link on the way can be followed."""
    parts = _parts(folder, name)
    at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for number, part in enumerate(parts, 1):
        is_last = number == len(parts)
        try:
            inner = os.open(
                part, (flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC) if is_last else _FOLDER, 0o666, dir_fd=at
            )
        except OSError as error:
            place = folder.joinpath(*parts[:number])
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and place.is_symlink():
                raise _link(folder, place) from None
            raise OSError(error.errno, error.strerror, str(folder / name)) from None
        finally:
            os.close(at)
        at = inner
    return at


def _link(folder: Path, place: Path) -> LinkError:
    return LinkError(f"{place} is a symbolic link: links below {folder} are not followed: put there what it leads to")


def _checked(descriptor: int, place: str, limit: int | None = None) -> int:
    """The descriptor, if it is of a regular file within the limit; otherwise it is closed."""
    state = os.fstat(descriptor)
    is_regular = stat.S_ISREG(state.st_mode)
    if is_regular and (limit is None or state.st_size <= limit):
        return descriptor
    os.close(descriptor)
    if is_regular:
        raise ValueError(f"{place} has {state.st_size} bytes: at most {limit} are read")
    raise ValueError(f"{place} is {_KINDS.get(stat.S_IFMT(state.st_mode), 'no regular file')}: wanted a regular file")
