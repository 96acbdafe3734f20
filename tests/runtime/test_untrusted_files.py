"""Files of somebody else: links, FIFOs, devices, names that lead out, and text that moves a terminal's cursor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from himix_megatron.runtime import durable_files
from himix_megatron.runtime.untrusted_files import (
    LinkError,
    escaped,
    folder_below,
    open_lock,
    open_regular,
    printable,
    read_below,
    read_regular,
)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text("precious")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "theirs" / "inner").mkdir(parents=True)
    return tmp_path / "theirs"


def test_a_regular_file_is_read_by_its_path_and_by_its_name_below(folder: Path) -> None:
    (folder / "inner" / "file").write_bytes(b"content")
    assert read_regular(folder / "inner" / "file") == b"content"
    assert read_below(folder, "inner/file") == b"content"
    assert read_below(folder, "inner/file", limit=7) == b"content"


def test_what_is_no_regular_file_is_neither_waited_for_nor_read(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    for place in (folder / "fifo", Path("/dev/zero"), folder):
        with pytest.raises((ValueError, IsADirectoryError), match=r"wanted a regular file|Is a directory"):
            read_regular(place)
    with pytest.raises(ValueError, match="fifo is a FIFO: wanted a regular file"):
        read_below(folder, "fifo")
    with pytest.raises(ValueError, match="fifo is a FIFO"):
        durable_files.file_digest(folder / "fifo")


def test_a_file_above_the_limit_is_not_read(folder: Path) -> None:
    (folder / "large").write_bytes(bytes(11))
    with pytest.raises(ValueError, match="large has 11 bytes: at most 10 are read"):
        open_regular(folder / "large", 10)


@pytest.mark.parametrize("place", ["link", "inner/link", "folder/victim"])
def test_a_link_below_the_folder_is_not_followed(folder: Path, victim: Path, place: str) -> None:
    (folder / "link").symlink_to(victim)
    (folder / "inner" / "link").symlink_to("../../victim")
    (folder / "folder").symlink_to(victim.parent)
    for act in (read_below, open_lock):
        with pytest.raises(LinkError, match=r"is a symbolic link: links below .*theirs are not followed"):
            act(folder, place)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["", "..", "../victim", "/etc/passwd", "inner/../../victim", "inner//x", "./x", "a\0b"])
def test_a_name_that_leads_out_is_refused(folder: Path, victim: Path, name: str) -> None:
    for act in (read_below, open_lock, folder_below):
        with pytest.raises(LinkError, match="is no name of a file in"):
            act(folder, name)


def test_a_lock_neither_empties_nor_needs_a_file(folder: Path) -> None:
    (folder / "old").write_text("content")
    with open_lock(folder, "old"), open_lock(folder, "new"):
        assert (folder / "old").read_text() == "content"
        assert (folder / "new").read_text() == ""


def test_folders_to_write_into_are_made_but_not_through_links(folder: Path, tmp_path: Path) -> None:
    assert folder_below(folder, "inner/deeper/still").is_dir()
    (tmp_path / "elsewhere").mkdir()
    (folder / "inner" / "away").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LinkError, match="away is a symbolic link"):
        folder_below(folder, "inner/away/deeper")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_written_file_replaces_a_link_and_an_appended_one_refuses_it(folder: Path, victim: Path) -> None:
    for name in ("written", "appended", "published.writing"):
        (folder / name).symlink_to(victim)
    os.link(victim, folder / "hard")
    for name in ("written", "hard", "published"):
        durable_files.publish(folder / name, b"ours")
        assert (folder / name).read_bytes() == b"ours"
    with pytest.raises(OSError, match="symbolic link"):
        durable_files.append_synced(folder / "appended", "more")
    assert victim.read_text() == "precious"


def test_text_that_is_shown_moves_no_cursor() -> None:
    assert escaped("a\x1b[2Jb\rc\x07\x9b\ud800é\n\tä日本") == "a\\x1b[2Jb\\rc\\x07\\x9b\\ud800é\n\tä日本"
    assert printable("two\n lines  of text") == "two lines of text"
    assert printable(f"got {'9' * 5000} , wanted less") == f"got {'9' * 300}... (5000 characters) , wanted less"
