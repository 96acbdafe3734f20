"""Files and folders made hostile: links, FIFOs, odd names in place of files; archives, tables and tensors that lie.

Flows in: the copy of a good folder and a random generator; out: what was done to it. Checksums and fingerprints are made right
again where the format has them, so that a change gets past them to what reads the content.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from himix_megatron.data.shards import shard_format
from tests.support import hostile_json

ODD_NAMES = ("a\nb", "\x1b[2Jx", "-rf", "x" * 255, "ü\udcff", " ", "step-٠٠٠٠٠٠٠١", ".partial-x", "manifest.json.bak", "$(id)")

_READ_BYTES = 32 << 20


def files_of(folder: Path) -> list[Path]:
    """The regular files below a folder, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def content(path: Path) -> bytes:
    """A file that an earlier change has left as a file. Raises: OSError."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _READ_BYTES:
        raise OSError(f"{path} is no longer a small file")
    return path.read_bytes()


def strange_file(draw: random.Random, folder: Path, victim: Path) -> str:
    """One file of a folder becomes a link, a FIFO or a folder, or one with an odd name comes to it."""
    path = draw.choice(
        [*files_of(folder), *[place for place in sorted(folder.rglob("*")) if place.is_dir()][:3], folder / "new"]
    )
    kind = draw.choice(
        ["link", "link", "dangling", "loop", "fifo", "fifo", "folder", "gone", "odd name", "lock link", "big", "device"]
    )
    shown = path.relative_to(folder)
    if kind == "odd name":
        name = draw.choice(ODD_NAMES)
        os.mkfifo(path.parent / name) if draw.random() < 0.3 else (path.parent / name).write_text("odd")
        return f"{shown}: {name!r} beside it"
    if kind == "lock link":
        places = [place for place in (folder, *folder.rglob("*")) if place.is_dir() and not place.is_symlink()]
        place = draw.choice(places) / draw.choice(
            [".lock", ".partial-x", "manifest.json", "latest", "evaluation", "lengths", "tensorboard"]
        )
        if not os.path.lexists(place):
            place.symlink_to(victim / draw.choice(["precious.txt", "secret.txt", "new", "."]))
        return f"{place.relative_to(folder)}: a link out"
    before = content(path) if path.is_file() else b""
    if path.is_dir() and kind not in ("link", "dangling", "odd name"):
        kind = "link"
    if path.is_dir():
        aside = path.with_name(f"{path.name}.aside")
        path.rename(aside)
    elif path.exists():
        path.unlink()
    if kind == "link":
        path.symlink_to(victim / draw.choice(["precious.txt", "secret.txt", "."]))
    elif kind == "dangling":
        path.symlink_to(victim / "new")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        (path / "inner").mkdir(parents=True)
    elif kind == "device":
        path.symlink_to(draw.choice(["/dev/zero", "/dev/full", "/dev/tty"]))
    elif kind == "big":
        path.write_bytes(before)
        os.truncate(path, draw.choice([1 << 31, 1 << 36]))  # sparse
    return f"{shown}: {kind}"


def changed_bytes(draw: random.Random, folder: Path) -> str:
    """Bytes of one file change."""
    path = draw.choice(files_of(folder))
    data, what = hostile_json.bytes_changed(draw, content(path))
    path.write_bytes(data)
    return f"{path.relative_to(folder)}: {what}"


def changed_json(
    draw: random.Random, path: Path, case: Path, *, lines: bool = False, then: Callable[[Any], Any] = lambda tree: tree
) -> str:
    """A JSON file, or one line of a file of them, is mutated. `then`: makes checksums in the tree right."""
    if lines:
        rows = content(path).decode().splitlines()
        number = draw.randrange(len(rows))
        tree, told = hostile_json.mutate(draw, json.loads(rows[number]))
        rows[number] = hostile_json.spelled(tree, None, case=str(case)).decode("utf-8", "surrogateescape")
        path.write_bytes("\n".join([*rows, ""]).encode("utf-8", "surrogateescape"))
        return f"{path.name}:{number}: {'; '.join(told)}"
    tree, told = hostile_json.mutate(draw, json.loads(content(path)))
    path.write_bytes(hostile_json.spelled(then(tree), case=str(case)))
    return f"{path.name}: {'; '.join(told)}"


# ---- shard datasets ------------------------------------------------------------------------------------------------


def resigned(tree: Any) -> Any:
    """A manifest with the fingerprint of what it says now; left alone where there is no such thing."""
    if isinstance(tree, dict) and "fingerprint" in tree:
        rest = {name: value for name, value in tree.items() if name != "fingerprint"}
        tree["fingerprint"] = shard_format.hash_of(rest)
    return tree


def digest_of(path: Path) -> dict[str, Any]:
    """A FileDigest's fields."""
    data = content(path)
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def sign_shard(data: Path, name: str) -> None:
    """Receipt and manifest agree with the shard's files again."""
    paths = shard_format.shard_paths(data, name)
    found = {"tar": digest_of(paths.tar), "index": digest_of(paths.index)}
    receipt = json.loads(content(paths.receipt))
    paths.receipt.write_text(json.dumps(receipt | found, indent=1) + "\n")
    manifest = json.loads(content(data / "manifest.json"))
    manifest["shards"] = [shard | found if shard["name"] == name else shard for shard in manifest["shards"]]
    (data / "manifest.json").write_text(json.dumps(resigned(manifest), indent=1) + "\n")


