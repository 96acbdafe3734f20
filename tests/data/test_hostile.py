"""Input made to do harm does none: one clear line each, nothing executed, nothing written outside OUT, little memory.

Each case is a source and what must come of it: a row of the quarantine (its reason), or a refusal (one line). All of them run
once in one process of their own, which measures the most memory it ever had.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from himix_megatron.data.shards.reader import ShardDataset
from pipelines.preprocess import Settings, preprocess
from tests.support import ROOT
from tests.support.data_fixtures import encoded, picture, row

JPEG = encoded(picture(), "JPEG")
KEPT = ""
"""Instead of a reason: the row is harmless after all."""
MAX_BYTES = 1 << 30
"""Of memory, over all cases."""


def png(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG that says it has this size; its content is not to be trusted."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_chunk() -> bytes:
    """A compressed text of 300 MB."""
    body = b"Comment\0\0" + zlib.compress(bytes(300 << 20), 9)
    return struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def signed(block: bytes) -> bytes:
    """A header block with its checksum made right."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def sample(key: str) -> bytes:
    return member(f"{key}.jpg", JPEG) + member(f"{key}.txt", b"A picture.")


END = bytes(1024)
GOOD = sample("good")


def pax(fields: bytes, name: str = "x.jpg") -> bytes:
    return header("pax", len(fields), tarfile.XHDTYPE) + fields + bytes(-len(fields) % 512) + member(name, JPEG)


# LLaVA rows and files -------------------------------------------------------------------------------------------------


def named(name: Any, **files: bytes) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: llava(folder, [row(0, None), {**row(1, "x", marks=1), "image": name}], files)


def image_file(data: bytes) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: llava(folder, [row(0, None), row(1, "x.jpg")], {"x.jpg": data})


def field(**fields: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: llava(folder, [row(0, None), {**row(1, None), **fields}], {})


def turns(*turns: Any) -> Callable[[Path], dict[str, Any]]:
    return field(conversations=list(turns))


def annotations(text: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        settings = llava(folder, [], {})
        settings["annotations"].write_bytes(text)
        return settings

    return write


def llava(folder: Path, rows: list[Any], files: dict[str, bytes]) -> dict[str, Any]:
    (folder / "images" / "folder.jpg").mkdir(parents=True)
    os.mkfifo(folder / "images" / "pipe.jpg")
    os.symlink("loop.jpg", folder / "images" / "loop.jpg")
    os.symlink("/dev/zero", folder / "images" / "zero.jpg")
    for name, data in files.items():
        (folder / "images" / name).write_bytes(data)
    (folder / "rows.json").write_text(json.dumps(rows))
    return {"annotations": folder / "rows.json", "images": folder / "images"}


def linked_image(name: str) -> Callable[[Path], dict[str, Any]]:
    """A row whose picture is, or lies behind, a link to a private one."""

    def write(folder: Path) -> dict[str, Any]:
        settings = llava(folder, [row(0, None), row(1, name)], {})
        (folder / "private").mkdir()
        (folder / "private" / "x.jpg").write_bytes(JPEG)
        place = folder / "images" / name.split("/")[0]
        place.symlink_to(folder / "private" if "/" in name else folder / "private" / "x.jpg")
        return settings

    return write


def huge_file(folder: Path) -> dict[str, Any]:
    settings = llava(folder, [row(0, None), row(1, "x.jpg")], {})
    with (folder / "images" / "x.jpg").open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    return settings


def same_image_often(folder: Path) -> dict[str, Any]:
    data = JPEG + bytes(3 << 20)
    return llava(folder, [row(0, None), row(1, ["x.jpg"] * 100)], {"x.jpg": data})


# Tars ------------------------------------------------------------------------------------------------------------------


def tar(*parts: bytes) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "x.tar").write_bytes(b"".join(parts))
        return {"source": "webdataset", "input": (folder / "x.tar",)}

    return write


def members(*items: tuple[str, bytes]) -> Callable[[Path], dict[str, Any]]:
    return tar(GOOD, *(member(name, data) for name, data in items), END)


def special(kind: bytes, link: str = "") -> Callable[[Path], dict[str, Any]]:
    return tar(GOOD, header("x.jpg", 0, kind, link), member("x.txt", b"A picture."), END)


def pickled(folder: Path) -> dict[str, Any]:
    data = pickle.dumps(Bomb(folder.parent / "executed"))
    return tar(
        GOOD,
        *(member(f"x.{suffix}", data) for suffix in ("pyd", "pickle", "pth", "npy", "cls", "jpg")),
        member("x.txt", b"x"),
        END,
    )(folder)


def gzipped(folder: Path) -> dict[str, Any]:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(packer.compress(bytes(1 << 24)) for _ in range(64)) + packer.flush()
    return tar(data)(folder)


def sparse_tar(folder: Path) -> dict[str, Any]:
    """A member of 200 MB, all holes: found too large, and passed over without being held."""
    settings = tar(GOOD, header("x.jpg", 200 << 20))(folder)
    with (folder / "x.tar").open("r+b") as file:
        file.truncate(len(GOOD) + 512 + (200 << 20) + 1024)
    return settings


def deep(levels: int = 100_000) -> bytes:
    return b"[" * levels + b"]" * levels


# Parquet ---------------------------------------------------------------------------------------------------------------


def table(folder: Path, columns: dict[str, Any], **options: Any) -> dict[str, Any]:
    pq.write_table(pa.table(columns), folder / "x.parquet", **options)
    return {"source": "parquet", "input": (folder / "x.parquet",)}


def parquet(columns: dict[str, Any], **options: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: table(folder, columns, **options)


def pickled_type(folder: Path) -> dict[str, Any]:
    """A column whose type is a pickle, which old versions of pyarrow load by themselves."""
    facts = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Bomb(folder / "executed")),
    }
    schema = pa.schema([pa.field("image", pa.binary(), metadata=facts), pa.field("text", pa.string())])
    pq.write_table(pa.table([[JPEG] * 2, ["x"] * 2], schema=schema), folder / "x.parquet")
    return {"source": "parquet", "input": (folder / "x.parquet",)}


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        settings = table(
            folder, {"image": [JPEG] * 50, "text": ["A picture."] * 50}, write_page_checksum=True, use_dictionary=False
        )
        path = folder / "x.parquet"
        path.write_bytes(change(path.read_bytes()))
        return settings

    return write


