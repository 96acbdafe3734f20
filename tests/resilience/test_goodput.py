"""Each moment of a launch is booked on one cause, whichever way a block ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from himix_megatron.resilience.goodput import Goodput
from himix_megatron.resilience.journal import Journal
from tests.support import ROOT


def slow(number: int) -> Iterator[int]:
    for item in range(number):
        time.sleep(0.02)
        yield item


def test_waiting_for_items_is_booked_apart_from_the_work_on_them(tmp_path: Path) -> None:
    goodput, items = Goodput(Journal(tmp_path)), []
    before = goodput.seconds()["start"]
    with goodput.doing("step"):
        for item in goodput.waiting("data", slow(3)):
            items.append(item)
            time.sleep(0.04)
    seconds = goodput.seconds()
    assert items == [0, 1, 2]
    assert seconds["data"] >= 0.06
    assert seconds["step"] >= 0.12
    assert seconds["start"] - before < 0.05


def test_an_error_ends_a_cause(tmp_path: Path) -> None:
    goodput = Goodput(Journal(tmp_path))
    with pytest.raises(OSError, match="full"), goodput.doing("save"):
        raise OSError("full")
    saved = goodput.seconds()["save"]
    time.sleep(0.01)
    assert goodput.seconds()["save"] == saved


def test_the_begin_of_a_process_is_known_to_a_tenth_of_a_second() -> None:
    program = "from himix_megatron.resilience.goodput import process_began; print(process_began())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(before, abs=0.1)