def changed_index(draw: random.Random, data: Path) -> str:
    """Fields of an index change, and its checksum, receipt and manifest with them."""
    path = draw.choice(sorted((data / "shards").glob("*.idx")))
    samples, images = (table.copy() for table in shard_format.decode_index(content(path)))
    told = []
    for _ in range(draw.choice([1, 1, 3])):
        table = draw.choice([samples, images])
        row, field = draw.randrange(len(table)), draw.choice(table.dtype.names or ())
        largest = 2 ** (8 * table.dtype[field].itemsize) - 1
        value = draw.choice([0, 1, largest, largest // 2, int(table[row][field]) + 1, int(table[row][field]) * 2, 512]) % (
            largest + 1
        )
        table[row][field] = value
        told.append(f"{field}[{row}] = {value}")
    path.write_bytes(shard_format.encode_index(samples, images))
    sign_shard(data, path.stem)
    return f"{path.name}: {'; '.join(told)}"


def changed_sample(draw: random.Random, data: Path, case: Path) -> str:
    """A sample's text in the tar is mutated and all checksums above it made right, or noise takes its image's place."""
    path = draw.choice(sorted((data / "shards").glob("*.idx")))
    samples, images = (table.copy() for table in shard_format.decode_index(content(path)))
    tar = bytearray(content(path.with_suffix(".tar")))
    is_text = draw.random() < 0.8 or not len(images)
    table = samples if is_text else images
    record = table[draw.randrange(len(table))]
    offset, size = int(record["offset"]), int(record["size"])
    old = bytes(tar[offset : offset + size])
    if is_text:
        tree, told = hostile_json.mutate(draw, json.loads(old))
        new, what = hostile_json.spelled(tree, None, case=str(case)), "; ".join(told)
    else:
        new, what = hostile_json.bytes_changed(draw, old)
    record["offset"], record["size"], record["crc32"] = len(tar), len(new), zlib.crc32(new)
    path.with_suffix(".tar").write_bytes(tar + new)
    path.write_bytes(shard_format.encode_index(samples, images))
    sign_shard(data, path.stem)
    return f"{path.name}: {'text' if is_text else 'image'} {what}"


def changed_column(draw: random.Random, data: Path) -> str:
    """A text column's numbers change, its checksum with them."""
    path = draw.choice(sorted((data / "lengths").rglob("*.text")))
    receipt = shard_format.receipt_from_json(content(shard_format.shard_paths(data, path.stem).receipt).decode())
    column = shard_format.decode_text_column(content(path), receipt)
    parts = [part.copy() for part in column]
    part = draw.choice([part for part in parts if len(part)])
    part[draw.randrange(len(part))] = value = draw.choice([0, 1, 2**31, 2**32 - 1, 5, 100_000])
    path.write_bytes(shard_format.encode_text_column(shard_format.TextColumn(*parts), receipt))
    return f"{path.name}: a number is {value}"


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def sign_checkpoint(folder: Path) -> None:
    """A checkpoint's manifest says what its files are now."""
    from himix_megatron.checkpoint.manifest import MANIFEST, sync_and_digest, write_manifest

    names = [
        str(path.relative_to(folder))
        for path in files_of(folder)
        if path.name != MANIFEST and path.stat().st_size <= _READ_BYTES
    ]
    write_manifest(folder, sync_and_digest(folder, names))


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


# ---- archives, tables, tensors -------------------------------------------------------------------------------------


def changed_tar(draw: random.Random, path: Path, case: Path) -> str:
    """A tar with members that lie about their names, sizes and kinds."""
    with tarfile.open(fileobj=io.BytesIO(content(path))) as old:
        members = [(info, old.extractfile(info).read() if info.isreg() else b"") for info in old]  # type: ignore[union-attr]
    blocks, told = [], []
    chosen = {draw.randrange(len(members)) for _ in range(draw.choice([1, 1, 2, 4]))}
    for number, (info, data) in enumerate(members):
        if number in chosen:
            info, data, what = _changed_member(draw, info, data, case)
            told.append(f"member {number}: {what}")
        try:
            blocks.append(_member(draw, info, data, lies=number in chosen and draw.random() < 0.3))
        except (ValueError, UnicodeError):
            continue
    path.write_bytes(b"".join(blocks) + (bytes(1024) if draw.random() < 0.9 else b""))
    return f"{path.name}: {'; '.join(told)}"


def _changed_member(draw: random.Random, info: tarfile.TarInfo, data: bytes, case: Path) -> tuple[tarfile.TarInfo, bytes, str]:
    kind = draw.choice(["name", "kind", "json", "json", "bytes", "size", "pax", "digits", "empty", "twice"])
    stem, _, suffix = info.name.partition(".")
    if kind == "name":
        info.name = draw.choice(
            [name.replace("{case}", str(case)) for name in hostile_json.NAMES if "\0" not in name and len(name) < 200]
        )
        return info, data, f"name {info.name[:40]!r}"
    if kind == "kind":
        info.type = draw.choice(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"S", b"Z", b"L", b"x"]
        )
        info.linkname = draw.choice([str(case / "victim" / "secret.txt"), "../victim/secret.txt", info.name])
        return info, data, f"type {info.type!r}"
    if kind == "json" and suffix.endswith("json"):
        tree, told = hostile_json.mutate(draw, json.loads(data))
        return info, hostile_json.spelled(tree, None, case=str(case)), "; ".join(told)
    if kind == "digits":
        info.name = f"{stem}.{'9' * draw.choice([6, 90])}.jpg"
        return info, data, "many digits"
    if kind == "pax":
        info.pax_headers = {
            draw.choice(["path", "size", "GNU.sparse.map", "linkpath", "mtime"]): draw.choice(
                ["9" * 3000, "-1", "../victim/new", "x"]
            )
        }
        return info, data, f"pax {list(info.pax_headers)}"
    if kind == "size":
        info.size = draw.choice([0, 1, 10**9, 8**11 - 1, 8**11, 2**63])
        return info, data, f"size {info.size}"
    if kind == "empty":
        return info, b"", "empty"
    if kind == "twice":
        return info, data + data, "twice as long"
    data, what = hostile_json.bytes_changed(draw, data)
    return info, data, what