def flipped(data: bytes) -> bytes:
    return data[:5000] + bytes([data[5000] ^ 255]) + data[5001:]


def nonsense_footer(data: bytes) -> bytes:
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    return data[:start] + b"\xff" * 100 + data[start + 100 :]


def long_footer(data: bytes) -> bytes:
    return data[:-8] + struct.pack("<I", 0x7FFFFFFF) + data[-4:]


def bad_utf8(folder: Path) -> dict[str, Any]:
    text = pa.array([b"good", b"\xff\xfe bad"], pa.binary()).view(pa.string())
    return table(folder, {"image": [JPEG, JPEG], "text": text})


def one_good(image: Any, text: Any = "A picture.", **more: Any) -> Callable[[Path], dict[str, Any]]:
    columns = {"image": pa.array([JPEG, image], pa.binary()), "text": pa.array(["A picture.", text], pa.string()), **more}
    return parquet(columns)


def unfolding(folder: Path) -> dict[str, Any]:
    """140 MB of zeros in some KB."""
    images = pa.array([bytes(140 << 20)], pa.large_binary())
    return table(folder, {"image": images, "text": ["A picture."]}, compression="zstd", use_dictionary=False)


def repeated_value(folder: Path) -> dict[str, Any]:
    """One value of 30 MB that 10 rows share."""
    value = np.random.default_rng(0).bytes(30 << 20)
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 10, pa.int32()), pa.array([value], pa.binary()))
    settings = table(
        folder, {"image": images, "text": ["A picture."] * 10}, dictionary_pagesize_limit=64 << 20, store_schema=False
    )
    return {**settings, "check": "header"}


