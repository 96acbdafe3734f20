"""Flags of a dataclass, `--section.field value` for nested ones. Flows in: words; out: values, or one line for a mistake.

Both `-` and `_` work inside names, `--name=value` as `--name value`. A tuple takes all words up to the next flag; a bool is set
by `--name` and cleared by `--no-name`; None is written None; the later of two equal flags counts. The string below a field is
its help.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from himix_megatron.config import check_limits
from himix_megatron.config.serialization import RENAMED_FIELDS

Settings = TypeVar("Settings")
Group = TypeVar("Group", bound=Hashable)
MAX_WIDTH = 100
"""Columns of a help text, at most."""


@dataclass(frozen=True)
class Word:
    """In a field's Annotated type: the field is given without a flag, by its position."""

    name: str
    """How the help calls it."""


def parse_settings(cls: type[Settings], argv: Sequence[str], program: str, description: str | None = None) -> Settings:
    """Words as an instance of a dataclass, whose numbers are within the limits in their types.

    Raises: ValueError (one line) for a mistake; SystemExit(0) after `--help`.
    """
    given = read_flags(cls, argv, program, description=description or inspect.getdoc(cls) or "")
    values, hints = _values(cls, given, _default), leaf_hints(cls)
    required = [item.name for item in dataclasses.fields(cls) if _default(item) is dataclasses.MISSING]  # type: ignore[arg-type]
    if missing := [_word(hints[name]) or flag(name) for name in required if name not in values]:
        raise ValueError(f"{' and '.join(missing)} must be given ({program} --help tells more)")
    made = cls(**values)
    check_limits(made)
    return made


def read_flags(
    cls: type, argv: Sequence[str], program: str, *, description: str = "", defaults: Any = None, without: str = ""
) -> dict[str, Any]:
    """The values that words give, by dotted field name. `defaults`: an instance, whose values the help shows.
    `without`: a field that has no flag.

    Raises: ValueError (one line); SystemExit(0) after `--help`.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(cls, program, description, defaults, without))
        raise SystemExit(0)
    hints = {name: hint for name, hint in leaf_hints(cls).items() if name != without}
    switches = {name for name, hint in hints.items() if hint is bool}
    off = {_off(name): name for name in switches}
    words_by_place = [name for name, hint in hints.items() if _word(hint)]
    values: dict[str, Any] = {}
    loose: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            loose.append(word)
            continue
        shown, equals, joined = word.partition("=")
        name = shown[2:].replace("-", "_")
        if name in switches or name in off:
            if equals or (words and words[0].lower() in ("true", "false", "yes", "no", "on", "off", "1", "0")):
                value = joined if equals else words[0]
                raise ValueError(
                    f"{flag(off.get(name, name))} takes no value ({value}): write it alone, or --no- before its last part"
                )
            values[off.get(name, name)] = name in switches
        elif name in hints and name not in words_by_place:
            until = next((i for i, following in enumerate(words) if following.startswith("--")), len(words))
            most = 1 if (count := _count(hints[name])) is None else count
            taken = [joined] if equals else words[: until if count == 0 else min(most, until)]
            if not equals:
                del words[: len(taken)]
            if len(taken) < most and count != 0:
                raise ValueError(f"{flag(name)} needs {'a value' if most == 1 else f'{most} values'}")
            values[name] = _convert(hints[name], taken, flag(name))
        else:
            raise ValueError(f"unknown setting {shown}: {_nearest(name, list(hints))} ({program} --help lists all)")
    for name in words_by_place:
        takes_all = _count(hints[name]) is not None
        if loose:
            values[name] = _convert(hints[name], loose if takes_all else loose[:1], _word(hints[name]))
            loose = [] if takes_all else loose[1:]
    if loose:
        raise ValueError(f"{' '.join(loose)} belongs to no setting: settings are --name value")
    return values


def split_flags(words: Sequence[str], group: Callable[[str], Group]) -> dict[Group, list[str]]:
    """Words by group, each flag with its values. `group`: of a flag's name (with `_`); of "" for words before any flag."""
    found: dict[Group, list[str]] = {}
    current = group("")
    for word in words:
        if word.startswith("--") or word == "-h":
            current = group(word.lstrip("-").split("=", 1)[0].replace("-", "_"))
        found.setdefault(current, []).append(word)
    return found


def flag(name: str) -> str:
    """A field as the help prints it: `train.global_batch_samples` -> `--train.global-batch-samples`."""
    return "--" + name.replace("_", "-")


def _off(name: str) -> str:
    """What clears a bool: `log.ledger` -> `log.no_ledger`."""
    return re.sub(r"([^.]*)$", r"no_\1", name, count=1)


def leaf_hints(cls: type, prefix: str = "") -> dict[str, Any]:
    """The type of each field, by dotted name, those of nested dataclasses included."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        found |= leaf_hints(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}  # type: ignore[arg-type]
    return found


def with_changes(settings: Any, given: Mapping[str, Any]) -> Any:
    """A dataclass with other values, by dotted name."""
    return dataclasses.replace(settings, **_values(type(settings), given, lambda item: getattr(settings, item.name)))


def _values(cls: type, given: Mapping[str, Any], old: Callable[[dataclasses.Field[Any]], Any]) -> dict[str, Any]:
    """The values of a class's own fields that change: those that are given, and sections in which one is given."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        inner = {name.partition(".")[2]: value for name, value in given.items() if name.startswith(f"{item.name}.")}
        if item.name in given or inner:
            values[item.name] = given[item.name] if item.name in given else with_changes(old(item), inner)
    return values


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


# ---- types -----------------------------------------------------------------------------------------------------------


def _word(hint: Any) -> str:
    """The name of a positional field; "" for others."""
    return next((item.name for item in getattr(hint, "__metadata__", ()) if isinstance(item, Word)), "")


