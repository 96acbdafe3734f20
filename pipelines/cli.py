"""The command line of every entry point: words in, a checked settings tree out, and mistakes as one line.

A recipe names a whole run; flags change single fields of it: `tiny_align --train.steps 100 --parallel.tensor 2`. A recipe of
another package is named by its module and function: `our_lab.recipes:small_align`. `parse` raises ValueError with one line that
says what was wrong and what to write instead; `run_main` turns it into `error: ...` on stderr and exit code 2. Nothing here
imports torch, so that mistakes and `--help` take no time.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from himix_megatron.config import METHODS, Config, check_known
from himix_megatron.runtime.errors import RankError
from himix_megatron.runtime.untrusted_files import printable
from pipelines.flags import parse_settings, prose, read_flags, split_flags, with_changes
from pipelines.recipes import RECIPES

__all__ = ["load_recipe", "parse", "parse_settings", "refuse_own", "run_main", "split_recipe_flags"]

log = logging.getLogger(__name__)

METHOD = "method"
"""The flag that fills a section of settings."""
_METHOD_HELP = f"--method {'|'.join(METHODS)}: fills the section injection with a published method's choices (docs/methods.md)."
USER_MISTAKE = 2
"""Exit code when the user's choice cannot work."""


PLACE_ERRORS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
}
"""What is wrong with the file or folder that an error names."""
DISK_ERRORS = {
    errno.ENOSPC: ": make room on the disk, and run the same command again",
    errno.EDQUOT: ": make room in your quota, and run the same command again",
    errno.EFBIG: ": this process may not write so large a file (see ulimit -f)",
    errno.EIO: ": what lies there cannot be read or written",
    errno.EROFS: ": choose a place that can be written to",
}
"""What is wrong with a disk, and the way out."""


def parse(argv: Sequence[str], program: str = "python -m pipelines.pretrain") -> Config:
    """`RECIPE --section.field value ...` as a Config.

    Raises: ValueError (one line) for an unknown recipe or field (naming the nearest), a value that does not fit its
    field, or fields that contradict each other. SystemExit(0) after `--help`.
    """
    if not argv:
        raise ValueError(f"no recipe given: use {program} RECIPE, with RECIPE one of {', '.join(RECIPES)}")
    if argv[0] in ("-h", "--help"):
        print(_overview(program))
        raise SystemExit(0)
    if argv[0].startswith("-"):
        raise ValueError(f"{argv[0]} comes before the recipe: use {program} RECIPE --section.field value ...")
    if any(word.split("=")[0] == "--recipe" for word in argv[1:]):
        raise ValueError("--recipe is not a flag: the recipe is the first word")
    make = load_recipe(argv[0])
    recipe = make()
    words = split_flags(argv[1:], lambda name: name == METHOD)
    method = parse_settings(_Method, words.get(True, []), program).method
    if method is not None:
        check_known("--method", method, METHODS)
    given = read_flags(
        Config,
        words.get(False, []),
        f"{program} {recipe.recipe}",
        description=f"{inspect.getdoc(make) or ''}\n\n{_METHOD_HELP}",
        defaults=recipe,
        without="recipe",
    )
    if method is not None:
        model = with_changes(recipe.model, {name[6:]: value for name, value in given.items() if name.startswith("model.")})
        filled = {f"injection.{name}": value for name, value in dataclasses.asdict(METHODS[method](model)).items()}
        for one, other in (("injection.layers", "injection.every_layers"), ("injection.every_layers", "injection.layers")):
            if one in given:
                filled.pop(other)
        given = filled | given
    changed: Config = with_changes(recipe, given)
    return changed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Method:
    method: str | None = None
    """Published method that fills the section injection."""


def load_recipe(name: str) -> Callable[[], Config]:
    """The recipe of that name, or the function `package.module:function`, whose Config gets `name` as its recipe.

    Raises: ValueError (one line) for an unknown name, a module that cannot be imported, or a function that makes no Config.
    """
    if ":" not in name:
        known = name.replace("-", "_")
        if known not in RECIPES:
            near = difflib.get_close_matches(known.lower(), RECIPES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown recipe {name}: {hint}There are {', '.join(RECIPES)}")
        return RECIPES[known]
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"recipe {name}: the module {module_name!r} cannot be imported ({error})") from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        raise ValueError(f"recipe {name}: {module_name} has no function {function_name!r}")

    def make() -> Config:
        try:
            made = function()
        except TypeError as error:
            raise ValueError(f"recipe {name}: {error}") from error
        if not isinstance(made, Config):
            raise ValueError(f"recipe {name}: it returns {type(made).__name__}, wanted himix_megatron.config.Config")
        return dataclasses.replace(made, recipe=name)

    make.__doc__ = function.__doc__
    return make


def split_recipe_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's words for `parse` (the recipe, --method, flags with a dot in their name), and for its own settings."""
    groups = split_flags(words, lambda name: name in ("", METHOD) or "." in name)
    return groups.get(True, []), groups.get(False, [])


def refuse_own(flags: Sequence[str], own: Mapping[str, str], whose: str) -> None:
    """Raises: ValueError for a flag that a command gives its runs itself. `own`: by name, what says it there."""
    for flag in flags:
        name = flag.removeprefix("--").split("=", 1)[0].replace("-", "_") if flag.startswith("--") else ""
        if name in own:
            raise ValueError(f"--{name.replace('_', '-')} is {whose} own: give {own[name]}")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and leave with its exit code (None is 0).

    A user's mistake (ValueError; a file or folder that is missing or barred, or a disk that takes no more) becomes one line on
    stderr and exit code 2; rank 0 says it for all, and a `RankError` each rank that has it. All else keeps its traceback.
    """
    try:
        code = main() or 0
    except ValueError as error:
        _leave(str(error), alone=isinstance(error, RankError))
    except BrokenPipeError:
        # `... --help | head` closed our stdout: nothing is wrong, and the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in DISK_ERRORS and (error.errno not in PLACE_ERRORS or error.filename is None):
            raise
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _leave(f"{where}{error.strerror}{DISK_ERRORS.get(error.errno, '')}")
    raise SystemExit(code)


def _leave(message: str, *, alone: bool = False) -> NoReturn:
    log.debug("stopped by a user's mistake", exc_info=True)
    # Mistakes are found before ranks meet, by each of them alike: one line is enough, unless a rank is `alone` with its own.
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0" or alone:
        who = "" if rank == "0" else f"rank {rank}: "
        sys.stdout.flush()
        print(f"error: {who}{printable(message)}", file=sys.stderr, flush=True)
    raise SystemExit(USER_MISTAKE)


def _overview(program: str) -> str:
    """What `--help` without a recipe prints."""
    width = max(map(len, RECIPES))
    return "\n".join(
        [
            f"usage: {program} RECIPE [--section.field value ...]",
            "",
            "Recipes:",
            *(f"  {name:<{width}}  {(inspect.getdoc(make) or '').splitlines()[0]}" for name, make in RECIPES.items()),
            "",
            *prose(
                "A recipe of another package is given as package.module:function. Every field of a recipe can be changed by a "
                "flag, e.g. --train.steps 100 --parallel.tensor 2 --run.dir runs/mine. "
                f"{program} RECIPE --help shows the recipe's facts and every field with its meaning and value.",
                100,
            ),
        ]
    )