def repeated_text(folder: Path) -> dict[str, Any]:
    """300 MB of text in 150 KB."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["ab " * (1 << 20)]))
    columns = {"image": [JPEG] * 100, "text": text}
    return table(folder, columns, compression="zstd", dictionary_pagesize_limit=64 << 20, store_schema=False)


def linked_tar(folder: Path) -> dict[str, Any]:
    tar(GOOD, END)(folder)
    (folder / "in").mkdir()
    (folder / "in" / "0.tar").symlink_to(folder / "x.tar")
    return {"source": "webdataset", "input": (folder / "in",)}


def piped_tar(folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "0.tar")
    return {"source": "webdataset", "input": (folder,)}


def lines(*texts: bytes) -> Callable[[Path], dict[str, Any]]:
    """A good row, and these lines, as .jsonl."""

    def write(folder: Path) -> dict[str, Any]:
        settings = {**llava(folder, [], {}), "annotations": folder / "rows.jsonl"}
        settings["annotations"].write_bytes(b"\n".join([json.dumps(row(0, None)).encode(), b"", *texts]))
        return settings

    return write


def crawl(**files: bytes | None) -> Callable[[Path], dict[str, Any]]:
    """A good row, and these files of another, as img2dataset leaves folders; None: a link to a private file."""

    def write(folder: Path) -> dict[str, Any]:
        (folder / "in" / "00000").mkdir(parents=True)
        (folder / "private").write_bytes(b"a private text")
        for name, data in {"0.jpg": JPEG, "0.txt": b"A picture.", **files}.items():
            path = folder / "in" / "00000" / name
            path.symlink_to(folder / "private") if data is None else path.write_bytes(data)
        return {"source": "img2dataset", "input": (folder / "in",)}

    return write


# name -> (source, what must come of it: the reason in the quarantine, or words of the line)
ROWS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "path traversal": (named("../../secret.jpg"), "unsafe_name"),
    "path traversal inside": (named("a/../../secret.jpg"), "unsafe_name"),
    "absolute name": (named("/etc/passwd"), "unsafe_name"),
    "backslashes": (named("..\\secret.jpg"), "unsafe_name"),
    "NUL in a name": (named("a\0.jpg"), "unsafe_name"),
    "control characters in a name": (named("a\x1b[2J\n.jpg"), "unsafe_name"),
    "right-to-left override in a name": (named("a\u202egpj.exe"), "unsafe_name"),
    "half a surrogate pair in a name": (named("a\ud800.jpg"), "unsafe_name"),
    "very long name": (named("x" * 100_000), "missing_image"),
    "very long path": (named("x/" * 5000 + "x.jpg"), "missing_image"),
    "empty name": (named(""), "unsafe_name"),
    "only dots": (named("./."), "unsafe_name"),
    "pipe: as a name": (named("pipe:touch executed"), "missing_image"),
    "URL as a name": (named("http://127.0.0.1:9/x.jpg"), "missing_image"),
    "data: as a name": (named("data:image/png;base64,AAAA"), "missing_image"),
    "folder as an image": (named("folder.jpg"), "missing_image"),
    "named pipe as an image": (named("pipe.jpg"), "missing_image"),
    "symbolic link to itself": (named("loop.jpg"), "missing_image"),
    "endless device as an image": (named("zero.jpg"), "missing_image"),
    "file below a file": (named("x.jpg/y.jpg", **{"x.jpg": JPEG}), "missing_image"),
    "image is a number": (named(3), "malformed"),
    "image is an object": (named({"bytes": "x"}), "malformed"),
    "image is a list of lists": (named([["x.jpg"]]), "malformed"),
    "image is true": (named(True), "malformed"),
    "link to a private picture": (linked_image("x.jpg"), "missing_image"),
    "link to a folder of private pictures": (linked_image("private/x.jpg"), "missing_image"),
    "img2dataset: link to a private text": (crawl(**{"1.jpg": JPEG, "1.txt": None}), "missing_image"),
    "img2dataset: link to a private JSON": (crawl(**{"1.jpg": JPEG, "1.json": None}), "missing_image"),
    "a line that is no JSON": (lines(b'{"id": '), "malformed"),
    "a line that is not UTF-8": (lines(b'{"id": "\xff"}'), "malformed"),
    "a line nested too deeply": (lines(deep()), "malformed"),
    "a line with a number of 5,000 digits": (lines(b'{"id": ' + b"9" * 5000 + b"}"), "malformed"),
    "answer of 5 MB": (turns({"from": "human", "value": "x"}, {"from": "gpt", "value": "y" * (5 << 20)}), "oversized_text"),
    "200,000 empty turns": (turns(*[{"from": who, "value": ""} for who in ("human", "gpt")] * 100_000), "oversized_text"),
    "id of 5 MB": (field(id="x" * (5 << 20)), "oversized_id"),
    "257 images": (lambda folder: llava(folder, [row(0, None), row(1, ["x.jpg"] * 257)], {"x.jpg": JPEG}), "too_many_images"),
    "256 images": (lambda folder: llava(folder, [row(0, None), row(1, ["x.jpg"] * 256)], {"x.jpg": JPEG}), KEPT),
    "sparse terabyte as an image": (huge_file, "oversized_image"),
    "one image a hundred times": (same_image_often, "oversized_image"),
    "empty file": (image_file(b""), "not_an_image"),
    "pickle as an image": (image_file(pickle.dumps(Bomb(Path("executed")))), "not_an_image"),
    "script as an image": (image_file(b"#!/bin/sh\ntouch executed\n"), "not_an_image"),
    "SVG as an image": (image_file(b'<svg xmlns="http://www.w3.org/2000/svg"><script>x</script></svg>'), "not_an_image"),
    "PostScript as an image": (image_file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"), "not_an_image"),
    "TIFF as an image": (image_file(encoded(picture(), "TIFF")), "not_an_image"),
    "PNG of 2 G pixels": (image_file(png(50_000, 50_000)), "oversized_image"),
    "PNG of all pixels there can be": (image_file(png(0x7FFFFFFF, 0x7FFFFFFF)), "oversized_image"),
    "PNG of negative width": (image_file(png(-1, 10)), "oversized_image"),
    "PNG of 0x0": (image_file(png(0, 0)), "not_an_image"),
    "PNG that unfolds to 200 MB more than its pixels": (lambda folder: image_file(png(10, 10, bytes(200 << 20)))(folder), KEPT),
    "PNG with a text of 300 MB": (lambda folder: image_file(png(10, 10, bytes(310), text_chunk()))(folder), "not_an_image"),
    "PNG with too few pixels": (image_file(png(7000, 7000, b"\0")), "damaged_image"),
    "GIF of 0x0": (image_file(b"GIF89a" + bytes(7) + b"\x2c" + bytes(8) + b"\0\2\0\x3b"), "not_an_image"),
    "GIF of 4 G pixels": (image_file(b"GIF89a\xff\xff\xff\xff\0\0\0" + b"\x2c" + bytes(8) + b"\0\2\0\x3b"), "oversized_image"),
    "JPEG of 4 G pixels": (image_file(JPEG.replace(b"\x00\x1e\x00\x28", b"\xff\xfa\xff\xfa", 1)), "oversized_image"),
    "BMP of huge height": (
        image_file(b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 2**31 - 1, -(2**31 - 1), 1, 24, 0, 0, 0, 0, 0, 0)),
        "oversized_image",
    ),
    "WebP cut short": (image_file(encoded(picture(), "WEBP")[:40]), "not_an_image"),
    "conversations is text": (field(conversations="human: hi"), "malformed"),
    "conversations is null": (field(conversations=None), "malformed"),
    "conversations is empty": (field(conversations=[]), "malformed"),
    "conversations is an object": (field(conversations={"from": "human", "value": "x"}), "malformed"),
    "turns are numbers": (turns(1, 2), "malformed"),
    "a turn's text is a list": (turns({"from": "human", "value": ["x"]}, {"from": "gpt", "value": "y"}), "malformed"),
    "a turn's text is NaN": (turns({"from": "human", "value": float("nan")}, {"from": "gpt", "value": "y"}), "malformed"),
    "system turn": (turns({"from": "system", "value": "obey"}, {"from": "gpt", "value": "y"}), "roles"),
    "more marks than images": (
        turns({"from": "human", "value": "<image>" * 10_000}, {"from": "gpt", "value": "y"}),
        "image_marks",
    ),
    "a mark in the answer": (turns({"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}), "image_marks"),
    "half a surrogate pair in a text": (turns({"from": "human", "value": "\udc80"}, {"from": "gpt", "value": "y"}), "bad_text"),
    "half a surrogate pair in an id": (field(id="\ud83d"), "bad_text"),
    "id is a list": (field(id=["x"]), "malformed"),
    "id is NaN": (field(id=float("nan")), "malformed"),
    "id is true": (field(id=True), "malformed"),
    "row is a number": (annotations(json.dumps([row(0, None), 7]).encode()), "malformed"),
    "row is null": (annotations(json.dumps([row(0, None), None]).encode()), "malformed"),
    "a key twice in a row": (
        annotations(json.dumps([row(0, None)]).encode()[:-1] + b', {"image": "a", "image": "b"}]'),
        "malformed",
    ),
    "a key twice in a turn": (
        annotations(json.dumps([row(0, None)]).encode()[:-1] + b', {"conversations": [{"from": "human", "from": "gpt"}]}]'),
        "malformed",
    ),
    "tar: path traversal": (members(("../x.jpg", JPEG)), "unsafe_name"),
    "tar: path traversal inside": (members(("a/../../x.jpg", JPEG)), "unsafe_name"),
    "tar: absolute name": (members(("/x.jpg", JPEG)), "unsafe_name"),
    "tar: backslashes": (members(("..\\x.jpg", JPEG)), "unsafe_name"),
    "tar: control characters in a name": (members(("a\x1b\n.jpg", JPEG)), "unsafe_name"),
    "tar: name that is not UTF-8": (members(("a\udcff.jpg", JPEG)), "unsafe_name"),
    "tar: symbolic link": (special(tarfile.SYMTYPE, "/etc/passwd"), "not_a_file"),
    "tar: hard link": (special(tarfile.LNKTYPE, "good.jpg"), "not_a_file"),
    "tar: character device": (special(tarfile.CHRTYPE), "not_a_file"),
    "tar: block device": (special(tarfile.BLKTYPE), "not_a_file"),
    "tar: named pipe": (special(tarfile.FIFOTYPE), "not_a_file"),
    "tar: traversal in a PAX name": (
        tar(GOOD, pax(b"20 path=../../x.jpg\n"), END),
        "unsafe_name",
    ),
    "tar: sparse member in PAX": (tar(GOOD, pax(b"22 GNU.sparse.major=1\n"), END), "not_a_file"),
    "tar: long name that leaves": (
        tar(
            GOOD, header("././@LongLink", 300, tarfile.GNUTYPE_LONGNAME) + b"../" * 100 + bytes(212), member("x.jpg", JPEG), END
        ),
        "unsafe_name",
    ),
    "tar: pickles": (pickled, "not_an_image"),
    "tar: two members of one name": (members(("x.jpg", JPEG), ("x.jpg", JPEG), ("x.txt", b"x")), "duplicate_member"),
    "tar: caption that is not UTF-8": (members(("x.jpg", JPEG), ("x.txt", b"\xff\xfe\xfd")), "bad_text"),
    "tar: no caption": (members(("x.jpg", JPEG)), "no_text"),
    "tar: no image": (members(("x.txt", b"A picture.")), "missing_image"),
    "tar: deeply nested JSON": (members(("x.jpg", JPEG), ("x.json", deep())), "malformed"),
    "tar: JSON with a key twice": (members(("x.jpg", JPEG), ("x.json", b'{"caption": "a", "caption": "b"}')), "malformed"),
    "tar: JSON that is a list": (members(("x.jpg", JPEG), ("x.json", b"[]")), "malformed"),
    "tar: JSON that is not UTF-8": (members(("x.jpg", JPEG), ("x.json", b'{"caption": "\xff"}')), "malformed"),
    "tar: a number of 10,000 digits": (
        members(("x.jpg", JPEG), ("x.json", b'{"caption": ' + b"9" * 10_000 + b"}")),
        "malformed",
    ),
    "tar: caption that is a number": (members(("x.jpg", JPEG), ("x.json", b'{"caption": -1e999}')), "no_text"),
    "tar: caption with marks": (members(("x.jpg", JPEG), ("x.txt", b"<image><image>")), "image_marks"),
    "tar: id that is an object": (members(("x.jpg", JPEG), ("x.json", b'{"caption": "a", "id": {}}')), "malformed"),
    "tar: 257 images": (
        members(*((f"x.{n}.jpg", JPEG) for n in range(257)), ("x.txt", b"A picture.")),
        "too_many_images",
    ),
    "tar: id of 1,001 characters": (
        members(("x.jpg", JPEG), ("x.json", b'{"caption": "a", "id": "%b"}' % (b"x" * 1001))),
        "oversized_id",
    ),
    "tar: text of 5 MB": (members(("x.jpg", JPEG), ("x.txt", b"x" * (5 << 20))), "oversized_text"),
    "tar: image of 200 MB, all zeros": (sparse_tar, "oversized_image"),
    "tar: PNG of 2 G pixels": (members(("x.png", png(50_000, 50_000)), ("x.txt", b"x")), "oversized_image"),
    "parquet: image is null": (one_good(None), "missing_image"),
    "parquet: image is a pickle": (one_good(pickle.dumps(Bomb(Path("executed")))), "not_an_image"),
    "parquet: caption is null": (one_good(JPEG, None), "no_text"),
    "parquet: caption is not UTF-8": (bad_utf8, "bad_text"),
    "parquet: id of 1,001 characters": (one_good(JPEG, id=["a", "x" * 1001]), "oversized_id"),
    "parquet: 257 images": (
        parquet({"images": [[JPEG], [JPEG] * 257], "text": ["A picture."] * 2}),
        "too_many_images",
    ),
    "parquet: caption of 5 MB": (one_good(JPEG, "x" * (5 << 20)), "oversized_text"),
    "parquet: only a path": (
        parquet({"image": [{"bytes": JPEG, "path": None}, {"bytes": None, "path": "/etc/passwd"}], "text": ["a", "b"]}),
        "missing_image",
    ),
    "parquet: column type that is a pickle": (pickled_type, KEPT),
    "parquet: deeply nested JSON": (
        parquet({"conversations": [json.dumps(row(0, None)["conversations"]), deep().decode()]}),
        "malformed",
    ),
    "parquet: JSON that is no list of turns": (
        parquet({"conversations": [json.dumps(row(0, None)["conversations"]), '{"from": 1}']}),
        "malformed",
    ),
}

REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "annotations that are no JSON": (annotations(b"PK\x03\x04"), "no JSON: Expecting value"),
    "annotations that are not UTF-8": (annotations(b'["\xff"]'), "can't decode byte 0xff in position 2"),
    "annotations that are an object": (annotations(b'{"rows": []}'), "not a list of rows"),
    "annotations that are a text": (annotations(b'"rows"'), "not a list of rows"),
    "annotations that are empty": (annotations(b""), "no JSON: Expecting value"),
    "annotations without rows": (annotations(b"[]"), "not a list of rows"),
    "annotations nested too deeply": (annotations(deep()), "too many lists or objects in each other"),
    "a number of 10,000 digits": (annotations(b"[" + b"9" * 10_000 + b"]"), "10000 digits (char 1)"),
    "annotations that are a folder": (
        lambda folder: {**llava(folder, [], {}), "annotations": folder / "images"},
        "no such file",
    ),
    "annotations that are a named pipe": (
        lambda folder: {**llava(folder, [], {}), "annotations": folder / "images" / "pipe.jpg"},
        "no such file",
    ),
    "tar: a link in the folder": (linked_tar, "--follow-links reads it"),
    "tar: a named pipe in the folder": (piped_tar, "0.tar: it is no regular file"),
    "tar: cut in a header": (tar(GOOD, GOOD[:700][:200]), "x.tar: it is cut at byte"),
    "tar: cut in a member": (tar(GOOD, sample("y"), sample("x")[:900]), "are left, after 1 whole samples"),
    "tar: without its end mark": (tar(GOOD), "it is cut at byte"),
    "tar: empty file": (tar(), "it is cut at byte 0, after 0 whole samples"),
    "tar: two joined": (tar(GOOD, END, sample("x"), END), "more data follows its end mark"),
    "tar: damaged header": (tar(GOOD, b"\1" + sample("x")[1:], END), "no tar header at byte"),
    "tar: gzip bomb": (gzipped, "it is gzip data, not a plain tar"),
    "tar: zip": (tar(b"PK\3\4" + bytes(2000)), "it is zip data"),
    "tar: text": (tar(b"hello " * 200), "no tar header at byte 0"),
    "tar: zeros": (tar(bytes(10_240)), "no rows in it"),
    "tar: size above the file's": (tar(GOOD, header("x.jpg", 1 << 33), JPEG), "announces 8589934592 bytes"),
    "tar: size of 2^95": (
        tar(GOOD, signed(header("x.jpg")[:124] + b"\x80" + b"\xff" * 11 + header("x.jpg")[136:]), END),
        "announces",
    ),
    "tar: negative size": (
        tar(GOOD, signed(header("x.jpg")[:124] + b"\xff" * 12 + header("x.jpg")[136:]), END),
        "announces -1 bytes",
    ),
    "tar: size that is no number": (
        tar(GOOD, signed(header("x")[:124] + b"zzzzzzzzzzz\0" + header("x")[136:]), END),
        "no tar header",
    ),
    "tar: PAX header of 13,000 records": (tar(GOOD, pax(b"5 a=\n" * 13_000), END), "more than 1000 records"),
    "tar: PAX size that is no number": (tar(GOOD, pax(b"11 size=-1\n"), END), "a size that is no number"),
    "tar: PAX size above the file's": (
        tar(GOOD, pax(b"20 size=99999999999\n"), END),
        "announces 99999999999 bytes",
    ),
    "tar: PAX record of nonsense length": (tar(GOOD, pax(b"99999 path=x\n"), END), "nonsense length"),
    "tar: PAX record of no length": (tar(GOOD, pax(b"path=x\n"), END), "nonsense length"),
    "tar: PAX record of length 0": (tar(GOOD, pax(b"0 path=x\n"), END), "nonsense length"),
    "tar: PAX record without a value": (tar(GOOD, pax(b"7 path\n"), END), "without a value"),
    "tar: PAX header of 8 GB": (tar(GOOD, header("x", 1 << 33, tarfile.XHDTYPE), END), "announces a name of 8589934592 bytes"),
    "tar: long name of 8 GB": (tar(GOOD, header("x", 1 << 33, tarfile.GNUTYPE_LONGNAME), END), "announces a name of"),
    "tar: long name of negative size": (
        tar(GOOD, signed(header("x", 0, b"L")[:124] + b"\xff" * 12 + header("x", 0, b"L")[136:]), END),
        "announces a name of -1 bytes",
    ),
    "tar: long name for nobody": (
        tar(GOOD, header("x", 4, b"L") + b"name" + bytes(508), END),
        "follows a header that announces a name",
    ),
    "tar: one name for all": (
        tar(GOOD, header("x", 11, tarfile.XGLTYPE) + b"11 path=xx\n" + bytes(501), sample("x"), END),
        "one name or size to all",
    ),
    "tar: sparse member": (tar(GOOD, header("x.jpg", 0, tarfile.GNUTYPE_SPARSE), END), "sparse member"),
    "tar: link with content": (
        tar(GOOD, header("x.jpg", 512, tarfile.SYMTYPE, "good.jpg"), bytes(512), END),
        "has no content announces some",
    ),
    "parquet: text file": (lambda folder: damaged(lambda data: b"hello")(folder), "not a whole parquet file"),
    "parquet: empty file": (damaged(lambda data: b""), "not a whole parquet file"),
    "parquet: cut": (damaged(lambda data: data[:-20]), "not a whole parquet file"),
    "parquet: footer of 2 GB": (damaged(long_footer), "not a whole parquet file"),
    "parquet: nonsense footer": (damaged(nonsense_footer), "not a whole parquet file"),
    "parquet: damaged page": (damaged(flipped), "not a whole parquet file"),
    "parquet: times as ids, by flag": (
        lambda folder: {**one_good(JPEG, at=pa.array([2**62] * 2, pa.timestamp("us")))(folder), "id_column": "at"},
        "--id-column at: in ",
    ),
    "parquet: one text of 3 MB in 100 rows": (repeated_text, "unfold to far more text than"),
    "parquet: other columns": (parquet({"a": [1], "b": [2]}), "it has the columns a, b"),
    "parquet: image column of numbers": (parquet({"image": [1], "text": ["x"]}), "which holds no image bytes"),
    "parquet: image column of paths": (parquet({"image": ["/etc/passwd"], "text": ["x"]}), "which holds no image bytes"),
    "parquet: text column of bytes": (parquet({"image": [JPEG], "text": [b"x"]}), "neither text nor turns"),
    "parquet: no rows": (parquet({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), "no rows in it"),
    "parquet: 140 MB of zeros": (unfolding, "unfold to"),
}
# every row is bad
MANY = {
    "parquet: one large value in 10 rows": (repeated_value, "not_an_image"),
    "parquet: ids that are NaN": (one_good(JPEG, id=[float("nan"), float("nan")]), KEPT),
    "parquet: ids that are times beyond the year 9999": (one_good(JPEG, id=pa.array([2**62] * 2, pa.timestamp("us"))), KEPT),
    "parquet: ids that are dates beyond the year 9999": (one_good(JPEG, id=pa.array([2**31 - 1] * 2, pa.date32())), KEPT),
}


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def write(name: str, folder: Path) -> None:
    """Write one case's source, and beside it the settings that read it."""
    (folder / "case").mkdir(parents=True)
    settings = (ROWS | REFUSED | MANY)[name][0](folder / "case")
    (folder / "settings.json").write_text(json.dumps(settings, default=str))


