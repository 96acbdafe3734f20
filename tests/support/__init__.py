"""What tests share: real ranks, small runs and datasets, faults, a browser."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
is_fast = False
"""Whether this is a fast run (`--fast`), which starts no ranks, no Ray, no Slurm and no browser."""


def skip_if_fast(what: str) -> None:
    """Skip the running test in a fast run, because it needs `what`."""
    if is_fast:
        pytest.skip(f"{what}: not in a fast run")
