"""JSON that came from outside, as values of the types that a program expects. Everything that is read as JSON is read here.

Flows in: text, or a file; out: a value, or a dataclass whose fields have the types of its hints and the limits in them. What is
wrong is one line that names the file and the field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from .untrusted_files import MAX_SHOWN, read_regular

T = TypeVar("T")

MAX_FILE_BYTES = 256 << 20
"""Of a file of settings, sizes or names. The manifest of a million shards has about as many."""
MAX_DEPTH = 100
"""Objects and lists in each other, where a field takes any value."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null", dict: "an object"}


def parse(text: str | bytes, where: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of JSON text. `where`: what to call it in errors; `pairs`: makes the objects, as json's object_pairs_hook.

    Raises: ValueError for text that is no JSON, no UTF-8, too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError(f"{where}: no JSON that can be read: too many lists or objects in each other") from None
    except ValueError as error:
        what = str(error).partition("; use sys.set_int")[0]  # of a number with thousands of digits
        raise ValueError(f"{where}: no JSON: {what}") from None


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """As `parse`. Raises: ValueError also for another value than an object."""
    return _object(parse(text, where), where)


def read(path: Path, limit: int = MAX_FILE_BYTES) -> Any:
    """The value in a file. Raises: FileNotFoundError, OSError; ValueError naming the file, as `parse` and `read_regular`."""
    return parse(read_regular(path, limit), str(path))


def read_object(path: Path, limit: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """As `read`. Raises: ValueError also for another value than an object."""
    return _object(read(path, limit), str(path))


def build(cls: type[T], values: Any, where: str, *, field: str = "") -> T:
    """A dataclass from an object with its fields, nested ones alike.

    Args: `where`: the file or text, and `field` the place in it, for errors.
    Raises: ValueError for a field that is unknown, missing, of another type or beyond its limit, or as the class refuses it.
    """
    values = _object(values, where, field)
    hints, prefix = _hints(typing.cast(Any, cls)), f"{field}." if field else ""
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"{where}: it has a field {prefix}{unknown[0]}, which this program does not know")
    built = {name: as_type(hints[name], value, where, prefix + name) for name, value in values.items()}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if item.name not in built and not has_default:
            raise ValueError(f"{where}: the field {prefix}{item.name} is missing")
    try:
        return cls(**built)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def as_type(hint: Any, value: Any, where: str, field: str = "") -> Any:
    """A value of JSON as one of this type: lists become tuples where the type is one, objects dataclasses.

    Raises: ValueError for a value of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        value = as_type(arguments[0], value, where, field)
        for limit in arguments[1:]:
            if not limit.allows(value):
                raise _wrong(value, str(limit), where, field)
        return value
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where, field)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _wrong(value, f"one of {', '.join(map(str, arguments))}", where, field)
        return value
    if origin in (tuple, list) and isinstance(value, list):
        is_open = origin is list or arguments[-1:] == (...,)
        if not is_open and len(value) != len(arguments):
            raise _wrong(value, f"a list of {len(arguments)}", where, field)
        inner = arguments[:1] * len(value) if is_open else arguments
        return origin(
            as_type(each, item, where, f"{field}[{n}]") for n, (each, item) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {name: as_type(arguments[1], item, where, f"{field}.{name}") for name, item in value.items()}
    if hint is Any:
        _check_depth(value, where, field)
        return value
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, field=field)
    if hint is float and type(value) is int and abs(value) < 1 << 1000:  # above, it fits into no float
        return value
    if origin is None and type(value) is (type(None) if hint is None else hint):
        return value
    raise _wrong(value, _WORDS.get(origin or hint, "a list" if origin in (tuple, list) else str(hint)), where, field)


def _object(value: Any, where: str, field: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, _WORDS[dict], where, field)
    return value


def _one_of(hints: tuple[Any, ...], value: Any, where: str, field: str) -> Any:
    if value is None and type(None) in hints:
        return None
    others = [hint for hint in hints if hint is not type(None)]
    for hint in others[:-1]:
        try:
            return as_type(hint, value, where, field)
        except ValueError:
            continue
    return as_type(others[-1], value, where, field)


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _check_depth(value: Any, where: str, field: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError(f"{where}: {field or 'it'} has more than {MAX_DEPTH} lists or objects in each other")


def _wrong(value: Any, wanted: str, where: str, field: str) -> ValueError:
    shown = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else json.dumps(value)[:MAX_SHOWN]
    return ValueError(f"{where}: {field or 'it'} is {shown}, wanted {wanted}")