def run(folder: Path) -> str:
    """Run one case through the entry point's function. Returns: what it said."""
    settings = json.loads((folder / "settings.json").read_text())
    before = snapshot(folder)
    options = {"engine": "local", "num_workers": 1, "name": "x", "max_bad_fraction": 1.0, "out": folder / "out", **settings}
    said = ""
    try:
        preprocess(Settings(**options))
    except ValueError as error:
        said = str(error)
    written = snapshot(folder) - before
    assert all(path == "out" or path.startswith("out/") for path in written), written
    return said


def check_row(name: str, folder: Path) -> None:
    """One bad row, its neighbour untouched."""
    said = run(folder)
    assert said == "", said
    dataset = ShardDataset(folder / "out")
    file = folder / "out/quarantine/x-000000.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    wanted = (ROWS | MANY)[name][1]
    assert {line["reason"] for line in lines} == ({wanted} if wanted else set()), lines
    assert name in MANY or (len(dataset), len(lines)) == ((1, 1) if wanted else (2, 0)), lines
    for line in lines:
        assert len(line["detail"]) < 400, line
        assert line["detail"].isprintable(), line
        assert str(folder) not in line["detail"], line


def check_refusal(name: str, folder: Path) -> None:
    """One line, and no dataset."""
    said = run(folder)
    assert REFUSED[name][1] in said, f"said {said!r}"
    assert len(said) < 700, said
    assert "\n" not in said, said
    assert not (folder / "out" / "manifest.json").exists()


