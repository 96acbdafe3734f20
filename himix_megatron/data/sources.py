"""Rows of a source in, samples out: LLaVA's JSON and a folder of images. Other sources join here.

What is wrong with a row is the row's own (a BadSampleError, quarantined); a failing disk is not, and ends the run.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from himix_megatron.data.conversation import check_conversation
from himix_megatron.data.schema import BadSampleError

MAX_IMAGE_BYTES = 256 << 20
"""A larger image file is refused unread."""

# What a wrong file name answers with. Anything else (EIO, ESTALE, ENOMEM ...) is the machine's fault.
_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, read: what a shard stores."""

    id: Any
    conversations: list[dict[str, Any]]
    images: tuple[bytes, ...]


def llava_rows(annotations: Path) -> list[Any]:
    """The rows of a LLaVA annotation file: a JSON list, or one JSON object a line (`.jsonl`).

    Raises: ValueError when it is missing or neither.
    """
    if not annotations.is_file():
        raise ValueError(f"--annotations {annotations}: no such file")
    try:
        text = annotations.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if annotations.suffix == ".jsonl"
            else json.loads(text)
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--annotations {annotations}: not JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--annotations {annotations}: not a list of rows")
    return rows


def read_llava(row: Any, number: int, images: Path) -> Sample:
    """One LLaVA row with its images read from the folder.

    The row's number stands in for a missing id. `image` may be absent (a text-only row), a name, or a list of names.
    Raises: BadSampleError; OSError when the machine fails.
    """
    if not isinstance(row, Mapping):
        raise BadSampleError("malformed", "the row is not an object")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSampleError("malformed", "`image` is neither a name nor a list of names")
    turns = row.get("conversations")
    check_conversation(turns, len(names))
    return Sample(row.get("id", str(number)), turns, tuple(_read_image(images, name) for name in names))  # type: ignore[arg-type]


def _read_image(folder: Path, name: str) -> bytes:
    path = PurePosixPath(name)
    if not name.isprintable() or not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BadSampleError("unsafe_name", f"{name!r} does not stay in the image folder"[:200])
    try:
        # Not blocking: a named pipe would wait for ever.
        file = os.open(folder / path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_SUCH_FILE:
            raise BadSampleError("missing_image", f"{name!r}: {os.strerror(error.errno)}"[:200]) from None
        raise
    with open(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadSampleError("missing_image", f"{name!r} is no regular file"[:200])
        if status.st_size > MAX_IMAGE_BYTES:
            raise BadSampleError("oversized_image", f"{name!r} has more than {MAX_IMAGE_BYTES} bytes"[:200])
        return stream.read()
