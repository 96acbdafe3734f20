"""An argparse parser from a dataclass: `--section.field value` for nested ones. Flows in: words; out: values, or one line.

Both `-` and `_` work inside names. A tuple takes all words up to the next flag; a bool is set by `--name` and cleared by
`--no-name`; None is written None. The string below a field is its help.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from himix_megatron.config import check_limits
from himix_megatron.config.serialization import COUNTED_IMAGES, RENAMED_FIELDS, current_fields

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
    hints = {name: hint for name, hint in leaf_hints(cls).items() if name != without}
    known = {flag(name) for name, hint in hints.items() if not _word(hint)}
    known |= {_off(name) for name, hint in hints.items() if hint is bool} | {"--help"}
    tuples = {flag(name) for name, hint in hints.items() if _count(hint) is not None}
    # A command with words of its own may have one right behind a switch.
    switches = {} if any(map(_word, hints.values())) else {flag(n): _off(n) for n, hint in hints.items() if hint is bool}
    wants_help = bool({"-h", "--help"} & set(argv))
    words: list[str] = []
    for word in argv:
        last = words[-1] if words else ""
        if last in {*switches, *switches.values()} and word.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            raise ValueError(f"{last} takes no value ({word}): write it alone; {switches.get(last, last)} clears it")
        shown, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        name = shown.replace("_", "-")
        # Behind "=" argparse takes one word of a tuple, as its own word several; but a value like "---" only behind "=".
        words += [name, value] if name in tuples and equals and not value.startswith("--") else [name + equals + value]
        if name and name not in known and not wants_help:
            raise ValueError(f"unknown setting {shown}: {_nearest(name[2:], list(hints))} ({program} --help lists all)")
    try:
        found, rest = _parser(cls, program, description, defaults, without).parse_known_intermixed_args(words)
    except argparse.ArgumentError as error:
        said = re.sub("expected (one argument|[0-9]+ arguments)", _needs, str(error.message))
        said = re.sub("ignored explicit argument (.*)", r"takes no value (\1)", said)
        raise ValueError(f"{error.argument_name} {said}") from error
    if rest:
        raise ValueError(f"{' '.join(rest)} belongs to no setting: settings are --name value")
    return {name: _as_tuple(value) if isinstance(value, list) else value for name, value in vars(found).items()}


def _needs(expected: re.Match[str]) -> str:
    return "needs a value" if expected[1] == "one argument" else f"needs {expected[1].split()[0]} values"


def _as_tuple(values: list[Any]) -> tuple[Any, ...] | None:
    return None if values == [None] else tuple(values)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each field's meaning below its name; names are not broken at their hyphens."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=6, width=MAX_WIDTH)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def _parser(cls: type, program: str, description: str, defaults: Any, without: str) -> argparse.ArgumentParser:
    places = [f" {word}" for hint in leaf_hints(cls).values() if (word := _word(hint))]
    parser = argparse.ArgumentParser(
        usage=f"{program}{''.join(places)} [--name value ...]", description="\n".join(prose(description, MAX_WIDTH)),
        formatter_class=_Help, argument_default=argparse.SUPPRESS, allow_abbrev=False, exit_on_error=False, add_help=False,
    )  # fmt: skip
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf)")  # with exponents, which argparse takes for flags
    own = parser.add_argument_group("settings")
    own.add_argument("-h", "--help", action="help", help="Show this text.")
    _add_fields(parser, own, cls, "", defaults, without)
    return parser


def _add_fields(parser: argparse.ArgumentParser, group: Any, cls: type, prefix: str, defaults: Any, without: str) -> None:
    """Add a class's own fields to a group of arguments, and a group for each of its sections."""
    hints, docs = typing.get_type_hints(cls, include_extras=True), field_docs(cls)
    for item in dataclasses.fields(cls):
        name, hint = prefix + item.name, hints[item.name]
        default = _default(item) if defaults is None else getattr(defaults, item.name)
        if name == without:
            continue
        if dataclasses.is_dataclass(hint):
            section = parser.add_argument_group(name, textwrap.fill(inspect.getdoc(hint) or "", MAX_WIDTH - 2))
            _add_fields(parser, section, hint, f"{name}.", None if default is dataclasses.MISSING else default, without)  # type: ignore[arg-type]
            continue
        known = "required" if default is dataclasses.MISSING else f"default: {_shown(default)}"
        text = f"{' '.join(docs.get(item.name, '').split())} ({known})".replace("%", "%%")
        if hint is bool:
            group.add_argument(flag(name), dest=name, action="store_true", help=f"{text} Cleared by {_off(name)}.")
            group.add_argument(_off(name), dest=name, action="store_false", help=argparse.SUPPRESS)
            continue
        count = _count(hint)
        nargs: Any = "*" if count == 0 else count or ("?" if _word(hint) else None)
        options = {"nargs": nargs, "type": _converter(hint), "metavar": _word(hint) or _kind(hint), "help": text}
        if _word(hint):
            group.add_argument(name, **options)
        else:
            group.add_argument(flag(name), dest=name, **options)


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


