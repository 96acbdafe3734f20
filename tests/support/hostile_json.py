"""JSON trees made hostile: types exchanged, fields gone or new, depth, numbers without end, names that lead elsewhere.

Flows in: a tree and a random generator; out: JSON text, much of which no JSON writer would write, and what was done to it.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

RAW = {
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "number of 5,000 digits": "9" * 5_000,
    "1e400": "1e400",
    "-1e400": "-1e400",
    "NaN": "NaN",
    "1e-320": "1e-320",
    "lone surrogate": '"\\ud800"',
    "nothing": "",
    "no UTF-8": '"\udcff"',
    "bare word": "null null",
}
"""Values as text that `json.dumps` does not make."""
NAMES = (
    *("..", ".", "", "/", "../victim/new", "../../victim/new", "../victim/precious.txt", "{case}/victim/new"),
    *(
        "a/../../victim/new",
        "a\0b",
        "x\x1b[2J\x1b]0;t\x07",
        "-rf",
        "CON ",
        "a" * 5_000,
        "ü\u202e\u0000".rstrip("\0"),
        "~/x",
        "$(id)",
    ),
)
"""Instead of names and texts; `{case}` is the absolute folder of the case."""
NUMBERS = (0, -1, 1, 2, 3, 5, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10_000_000, 0.5, -0.0, 1e308)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    "5",
    "null",
    "text",
    ["a", "b"],
    {"a": {"b": []}},
)

Place = tuple[str | int, ...]


def places(tree: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of a tree, from the root."""
    yield place
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield from places(value, (*place, name))


def at(tree: Any, place: Place) -> Any:
    """The value at a place."""
    for name in place:
        tree = tree[name]
    return tree


def put(tree: Any, place: Place, value: Any) -> Any:
    """The tree with another value at a place; the root is replaced."""
    if not place:
        return value
    at(tree, place[:-1])[place[-1]] = value
    return tree


def raw(name: str) -> str:
    """A text that `spelled` replaces by `RAW[name]`."""
    return f"@@raw {name}@@"


def spelled(tree: Any, indent: int | None = 1, *, case: str = "") -> bytes:
    """JSON text. `case`: what `{case}` in names becomes."""
    text = json.dumps(tree, indent=indent)
    for name, content in RAW.items():
        text = text.replace(json.dumps(raw(name)), content)
    return text.replace("{case}", case).encode("utf-8", "surrogateescape")


def value(draw: random.Random, old: Any) -> tuple[Any, str]:
    """Another value for one, and what it is."""
    kind = draw.choice(["number", "name", "raw", "other", "near", "near"])
    if kind == "near" and isinstance(old, bool | type(None)):
        kind = "other"
    if kind == "near":
        new = _near(draw, old)
        return new, f"{_short(old)} -> {_short(new)}"
    if kind == "raw":
        name = draw.choice(list(RAW))
        return raw(name), name
    new = draw.choice({"number": NUMBERS, "name": NAMES, "other": OTHERS}[kind])
    return copy.deepcopy(new), _short(new)


def _near(draw: random.Random, old: Any) -> Any:
    """A value of the same type that is not the same."""
    if isinstance(old, int | float):
        return draw.choice([old + 1, old - 1, -old, old * 1_000_000, old * 2, str(old), float(old), [old]])
    if isinstance(old, str):
        return draw.choice(
            [old + "x", old[:-1], old.upper(), old * 3000, "\x1b[1m" + old, "../" + old, old + "/..", [old], {"a": old}]
        )
    if isinstance(old, list):
        return draw.choice(
            [old * 2, old[:-1], old[::-1], [*old, None], [old], {str(n): item for n, item in enumerate(old)}, old * 200]
        )
    return draw.choice([list(old), list(old.values()), {"wrapped": old}, {**old, "": 1}, dict(reversed(old.items()))])


def mutate(draw: random.Random, tree: Any, times: int | None = None) -> tuple[Any, list[str]]:
    """A copy with one to three changes, and what they are."""
    tree = copy.deepcopy(tree)
    told = []
    for _ in range(times or draw.choice([1, 1, 1, 2, 3])):
        all_places = list(places(tree))
        # The long tables of a file hold most of its places: half of the draws are near the root.
        near_root = [place for place in all_places if len(place) <= 2]
        place = draw.choice(near_root if draw.random() < 0.5 else all_places)
        change: Callable[..., tuple[Any, str]] = draw.choice([_replace, _replace, _replace, _remove, _add, _swap])
        tree, what = change(draw, tree, place)
        told.append(f"{'.'.join(map(str, place)) or 'root'}: {what}")
    return tree, told


def _replace(draw: random.Random, tree: Any, place: Place) -> tuple[Any, str]:
    new, what = value(draw, at(tree, place))
    return put(tree, place, new), what


def _remove(draw: random.Random, tree: Any, place: Place) -> tuple[Any, str]:
    if not place:
        return _replace(draw, tree, place)
    del at(tree, place[:-1])[place[-1]]
    return tree, "removed"


def _add(draw: random.Random, tree: Any, place: Place) -> tuple[Any, str]:
    found = at(tree, place)
    new, what = value(draw, 1)
    if isinstance(found, dict):
        name = draw.choice(["extra", "__class__", "", "..", "\x1b[1m"])
        found[name] = new
        return tree, f"{name!r} added: {what}"
    if isinstance(found, list):
        found.insert(draw.randint(0, len(found)), draw.choice([new, *copy.deepcopy(found[:1])]))
        return tree, f"item added: {what}"
    return _replace(draw, tree, place)


def _swap(draw: random.Random, tree: Any, place: Place) -> tuple[Any, str]:
    """Two neighbours exchange their values."""
    found = at(tree, place[:-1]) if place else tree
    names = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    if len(names) < 2:
        return _replace(draw, tree, place)
    one, other = draw.sample(list(names), 2)
    found[one], found[other] = found[other], found[one]
    return tree, f"{one} and {other} swapped"


def _short(what: Any) -> str:
    text = repr(what)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def bytes_changed(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes cut, flipped, doubled, replaced, or put in."""
    kind = draw.choice(["cut", "flip", "flip", "insert", "empty", "double", "zeros", "tail"])
    at_byte = draw.randrange(len(data)) if data else 0
    if kind == "cut":
        return data[:at_byte], f"cut at {at_byte} of {len(data)}"
    if kind == "flip":
        changed = bytearray(data)
        spots = [draw.randrange(len(data)) for _ in range(draw.choice([1, 3, 30]))] if data else []
        for spot in spots:
            changed[spot] ^= 1 << draw.randrange(8)
        return bytes(changed), f"{len(spots)} bits flipped"
    if kind == "insert":
        return data[:at_byte] + draw.randbytes(draw.choice([1, 8, 512])) + data[at_byte:], f"noise put in at {at_byte}"
    if kind == "zeros":
        return data[:at_byte] + bytes(min(64, len(data) - at_byte)) + data[at_byte + 64 :], f"zeros at {at_byte}"
    return {"empty": b"", "double": data * 2, "tail": data + draw.randbytes(512)}[kind], kind
