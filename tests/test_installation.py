"""What `make setup` leaves: commands that every folder finds, a pip without known holes, and pins that keep the floors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT

RECORD = """#!{python}
import json, sys
with open({record!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(3 if any(word.startswith("pip>=") for word in sys.argv) else 0)
"""


def test_commands_are_found_from_every_folder(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "generate.py").write_text("raise SystemExit('of somebody else')")
    for folder, safe, module in (
        ("/", "", "pipelines.generate"),
        (tmp_path, "1", "pipelines.generate"),
        ("/", "", "tools.convert"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=folder,
            env=env | {"PYTHONSAFEPATH": safe},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"is .venv older than pyproject.toml? `make setup` renews it\n{done.stderr}"
        assert f"python -m {module}" in done.stdout


def test_setup_renews_pip_and_goes_on_where_it_cannot(tmp_path: Path) -> None:
    venv, record = tmp_path / "venv", tmp_path / "record"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(RECORD.format(python=sys.executable, record=str(record)))
    (venv / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        ["make", "--silent", "setup", f"VENV={venv}", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"note: going on with the pip of {venv}, older than pip>=26.2\n"
    installed = [json.loads(line)[-1] for line in record.read_text().splitlines()]
    assert [re.split("[>=]", word)[0] for word in installed] == ["--version", "pip", "torch", ".[dev]"]
    assert (venv / "complete").is_file()


@pytest.mark.parametrize("part", ["dependencies", "s3", "docs", "dev", "bench"])
def test_the_pins_keep_the_floors(part: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"\w", line)]
    for text in project["dependencies"] if part == "dependencies" else project["optional-dependencies"][part]:
        floor = Requirement(text)
        versions = [str(pin.specifier).removeprefix("==") for pin in pins if pin.name.lower() == floor.name.lower()]
        assert versions or floor.name == project["name"], f"{floor.name} has no pin"
        assert all(floor.specifier.contains(version) for version in versions), text