def _bare(hint: Any) -> tuple[Any, bool]:
    """A type without Annotated and None, and whether None is allowed. Of a union the first type counts."""
    if typing.get_origin(hint) is Annotated:
        return _bare(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        return _bare(next(part for part in parts if part is not types.NoneType))[0], types.NoneType in parts
    return hint, False


def _count(hint: Any) -> int | None:
    """Number of words that a tuple takes, 0 for any number; None for a single value."""
    parts = typing.get_args(bare) if typing.get_origin(bare := _bare(hint)[0]) is tuple else None
    return None if parts is None else 0 if parts[-1] is ... else len(parts)


def _convert(hint: Any, words: Sequence[str], shown: str) -> Any:
    """Words as a value. Raises: ValueError naming the word that does not fit."""
    bare, can_be_none = _bare(hint)
    if can_be_none and list(words) == ["None"]:
        return None
    if _count(hint) is not None:
        parts = typing.get_args(bare)
        kinds = [parts[0]] * len(words) if parts[-1] is ... else parts
        return tuple(_convert(kind, [word], shown) for kind, word in zip(kinds, words, strict=True))
    (word,) = words
    if typing.get_origin(bare) is Literal:
        if word in (choices := [str(choice) for choice in typing.get_args(bare)]):
            return typing.get_args(bare)[choices.index(word)]
        wanted = f"one of {', '.join(choices)}"
    else:
        assert bare in (str, int, float, Path), f"{shown} has a type that flags cannot give: {bare}"
        try:
            return bare(word)
        except ValueError:
            wanted = "a whole number" if bare is int else "a number"
    raise ValueError(f"{shown} is {word!r}: wanted {wanted}{' or None' if can_be_none else ''}")


def _nearest(name: str, known: list[str]) -> str:
    """A hint for an unknown field: its new name; else the same last part in any section; else the closest spelling."""
    if (now := RENAMED_FIELDS.get(name)) in known:
        return f"it is now {flag(str(now))}"
    leaf = name.rsplit(".", 1)[-1].lower()
    near = [item for item in known if item.rsplit(".", 1)[-1] == leaf]
    near = near or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if not near:
        leaves = difflib.get_close_matches(leaf, [item.rsplit(".", 1)[-1] for item in known], n=1, cutoff=0.6)
        near = [item for item in known if item.rsplit(".", 1)[-1] in leaves]
    return f"did you mean {' or '.join(map(flag, near[:3]))}?" if near else "no setting has a name like it"


# ---- help ------------------------------------------------------------------------------------------------------------


def help_text(cls: type, program: str, description: str, defaults: Any = None, without: str = "") -> str:
    """Usage, description, and every field with its type, meaning and default, a paragraph for each section."""
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
    places = [f" {_word(hint)}" for hint in leaf_hints(cls).values() if _word(hint)]
    own, sections = _fields_help(cls, "", defaults, width, without)
    return "\n".join(
        [f"usage: {program}{''.join(places)} [--name value ...]", "", *prose(description, width), "", *own, *sections]
    )


def _fields_help(cls: type, prefix: str, defaults: Any, width: int, without: str = "") -> tuple[list[str], list[str]]:
    """Lines of a class's own fields, and of its sections."""
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    own: list[str] = []
    sections: list[str] = []
    for item in dataclasses.fields(cls):
        if item.name == without:
            continue
        name, hint = prefix + item.name, hints[item.name]
        default = _default(item) if defaults is None else getattr(defaults, item.name)
        if dataclasses.is_dataclass(hint):
            below, deeper = _fields_help(hint, f"{name}.", None if default is dataclasses.MISSING else default, width)  # type: ignore[arg-type]
            title = textwrap.fill(f"{name}: {inspect.getdoc(hint) or ''}", width)
            sections += ["", *title.split("\n"), *below, *deeper]
            continue
        known = "required" if default is dataclasses.MISSING else f"default: {_shown(default)}"
        own.append(f"  {_word(hint) or flag(name)}{'' if hint is bool or _word(hint) else f' {_kind(hint)}'}")
        if hint is bool:
            own[-1] += f", {flag(_off(name))}"
        text = f"{' '.join(docs.get(item.name, '').split())} ({known})"
        own += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return own, sections


def _kind(hint: Any) -> str:
    """A type in the help: INT, llama|qwen2, TEXT ..., INT|None."""
    bare, can_be_none = _bare(hint)
    parts = typing.get_args(bare)
    if typing.get_origin(bare) is Literal:
        kind = "|".join(map(str, parts))
    elif typing.get_origin(bare) is tuple:
        kind = f"{_kind(parts[0])} ..." if parts[-1] is ... else " ".join(map(_kind, parts))
    else:
        kind = {str: "TEXT", int: "INT", float: "FLOAT", Path: "PATH"}[bare]
    return kind + ("|None" if can_be_none else "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "off" if value is False else "on" if value is True else str(value)


def prose(text: str, width: int) -> list[str]:
    """Paragraphs wrapped; indented lines as they are; `Hardware: ...` and its like begin a line of their own."""
    lines: list[str] = []
    paragraph: list[str] = []

    def end() -> None:
        fact = bool(paragraph) and re.match(r"[A-Z]\w+: ", paragraph[0]) is not None
        lines.extend(textwrap.wrap(" ".join(paragraph), width, subsequent_indent="  " * fact, break_on_hyphens=False))
        paragraph.clear()

    for line in text.strip().split("\n"):
        if not line.strip() or line.startswith("  "):
            end()
            lines.append(line.rstrip())
        else:
            if re.match(r"[A-Z]\w+: ", line):
                end()
            paragraph.append(line.strip())
    end()
    return lines


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = text
    return found
