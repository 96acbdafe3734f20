"""The command line of every entry point: words in, a checked settings tree out, and mistakes as one line.

A recipe names a whole run, by one of the names in RECIPES or as `package.module:function`; flags change single fields of it:
`tiny_align --train.steps 100 --parallel.tensor 2`.
`parse` raises ValueError with one line that says what was wrong and what to write instead; `run_main` turns it into
`error: ...` on stderr and exit code 2. Both `-` and `_` work inside field names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import logging
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import tyro

from himix_megatron.config import Config, field_names
from himix_megatron.runtime.errors import RankError
from pipelines.recipes import RECIPES

log = logging.getLogger(__name__)
Settings = TypeVar("Settings")

USER_MISTAKE = 2
"""Exit code when the user's choice cannot work."""


def parse(argv: Sequence[str], program: str = "python -m pipelines.pretrain") -> Config:
    """`RECIPE --section.field value ...` as a Config.

    Raises: ValueError (one line) for an unknown recipe or field (naming the nearest), a value that does not fit its
    field, or fields that contradict each other. SystemExit(0) after `--help`.
    """
    if not argv or argv[0] in ("-h", "--help"):
        if not argv:
            raise ValueError(f"no recipe given: use {program} RECIPE, with RECIPE one of {', '.join(RECIPES)}")
        print(_overview(program))
        raise SystemExit(0)
    flags = list(argv[1:])
    if argv[0].startswith("-"):
        raise ValueError(f"{argv[0]} comes before the recipe: use {program} RECIPE --section.field value ...")
    name, make = find_recipe(argv[0])
    recipe = make()
    if any(re.match(r"--recipe(=|$)", flag) for flag in flags):
        raise ValueError("--recipe is not a flag: the recipe is the first word")
    # The recipe's name is no setting, so tyro sees the sections only, and Config itself is built (and checked) here.
    sections = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(Config) if item.name != "recipe"}
    hints = typing.get_type_hints(Config)
    tree = dataclasses.make_dataclass(
        "Settings", [(key, hints[key], dataclasses.field(default=value)) for key, value in sections.items()], frozen=True
    )
    parsed: Any = parse_settings(tree, flags, f"{program} {name}", description=inspect.getdoc(make) or "")
    return Config(recipe=name, **{key: getattr(parsed, key) for key in sections})


def find_recipe(word: str) -> tuple[str, Callable[[], Config]]:
    """A recipe and its name: one of RECIPES, or anyone's `package.module:function`. Raises: ValueError naming the nearest."""
    name = word.replace("-", "_")
    if ":" in name:
        try:
            return name, pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"unknown recipe {word}: {error}") from None
    if name not in RECIPES:
        near = difflib.get_close_matches(name.lower(), RECIPES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown recipe {word}: {hint}There are {', '.join(RECIPES)}")
    return name, RECIPES[name]


def parse_settings(cls: type[Settings], argv: Sequence[str], program: str, description: str | None = None) -> Settings:
    """Flags as an instance of a dataclass (nested ones as `--section.field`), for entry points with settings of their own.

    Raises: ValueError (one line), like `parse`; SystemExit(0) after `--help`.
    """
    _check_flags(cls, argv, program)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(cls, args=list(argv), prog=program, description=description)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(_condense(shown.getvalue(), program))


def check_positive(settings: object, *names: str) -> None:
    """Raises: ValueError if one of these numbers, which may be None, is below 1."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: wanted 1 or more")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and leave with its exit code (None is 0).

    A user's mistake (ValueError, or a file or folder that is missing or barred) becomes one line on stderr and exit code 2;
    rank 0 says it for all, and a `RankError` each rank that has it. Everything else keeps its traceback.
    """
    try:
        code = main() or 0
    except ValueError as error:
        _leave(str(error), alone=isinstance(error, RankError))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError) as error:
        if error.filename is None:
            raise
        _leave(f"{error.filename}: {error.strerror}")
    except BrokenPipeError:
        # `... --help | head` closed our stdout: nothing is wrong, and the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code)


