"""JSON from outside becomes values of the expected types, or one line that names file and field."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from himix_megatron.runtime import typed_json
from himix_megatron.runtime.limits import Count, ShardName, Size


@dataclass(frozen=True)
class Inner:
    size: Size
    name: ShardName = "a-000000"


@dataclass(frozen=True)
class Outer:
    text: str
    rate: float
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    count: Count | None = None
    pair: tuple[int, str] | None = None
    many: tuple[Inner, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    anything: Any = None


WHOLE: dict[str, Any] = {"text": "t", "rate": 1, "flag": True, "kind": "b", "count": 3, "pair": [1, "x"], "many": [{"size": 5}]}


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_values_get_the_types_of_the_fields() -> None:
    found = typed_json.build(Outer, {**WHOLE, "counts": {"x": 1}, "anything": deep(99)}, "file")
    assert found.many == (Inner(5),)
    assert (found.pair, found.count, found.rate, found.kind) == ((1, "x"), 3, 1, "b")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": 5}, "file: text is 5, wanted text"),
        ({"text": None}, "file: text is null, wanted text"),
        ({"rate": "4"}, 'file: rate is "4", wanted a number'),
        ({"rate": True}, "file: rate is true, wanted a number"),
        ({"count": 0}, "file: count is 0, wanted 1 or more"),
        ({"count": 2.0}, "file: count is 2.0, wanted a whole number"),
        ({"flag": 1}, "file: flag is 1, wanted true or false"),
        ({"kind": "c"}, 'file: kind is "c", wanted one of a, b'),
        ({"kind": 1}, "file: kind is 1, wanted one of a, b"),
        ({"pair": [1]}, "file: pair is a list, wanted a list of 2"),
        ({"pair": [1, 2]}, "file: pair[1] is 2, wanted text"),
        ({"many": {}}, "file: many is an object, wanted a list"),
        ({"many": [{"size": -1}]}, "file: many[0].size is -1, wanted 0 to 9223372036854775807"),
        ({"many": [{"size": 10**400}]}, "file: many[0].size is 1"),
        ({"many": [{"size": 5, "name": "../x-000000"}]}, 'file: many[0].name is "../x-000000", wanted a shard\'s name'),
        ({"many": [{}]}, "file: the field many[0].size is missing"),
        ({"many": [7]}, "file: many[0] is 7, wanted an object"),
        ({"counts": {"x": "y"}}, 'file: counts.x is "y", wanted a whole number'),
        ({"anything": deep(101)}, "file: anything has more than 100 lists or objects in each other"),
        ({"more": 1}, "file: it has a field more, which this program does not know"),
    ],
)
def test_another_value_is_one_line_that_names_the_field(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        typed_json.build(Outer, WHOLE | changed, "file")


@pytest.mark.parametrize("value", [[], None, "x", 5, True])
def test_another_thing_than_an_object_is_one_line(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^file: it is .*, wanted an object$"):
        typed_json.build(Outer, value, "file")


@pytest.mark.parametrize(
    "text",
    ["", "{", b"\xff{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ud800"],
    ids=["empty", "cut", "bytes", "lists", "objects", "digits", "surrogate"],
)
def test_what_is_no_json_is_one_line_that_names_the_file(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^their\.json: no JSON"):
        typed_json.parse(text, "their.json")
    file = tmp_path / "x.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"x\.json: no JSON"):
        typed_json.read_object(file)


def test_a_fifo_and_a_huge_file_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(bytes(2))
    for name, limit in (("fifo", 100), ("large", 1)):
        with pytest.raises(ValueError, match=name):
            typed_json.read(tmp_path / name, limit)


def test_limits_within_a_list_are_held() -> None:
    assert typed_json.as_type(tuple[Annotated[int, Count.__metadata__[0]], ...], [1, 2], "file") == (1, 2)
    with pytest.raises(ValueError, match=r"file: \[1\] is 0, wanted 1 or more"):
        typed_json.as_type(tuple[Count, ...], [1, 0], "file")
