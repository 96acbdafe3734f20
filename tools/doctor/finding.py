"""One line of the doctor's report. Imports nothing that could be missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """What was examined, and its state."""

    what: str
    state: Literal["ok", "warning", "missing", "broken"]
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it."""
    needed: bool = False
    """Training needs it: `broken` makes the exit code 1."""

    @staticmethod
    def code(findings: Iterable[Finding]) -> int:
        """The exit code."""
        return int(any(finding.needed and finding.state == "broken" for finding in findings))
