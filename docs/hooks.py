"""What mkdocs does besides the pages as they are written: the configuration reference, and links that leave docs/.

Flows in: the dataclasses of `himix_megatron.config`, the recipes, and the pages' Markdown; out: Markdown that mkdocs renders.
Neither module imports torch, so the site is built in seconds, wherever the package is.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mkdocs.exceptions import PluginError

CONFIGURATION_PAGE = "reference/configuration.md"
SETTINGS_MARK, RECIPES_MARK = "<!-- settings -->", "<!-- recipes -->"
FENCED_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Read the package that lies beside mkdocs.yml, installed or not; again for each build of `mkdocs serve`."""
    root = str(Path(config.config_file_path).parent.resolve())
    if root not in sys.path:
        sys.path.insert(0, root)
    for name in [name for name in sys.modules if re.match(r"(himix_megatron\.config|pipelines\.recipes)(\.|$)", name)]:
        del sys.modules[name]
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Fill in the configuration reference; turn links to files outside docs/ into their paths."""
    if page.file.src_uri == CONFIGURATION_PAGE:
        recipes = importlib.import_module("pipelines.recipes").RECIPES
        markdown = _fill(markdown, SETTINGS_MARK, settings_reference(config_class()))
        markdown = _fill(markdown, RECIPES_MARK, recipe_table(recipes))
    docs = Path(config.docs_dir).resolve()
    return name_outside_files(markdown, docs / page.file.src_uri, docs)


def _fill(markdown: str, mark: str, text: str) -> str:
    if markdown.count(mark) != 1:
        raise PluginError(f"docs/{CONFIGURATION_PAGE} has the mark {mark} {markdown.count(mark)} times: wanted once")
    return markdown.replace(mark, text)


# ---- links that leave docs/ ----------------------------------------------------------------------------------------------


def name_outside_files(markdown: str, page: Path, docs: Path) -> str:
    """Links to files of the repository outside docs/ as the files' paths.

    Such a link works where the Markdown is read in the repository, and would lead nowhere on the site. Raises: PluginError for
    one to a file that does not exist.
    """

    def named(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        file = (page.parent / target).resolve()
        if "://" in target or target.startswith(("/", "mailto:")) or file.is_relative_to(docs):
            return link[0]
        root = docs.parent
        if not file.is_relative_to(root) or not file.exists():
            raise PluginError(f"{page.relative_to(root)} links to {target}, which is no file of the repository")
        path = f"`{file.relative_to(root).as_posix()}`"
        return path if text.strip("`") in path else f"{text} ({path})"

    parts, end = [], 0
    for block in FENCED_CODE.finditer(markdown):
        parts += [LINK.sub(named, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, LINK.sub(named, markdown[end:])])


# ---- the configuration reference -----------------------------------------------------------------------------------------


def settings_reference(config: type) -> str:
    """Every section of the configuration, and every field of it, as Markdown with headings of the levels 2 and 3."""
    lines = []
    for path, section in walk_sections(config):
        about = inspect.cleandoc(section.__doc__ or "")
        if path:
            lines += [f"## `{path}` {{#{path}}}", "", about, "", f"Class: `{section.__module__}.{section.__qualname__}`.", ""]
        fields = list(leaf_fields(section))
        if not path:
            lines += ["## The recipe's name {#recipe}", "", about, ""] if fields else []
        docs = importlib.import_module("pipelines.flags").field_docs(section)
        for field, hint in fields:
            lines += _field_lines(path, field, hint, docs.get(field.name, ""))
    return "\n".join(lines)


def _field_lines(path: str, field: dataclasses.Field[Any], hint: Any, about: str) -> list[str]:
    name = f"{path}.{field.name}" if path else field.name
    if not about:
        raise PluginError(f"the configuration's field {name} has no docstring below it")
    flag = f"`--{name.replace('_', '-')}`" if path else "the command's first word, without a flag"
    if hint is bool:
        off = f"{path}.no_{field.name}".replace("_", "-")
        flag += f" or `--{off}`, without a value"
    facts = f"{flag} · type {type_text(hint)} · {default_text(field)}"
    # A heading in HTML keeps over a hundred fields out of the page's table of contents, and has a link of its own.
    heading = f'<h3 id="{name}"><code>{name}</code><a class="headerlink" href="#{name}" title="Permanent link">&para;</a></h3>'
    return [heading, "", facts, "", _escape_outside_code(inspect.cleandoc(about)), ""]


def config_class() -> type:
    """The settings of a run."""
    found: type = importlib.import_module("himix_megatron.config").Config
    return found


def walk_sections(config: type, path: str = "") -> Iterator[tuple[str, type]]:
    """(dotted path, dataclass) of the configuration and of every section in it, in the order of their fields."""
    yield path, config
    for name, hint in typing.get_type_hints(config).items():
        if section := _dataclass_in(hint):
            yield from walk_sections(section, f"{path}.{name}" if path else name)


def leaf_fields(section: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields that hold a value instead of a further section, each with its type."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if _dataclass_in(hints[field.name]) is None:
            yield field, hints[field.name]


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type is, or may be (`Section | None`)."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def type_text(hint: Any) -> str:
    """A type in the words of Python's annotations, each value of a Literal on its own."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(arg) for arg in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"list of {type_text(args[0])}"
        return f"{len(args)} times {type_text(args[0])}" if len(set(args)) == 1 else ", ".join(map(type_text, args))
    if hint is type(None):
        return "`None`"
    return f"`{hint.__name__ if isinstance(hint, type) else hint}`"


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default as the command line takes it."""
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required: the recipe gives it"
    if isinstance(value, tuple):
        return f"default `{' '.join(map(str, value))}`" if value else "default: empty"
    return f"default `{value}`"


def recipe_table(recipes: typing.Mapping[str, Any]) -> str:
    """Every recipe with the first line of its docstring."""
    rows = [f"| `{name}` | {(inspect.getdoc(make) or '').splitlines()[0]} |" for name, make in recipes.items()]
    return "\n".join(["| recipe | what it trains |", "|---|---|", *rows])


def _escape_outside_code(text: str) -> str:
    """Docstrings are plain text but for backquotes: `<`, `*` and `_` outside of these mean themselves."""
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*_\[\]<>])", r"\\\1", piece) for piece in pieces)