def _member(draw: random.Random, info: tarfile.TarInfo, data: bytes, *, lies: bool) -> bytes:
    """Header and content. `lies`: the header's size need not be the content's."""
    if not lies and info.size < 10**8:
        info.size = len(data)
    form = draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]) if info.pax_headers else tarfile.GNU_FORMAT
    return info.tobuf(form, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def changed_parquet(draw: random.Random, path: Path) -> str:
    """A table with columns of other types, nulls, huge values or nested lists; or the file's bytes change."""
    if draw.random() < 0.3:
        data, what = hostile_json.bytes_changed(draw, content(path))
        path.write_bytes(data)
        return f"{path.name}: {what}"
    table = pq.read_table(io.BytesIO(content(path)))
    number = draw.randrange(table.num_columns)
    name, rows = table.column_names[number], table.num_rows
    made: dict[str, Callable[[], Any]] = {
        "nulls": lambda: pa.nulls(rows),
        "integers": lambda: pa.array([draw.choice([0, -1, 2**62]) for _ in range(rows)]),
        "floats": lambda: pa.array([float("nan")] * rows),
        "timestamps": lambda: pa.array([2**62] * rows, pa.timestamp(draw.choice(["s", "us", "ns"]))),
        "dates": lambda: pa.array([2**30] * rows, pa.date32()),
        "durations": lambda: pa.array([2**62] * rows, pa.duration("s")),
        "decimals": lambda: pa.array([1] * rows, pa.int64()).cast(pa.decimal128(38, 2)),
        "bytes": lambda: pa.array([draw.randbytes(20) for _ in range(rows)]),
        "lists": lambda: pa.array([[["a"], None]] * rows),
        "structs": lambda: pa.array([{"bytes": None, "path": "../victim/secret.txt"}] * rows),
        "long texts": lambda: pa.array(["x" * 3_000_000] * rows).dictionary_encode(),
        "names": lambda: pa.array([draw.choice(hostile_json.NAMES).replace("\0", "") for _ in range(rows)]),
        "maps": lambda: pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int64())),
        "turns": lambda: pa.array([[{"from": None, "value": "x"}]] * rows),
    }
    kind = draw.choice(list(made))
    table = table.set_column(number, name if draw.random() < 0.9 else draw.choice(["", "..", "\x1b[1m", "image"]), made[kind]())
    if draw.random() < 0.1:
        table = table.append_column(name, made["integers"]())
    pq.write_table(table, path)
    return f"{path.name}: column {name} of {kind}"