def current_flags(words: Sequence[str]) -> list[str]:
    """Words in which flags and values of an earlier version have their names of today."""
    found, field = [], ""
    for word in words:
        shown, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if shown:
            field = shown[2:].replace("-", "_")
            on = re.sub(r"(^|\.)no_([^.]*)$", r"\1\2", field)
            if field in RENAMED_FIELDS:
                shown = flag(RENAMED_FIELDS[field])
            elif on in RENAMED_FIELDS:
                shown = _off(RENAMED_FIELDS[on])
        (value,) = current_fields({field: value}).values()
        found.append(f"{shown}{equals}{value}")
    return found


def _off(name: str) -> str:
    """What clears a bool: `log.ledger` -> `--log.no-ledger`."""
    return flag(re.sub(r"([^.]*)$", r"no_\1", name, count=1))


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


def _converter(hint: Any) -> Callable[[str], Any]:
    """What makes a value of one word. It raises argparse.ArgumentTypeError, naming what was wanted."""
    bare, can_be_none = _bare(hint)
    if _count(hint) is not None:
        bare = _bare(typing.get_args(bare)[0])[0]
    choices = {str(choice): choice for choice in typing.get_args(bare)} if typing.get_origin(bare) is Literal else {}
    assert choices or bare in (str, int, float, Path), f"flags cannot give a {bare}"

    def convert(word: str) -> Any:
        if word is argparse.SUPPRESS:  # argparse converts the default of a positional that is not given
            return word
        if not word:
            raise argparse.ArgumentTypeError("is empty: wanted a value (is a variable of your script unset?)")
        if word.encode(errors="replace").decode() != word:  # no name in a JSON file or a log could be this
            raise argparse.ArgumentTypeError(f"is {word!r}: wanted text in UTF-8")
        if can_be_none and word == "None":
            return None
        try:
            return choices[word] if choices else bare(word)
        except (KeyError, ValueError):
            wanted = f"one of {', '.join(choices)}" if choices else "a whole number" if bare is int else "a number"
            raise argparse.ArgumentTypeError(f"is {word!r}: wanted {wanted}{' or None' if can_be_none else ''}") from None

    return convert


def _nearest(typed: str, known: list[str]) -> str:
    """A hint for an unknown field: its new name; else the same last part in any section; else the closest spelling."""
    name = typed.replace("-", "_")
    if (now := RENAMED_FIELDS.get(name)) in known:
        return f"it is now {flag(str(now))}"
    leaf = name.rsplit(".", 1)[-1].lower()
    if leaf in (field.rsplit(".", 1)[-1] for field in COUNTED_IMAGES):
        return "packs are now limited in vision tokens: --data.pack-max-vision-tokens, the number of images times those of one"
    near = [item for item in known if item.rsplit(".", 1)[-1] == leaf]
    near = near or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if not near:
        leaves = difflib.get_close_matches(leaf, [item.rsplit(".", 1)[-1] for item in known], n=1, cutoff=0.6)
        near = [item for item in known if item.rsplit(".", 1)[-1] in leaves]
    return f"did you mean {' or '.join(map(flag, near[:3]))}?" if near else "no setting has a name like it"


# ---- help ------------------------------------------------------------------------------------------------------------


def _kind(hint: Any) -> str:
    """A type in the help, for a tuple that of its items: INT, llama|qwen2, INT|None."""
    bare, can_be_none = _bare(hint)
    parts = typing.get_args(bare)
    if typing.get_origin(bare) is Literal:
        kind = "|".join(map(str, parts))
    elif typing.get_origin(bare) is tuple:
        return _kind(parts[0])
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
