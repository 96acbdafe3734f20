"""Rules that no linter knows: who imports whom, what lies at the top, and that documents name things that exist.

python -m tests.test_architecture        prints the levels of the library, its arrows, cycles and largest folder
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.support import ROOT

TOP_LEVEL = {
    *("mkdocs.yml", "himix_megatron", "pipelines", "slurm", "tools", "tests", "docs", ".ci"),
    *("pyproject.toml", "README.md", "Makefile", "constraints.txt", "LICENSE", ".gitignore"),
}
# The library's folders, from the lowest level up: a folder imports from lower ones only.
LEVELS = (
    ("runtime",),
    ("config",),
    ("costs",),
    ("data",),
    ("distributed",),
    ("model",),
    ("checkpoint", "resilience"),
    ("inference",),
    ("conversion", "evaluation", "monitoring"),
    ("training",),
)
MAX_ARROWS, MAX_MODULES = 56, 16
# Where names that megatron-core keeps to itself may be used: what adapts it, and the copy of its optimizer's state.
MEGATRON_ADAPTERS = ("himix_megatron/distributed/", "himix_megatron/checkpoint/distributed_optimizer.py")
# The folders in which people and build farms keep their work; one of these in a tracked file points at one machine.
MACHINE_PATH = re.compile(rb"(?:^|[^A-Za-z0-9_.~}])/(?:work|root|farm|opt/wheels|home/[a-z]+|Users/[A-Za-z]+|tmp/[a-z])/")
REGISTRY_HOST = re.compile(rb"(?:pypi|pythonhosted|npmjs|debian)\.org")


def tracked() -> list[Path]:
    """Files that git tracks, and that are there, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def imports(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at its top or inside a function; relative ones made absolute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(file.parent.parts)[: len(file.parent.parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def importers(*modules: str) -> set[Path]:
    """Python files outside tests/ that import one of these modules or a part of it."""
    return {
        file
        for file in tracked()
        if file.suffix == ".py"
        and file.parts[0] != "tests"
        and any(name == module or name.startswith(module + ".") for name in imports(file) for module in modules)
    }


def documents() -> list[Path]:
    return [file for file in tracked() if file.suffix == ".md"]


def test_the_top_level_holds_nothing_else() -> None:
    assert {file.parts[0] for file in tracked()} <= TOP_LEVEL


@pytest.mark.parametrize("module", ["himix_megatron.config", "himix_megatron.data.shards.shard_format"])
def test_settings_and_the_shard_contract_import_neither_torch_nor_ray(module: str) -> None:
    script = f"import sys, {module}; print([name for name in ('torch', 'ray', 'megatron') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ray_is_imported_only_by_pipelines() -> None:
    """The benchmarks aside, which compare with it."""
    assert {file.parts[0] for file in importers("ray") if file.parts[:2] != ("tools", "bench")} <= {"pipelines"}


def test_submitit_is_imported_only_by_slurm() -> None:
    assert {file.parts[0] for file in importers("submitit")} <= {"slurm"}


def arrows() -> dict[tuple[str, str], set[str]]:
    """Who imports whom among the library's folders, and the files that do."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in tracked():
        if file.suffix == ".py" and file.parts[0] == "himix_megatron" and len(file.parts) > 2:
            for name in imports(file):
                parts = name.split(".")
                if parts[0] == "himix_megatron" and len(parts) > 1 and parts[1] != file.parts[1]:
                    found.setdefault((file.parts[1], parts[1]), set()).add(str(file))
    return found


def cycles(edges: Collection[tuple[str, str]]) -> list[list[str]]:
    """Groups of folders that import each other, directly or by way of others."""
    nodes = sorted({node for edge in edges for node in edge})
    reach = {node: {b for a, b in edges if a == node} for node in nodes}
    for middle in nodes:
        for node in nodes:
            if middle in reach[node]:
                reach[node] |= reach[middle]
    return [group for node in nodes if (group := sorted(o for o in reach[node] if node in reach[o])) and group[0] == node]


def folder_sizes() -> Counter[str]:
    """Modules of each folder that holds code."""
    return Counter(
        str(file.parent)
        for file in tracked()
        if file.suffix == ".py" and file.parts[0] != "tests" and file.name != "__init__.py"
    )


def test_every_folder_of_the_library_has_a_level() -> None:
    folders = {file.parts[1] for file in tracked() if file.parts[0] == "himix_megatron" and len(file.parts) > 2}
    assert sorted(folders) == sorted(folder for level in LEVELS for folder in level)


def test_imports_point_down() -> None:
    level = {folder: number for number, folders in enumerate(LEVELS) for folder in folders}
    assert {edge: files for edge, files in arrows().items() if level[edge[0]] <= level[edge[1]]} == {}
    assert cycles(arrows()) == []
    assert len(arrows()) <= MAX_ARROWS


def test_no_folder_holds_too_many_modules() -> None:
    assert {folder: size for folder, size in folder_sizes().items() if size > MAX_MODULES} == {}


def test_private_names_of_megatron_core_stay_with_its_adapters() -> None:
    private = [
        f"{file}: {name}"
        for file in tracked()
        if file.suffix == ".py" and file.parts[0] == "himix_megatron" and not str(file).startswith(MEGATRON_ADAPTERS)
        for name in imports(file)
        if name.startswith("megatron.") and any(part.startswith("_") for part in name.split("."))
    ]
    assert private == []


def test_the_library_imports_none_of_its_users() -> None:
    users = importers("pipelines", "slurm", "tools", "tests")
    assert not [file for file in users if file.parts[0] == "himix_megatron"]


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    named = []
    for file in tracked():
        content = (ROOT / file).read_bytes()
        if b"\0" in content or file == Path("tests/test_architecture.py"):
            continue
        for number, line in enumerate(content.split(b"\n"), 1):
            if MACHINE_PATH.search(line) or REGISTRY_HOST.search(line):
                named.append(f"{file}:{number}: {line.decode(errors='replace').strip()[:100]}")
    assert not named


def test_links_in_documents_lead_to_files() -> None:
    broken = []
    for document in documents():
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text(encoding="utf-8")):
            path = target.split("#")[0]
            if path and "://" not in path and not (ROOT / document.parent / path).exists():
                broken.append(f"{document}: {target}")
    assert not broken


def test_paths_in_documents_exist() -> None:
    """Names in backquotes that begin with a folder of the project, placeholders in capitals and files to be made aside."""
    folders = "|".join(sorted(re.escape(name) for name in TOP_LEVEL if "." not in name[1:]))
    named = re.compile(rf"`((?:{folders})/[A-Za-z0-9_./-]*)`")
    missing = []
    for document in documents():
        text = (ROOT / document).read_text(encoding="utf-8")
        made = re.findall(r"^New file `(.*)`:$", text, re.MULTILINE)
        for path in set(named.findall(text)) - set(made):
            if not re.search(r"[A-Z]{3,}", path) and not (ROOT / path).exists():
                missing.append(f"{document}: {path}")
    assert not missing


def test_commands_in_documents_exist() -> None:
    """Every `make TARGET` and `python -m MODULE` that a document shows."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for document in documents():
        text = (ROOT / document).read_text(encoding="utf-8")
        shown = "\n".join(re.findall(r"`[^`]+`|^(?: {4}|\$ ).*$|^```.*?^```", text, re.MULTILINE | re.DOTALL))
        for target in re.findall(r"\bmake ([a-z0-9-]+)", shown):
            if target not in targets:
                missing.append(f"{document}: make {target}")
        for module in re.findall(r"python -m ((?:pipelines|tools|slurm)\.[a-z_.]*[a-z_])", shown):
            place = ROOT / module.replace(".", "/")
            if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
                missing.append(f"{document}: python -m {module}")
    assert not missing


if __name__ == "__main__":
    for number, folders in reversed(list(enumerate(LEVELS, 1))):
        print(f"level {number}: {', '.join(folders)}")
    found = arrows()
    print(f"{len(LEVELS)} levels, {len(found)} arrows, {len(cycles(found))} cycles")
    folder, size = folder_sizes().most_common(1)[0]
    print(f"largest folder: {folder}, {size} modules")