def main(folder: Path, step: str) -> None:
    """All cases, one after the other: written, or checked.

    The check prints which failed, and the most memory that this process ever had, in bytes.
    """
    failed = {}
    for number, name in enumerate((*ROWS, *REFUSED, *MANY)):
        place = folder / str(number)
        if step == "write":
            write(name, place)
            continue
        before, started = peak_bytes(), time.monotonic()
        try:
            (check_refusal if name in REFUSED else check_row)(name, place)
        except Exception as error:  # any: it is reported, and the next case is tried
            failed[name] = f"{type(error).__name__}: {error}"[:2000]
        print(f"{name}: {time.monotonic() - started:.2f} s, {(peak_bytes() - before) >> 20} MiB more", file=sys.stderr)
        assert not list(place.rglob("executed")), name
    print(json.dumps({"failed": failed, "peak_bytes": peak_bytes()}))


def peak_bytes() -> int:
    """The most memory that this process ever had (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What a process of its own made of all cases."""
    folder = tmp_path_factory.mktemp("hostile")
    work = folder / "work"
    work.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for step in ("write", "check"):
        words = [sys.executable, "-m", "tests.data.test_hostile", str(folder), step]
        done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert not list(work.iterdir()), "something was written where the process ran"
    return json.loads(done.stdout.splitlines()[-1])


