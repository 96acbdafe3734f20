"""The members of a tar from outside, one after the other, as data only: nothing is ever extracted to a file.

Read strictly from front to end, and to the end mark: a tar that is cut, damaged, or followed by other data is an error where
readers commonly stop without a word. Header blocks are parsed by the standard library; which of them follow one another, and
what may be in them, is decided here.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_BYTES = 64 << 10
"""A longer name, or longer PAX records, are refused unread."""
MAX_PAX_RECORDS = 1000
_CHUNK = 1 << 20
MAX_PADDING = 64 << 20
_ZEROS = bytes(BLOCK)

_MAGIC = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstandard", b"PK": "zip"}


class TarError(Exception):
    """The tar cannot be read any further."""


@dataclass(frozen=True, slots=True)
class Member:
    """One member's header."""

    name: str
    offset: int
    """Where its first header block begins, in bytes."""
    size: int
    """Of its content, in bytes."""
    refused: str | None
    """Why its content must not be used; None: it is a plain file with a harmless name."""
    is_folder: bool = False


class TarStream:
    """Walks a tar of `size` bytes from `position` on, where a header begins."""

    def __init__(self, read: Callable[[int], bytes], size: int, position: int = 0) -> None:
        self._read, self._size, self.position = read, size, position
        self._left = 0  # bytes of the current member's content and padding that were not read yet
        self._content = 0

    def members(self) -> Iterator[Member]:
        """Each member in turn; between two, `content` gives the current one's bytes. Raises: TarError."""
        while True:
            self._skip()
            start, name = self.position, None
            fields: dict[str, str] = {}
            while True:
                header = self._header()
                if header is None:
                    if self.position != start + BLOCK:
                        raise TarError("its end mark follows a header that announces a name")
                    self._end()
                    return
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = _text(self._record(header).split(b"\0", 1)[0])
                elif header.type == tarfile.GNUTYPE_LONGLINK:
                    self._record(header)  # links are refused anyway
                elif header.type == tarfile.XHDTYPE or header.type == b"X":
                    fields |= _pax_fields(self._record(header))
                elif header.type == tarfile.XGLTYPE:
                    if {"path", "size"} & _pax_fields(self._record(header)).keys():
                        raise TarError("a global header gives one name or size to all members")
                else:
                    break
            yield self._member(header, start, fields.get("path", name), fields)

    def content(self) -> bytes:
        """The current member's bytes. Raises: TarError where the tar ends within it."""
        data = self._exactly(self._content)
        self._left -= self._content
        self._content = 0
        return data

    def _member(self, header: tarfile.TarInfo, start: int, long_name: str | None, fields: dict[str, str]) -> Member:
        size = header.size
        if "size" in fields:
            if not fields["size"].isascii() or not fields["size"].isdigit() or len(fields["size"]) > 20:
                raise TarError("a PAX header gives a size that is no number")
            size = int(fields["size"])
        name = header.name if long_name is None else long_name
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise TarError("it has a sparse member, which is not read")
        if header.isreg():
            padded = size + -size % BLOCK
            if size < 0 or padded > self._size - self.position:
                raise TarError(f"it is cut: a member announces {size} bytes, and {self._size - self.position} are left")
            self._content, self._left = size, padded
        elif size and not header.isdir():
            raise TarError("a member that has no content announces some")
        refused = _name_problem(name)
        if refused is None and any(key.startswith("GNU.sparse") for key in fields):
            refused = "it is sparse"
        if refused is None and not header.isreg():
            refused = "it is no plain file"
        return Member(name, start, size, refused, header.isdir())

    def _header(self) -> tarfile.TarInfo | None:
        """One header block; None: the end mark."""
        block = self._read(BLOCK)
        self.position += len(block)
        if block == _ZEROS:
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError):
            kind = next((what for magic, what in _MAGIC.items() if block.startswith(magic)), None)
            if kind and self.position <= BLOCK:
                raise TarError(f"it is {kind} data, not a plain tar: unpack it first") from None
            if len(block) < BLOCK:
                raise TarError(f"it is cut at byte {self.position}") from None
            raise TarError(f"no tar header at byte {self.position - BLOCK}") from None

    def _record(self, header: tarfile.TarInfo) -> bytes:
        """The content of a header that speaks about the next one."""
        if not 0 <= header.size <= MAX_NAME_BYTES:
            raise TarError(f"a header announces a name of {header.size} bytes")
        return self._exactly(header.size + -header.size % BLOCK)[: header.size]

    def _skip(self) -> None:
        while self._left:
            self._left -= len(self._exactly(min(self._left, _CHUNK)))
        self._content = 0

    def _end(self) -> None:
        """See that nothing but some zeros follows: programs fill their last block with them."""
        if self._size - self.position > MAX_PADDING:
            raise TarError(f"{self._size - self.position} bytes follow its end mark, more than programs fill up with")
        while self.position < self._size:
            if self._exactly(min(self._size - self.position, _CHUNK)).strip(b"\0"):
                raise TarError("more data follows its end mark: are several tars joined?")

    def _exactly(self, size: int) -> bytes:
        data = self._read(size)
        self.position += len(data)
        if len(data) != size:
            raise TarError(f"it is cut at byte {self.position}")
        return data


def _pax_fields(data: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records (POSIX.1-2001, pax). Raises: TarError."""
    fields: dict[str, str] = {}
    at, end = 0, len(data.rstrip(b"\0"))
    for _ in range(MAX_PAX_RECORDS):
        if at >= end:
            return fields
        length, space, _ = data[at : at + 20].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 1 < int(length) <= len(data) - at:
            raise TarError("a PAX header has a record of nonsense length")
        record = data[at + len(length) + 1 : at + int(length)]
        at += int(length)
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals:
            raise TarError("a PAX header has a record without a value")
        fields[_text(key)] = _text(value)
    raise TarError(f"a PAX header has more than {MAX_PAX_RECORDS} records")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _name_problem(name: str) -> str | None:
    """Why a member's name is refused."""
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        return "its name leaves the tar"
    if not name.isprintable():
        return "its name has control characters or is not UTF-8"
    return None
