"""The error of one sample that cannot be used."""

from __future__ import annotations


class BadSampleError(Exception):
    """One sample cannot be used. `reason` is a fixed word that is counted; `detail` says more (never a path or an address)."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, str]]:
        return type(self), (self.reason, self.detail)