def test_there_are_many_cases():
    assert len(ROWS) + len(REFUSED) + len(MANY) >= 60


@pytest.mark.parametrize("name", [*ROWS, *REFUSED, *MANY])
def test_hostile_input_is_named_and_does_no_harm(outcome, name):
    assert name not in outcome["failed"], outcome["failed"][name]


def test_memory_stays_below_one_gigabyte(outcome):
    assert outcome["peak_bytes"] < MAX_BYTES


@pytest.mark.parametrize(
    ("name", "engine", "code"),
    [
        ("path traversal", "local", 0),
        ("tar: pickles", "ray", 0),
        ("tar: cut in a member", "local", 2),
        ("parquet: damaged page", "local", 2),
        ("parquet: damaged page", "ray", 2),
        ("tar: gzip bomb", "local", 2),
    ],
)
def test_the_command_says_one_line(tmp_path, name, code, engine):
    """As a user sees it, with processes and with Ray."""
    settings = (ROWS | REFUSED)[name][0](tmp_path)
    source, inputs = settings.pop("source", "llava"), settings.pop("input", ())
    words = [f"--{key}={value}" for key, value in settings.items()] + (["--input", *map(str, inputs)] if inputs else [])
    command = [sys.executable, "-m", "pipelines.preprocess", "--source", source, "--out", str(tmp_path / "out"), *words]
    command += ["--engine", engine, "--num-workers", "2", "--max-bad-fraction", "0.9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ")
    else:
        assert "1 samples" in done.stdout
        assert "left out" in done.stdout
    assert not (tmp_path.parent / "executed").exists()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
