"""What tests share: real ranks, small runs and datasets, faults, a browser."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