def changed_safetensors(draw: random.Random, path: Path, case: Path) -> str:
    """The header says something else than what is there."""
    data = content(path)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    kind = draw.choice(["header", "header", "header", "field", "length", "bytes"])
    if kind == "bytes":
        changed, what = hostile_json.bytes_changed(draw, data)
        path.write_bytes(changed)
        return f"{path.name}: {what}"
    if kind == "length":
        length = draw.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        return f"{path.name}: header of {length} bytes"
    if kind == "field":
        name = draw.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        change = draw.choice(["shape", "dtype", "offsets", "name", "gone"])
        if change == "shape":
            entry["shape"] = draw.choice([[], [0], [2**40], [*entry["shape"], 1], entry["shape"][::-1], [-1], [2**63, 2]])
        elif change == "dtype":
            entry["dtype"] = draw.choice(["I64", "BOOL", "F8_E4M3", "X", "BF16", "F64", "U8"])
        elif change == "offsets":
            entry["data_offsets"] = draw.choice([[0, 0], [-1, 5], [0, 2**62], entry["data_offsets"][::-1]])
        else:
            header.pop(name)
            header |= {draw.choice(["x", "../victim/new", name + ".weight"]): entry} if change == "name" else {}
        told = [f"{name}: {change}"]
    else:
        header, told = hostile_json.mutate(draw, header)
    text = hostile_json.spelled(header, None, case=str(case))
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length if kind != "length" else 8 :])
    return f"{path.name}: {'; '.join(told)}"


def parquet_of(rows: list[dict[str, Any]], path: Path) -> None:
    """A good table."""
    pq.write_table(pa.Table.from_pylist(rows), path)


def tar_of(members: dict[str, bytes], path: Path) -> None:
    """A good tar."""
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
