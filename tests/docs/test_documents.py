"""Every command that a document shows takes the flags that it is shown with."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import sys
from typing import Any

import pytest

from pipelines.recipes import RECIPES
from tests.support import ROOT

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BATCH_SCRIPTS = {"slurm/pretrain_himix.sh": "pipelines.pretrain", "slurm/preprocess_ray.sh": "pipelines.preprocess"}


def commands(text: str) -> list[str]:
    """The lines of code blocks, continued ones joined."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)  # what they print
    blocks = re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    return [line.strip() for block in blocks for line in re.sub(r" *\\\n *", " ", block).split("\n") if line.strip()]


def asked(command: str) -> tuple[str, str, list[str]] | None:
    """Module, recipe or subcommand (or ""), and flags of one of our commands; None for others."""
    module = re.search(r"-m ((?:pipelines|tools|slurm)\.[a-z_.]*[a-z_])", command)
    script = re.search(r"sbatch .*?(slurm/[a-z_]+\.sh)", command)
    if not module and not script:
        return None
    found = module or script
    assert found is not None
    name = found.group(1) if module else BATCH_SCRIPTS[found.group(1)]
    with contextlib.suppress(ValueError):
        words = shlex.split(command[found.end() :].split("#")[0].split("|")[0].split(">")[0])
        first = words[0] if words and not words[0].startswith("-") else ""
        return name, first, [word.split("=")[0] for word in words if word.startswith("--")]
    return None


@functools.cache
def help_of(module: str, first: str) -> str:
    """What `--help` prints."""
    out, argv = io.StringIO(), sys.argv
    if ":" in first:  # a recipe of the reader's own has the settings of all
        first = "tiny_align"
    needs_first = first in RECIPES or (module, first) in SUBCOMMANDS or module == "slurm.submit"
    sys.argv = [module, *([first] if needs_first else []), "--help"]
    program = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "200"
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as left:
            importlib.import_module(program).main()
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    assert left.value.code in (0, None), (module, first)
    return out.getvalue()


SUBCOMMANDS = {("tools.convert", name) for name in ("hf-to-himix", "himix-to-hf", "himix-to-authors", "authors-to-himix")}
CASES: list[Any] = [
    pytest.param(*found, id=f"{document.name}: {command[:60]}")
    for document in DOCUMENTS
    for command in commands(document.read_text(encoding="utf-8"))
    if (found := asked(command)) and found[2] and found[0] != "pipelines.lmms_eval_adapter"  # lmms-eval's own flags
]


@pytest.mark.parametrize(("module", "first", "flags"), CASES)
def test_a_documented_command_has_these_flags(module: str, first: str, flags: list[str]) -> None:
    own = help_of(module, first)
    for flag in flags:
        name = re.sub("--(align|instruct)\\.", "--", flag).replace("_", "-")
        passes_on = module in ("slurm.submit", "pipelines.scaling", "pipelines.encode", "pipelines.compare") and "." in name
        known = own + help_of("pipelines.pretrain", "tiny_align") if passes_on else own
        assert flag == "--help" or re.search(rf"{re.escape(name)}\b", known), f"{flag} is no flag of {module} {first}"