def _leave(message: str, *, alone: bool = False) -> NoReturn:
    log.debug("stopped by a user's mistake", exc_info=True)
    # Mistakes are found before ranks meet, by each of them alike: one line is enough, unless a rank is `alone` with its own.
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0" or alone:
        who = "" if rank == "0" else f"rank {rank}: "
        sys.stdout.flush()
        print(f"error: {who}{' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(USER_MISTAKE)


def _overview(program: str) -> str:
    """What `--help` without a recipe prints."""
    width = max(map(len, RECIPES))
    lines = [
        f"usage: {program} RECIPE [--section.field value ...]",
        "",
        "Recipes (package.module:function is one of your own):",
    ]
    lines += [f"  {name:<{width}}  {(inspect.getdoc(make) or '').splitlines()[0]}" for name, make in RECIPES.items()]
    lines += [
        "",
        "Every field of a recipe can be changed by a flag, e.g. --train.steps 100 --parallel.tensor 2 --run.dir runs/mine.",
    ]
    lines += [f"{program} RECIPE --help shows the recipe's facts and every field with its meaning and value."]
    return "\n".join(lines)


def _flag(name: str) -> str:
    """A field as the help prints it: `train.global_batch_samples` -> `--train.global-batch-samples`."""
    return "--" + name.replace("_", "-")


def _leaf_types(cls: type, names: Sequence[str]) -> dict[str, Any]:
    """The type of each dotted name."""
    types = {}
    for name in names:
        hint: Any = cls
        for part in name.split("."):
            hint = typing.get_type_hints(hint)[part]
        types[name] = hint
    return types


def _check_flags(cls: type, argv: Sequence[str], program: str) -> None:
    """Name a flag that no field has, and its nearest, before tyro reports it across several lines."""
    types = _leaf_types(cls, field_names(cls))
    switches = {name for name, hint in types.items() if hint is bool}
    off = {re.sub(r"(\.|^)([^.]*)$", r"\1no_\2", name) for name in switches}
    last_switch = None
    for word in argv:
        if word in ("-h", "--help"):
            return
        if not word.startswith("--"):
            # Another word may be a positional argument: that is tyro's business.
            if last_switch and word.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
                raise ValueError(f"{_flag(last_switch)} takes no value ({word}): write it alone, or --no- before its last part")
            last_switch = None
            continue
        name = word[2:].split("=", 1)[0].replace("-", "_")
        if name in types or name in off:
            last_switch = name if name in switches | off else None
            continue
        raise ValueError(f"unknown setting {word.split('=', 1)[0]}: {_nearest(name, list(types))} ({program} --help lists all)")


def _nearest(name: str, known: list[str]) -> str:
    """A hint for a misspelt field: the same last part in any section first, then the closest spelling."""
    leaf = name.rsplit(".", 1)[-1].lower()
    same = [item for item in known if item.rsplit(".", 1)[-1] == leaf]
    near = same or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if not near:
        leaves = difflib.get_close_matches(leaf, [item.rsplit(".", 1)[-1] for item in known], n=1, cutoff=0.6)
        near = [item for item in known if item.rsplit(".", 1)[-1] in leaves]
    return f"did you mean {' or '.join(map(_flag, near[:3]))}?" if near else "no setting has a name like it"


def _condense(box: str, program: str) -> str:
    """tyro's framed message as one line of ours; its first paragraph as it stands where the form is unknown."""
    lines = [line.strip(" │|╭╮╰╯") for line in box.splitlines()]
    body = [line for line in lines[1:] if line]
    if body and set(body[0]) <= {"─", "-"}:
        del body[0]  # where the terminal's encoding has no box characters, the title is underlined
    end = next((i for i, line in enumerate(body) if re.fullmatch(r"[─-]{5,}.*", line)), len(body))
    if "Required options" in lines[0] or "Required option" in lines[0]:
        missing = re.findall(r"^(--[\w.-]+|[A-Z]{2,}$)", "\n".join(body), re.MULTILINE)  # PATH: a word without a flag
        return f"{' and '.join(dict.fromkeys(missing))} must be given ({program} --help tells more)"
    text = " ".join(body[:end] or body)
    if found := re.match(r"invalid choice (.+?) for argument '(\S+)'\. Expected one of \((.*)\)", text):
        return f"{found[2]} is {found[1]}: wanted one of {found[3].rstrip(',').replace(chr(39), '')}"
    if found := re.match(r"Error parsing (--\S+): no type matching (.+?) could be instantiated from \[(.*?)\]", text):
        return f"{found[1]} is {found[3]}: wanted {found[2].replace('{None}', 'None').replace('|', ' or ')}"
    if found := re.match(r"Error parsing (--\S+): invalid literal for int\(\) with base 10: (.*)", text):
        return f"{found[1]} is {found[2]}: wanted a whole number"
    if found := re.match(r"Error parsing (--\S+): could not convert string to float: (.*)", text):
        return f"{found[1]} is {found[2]}: wanted a number"
    if found := re.match(r"Missing value for argument '(\S+)'\. Expected (\d+) values?", text):
        return f"{found[1]} needs {'a value' if found[2] == '1' else f'{found[2]} values'}"
    if found := re.match(r"Unrecognized options: (.*)", text):
        return f"{found[1]} belongs to no setting: settings are --name value"
    if found := re.match(r"Error parsing (?!-)\S+: (.*)", text):
        return found[1]
    return text
