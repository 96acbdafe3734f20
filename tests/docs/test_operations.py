"""What docs/operations.md promises is tested."""

from __future__ import annotations

import re

from tests.support import ROOT


def test_every_fault_is_backed_by_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs/operations.md").read_text().splitlines() if line.startswith("| ")]
    header = "| fault | what happens | what the user sees | lost | test |"
    assert header in rows
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)
    }
    unbacked = [
        row for row in rows if row.count(" | ") == 4 and row != header and not known & set(re.findall(r"`(test_\w+)`", row))
    ]
    assert not unbacked
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/operations.md").read_text()))
    assert named <= known
