"""The model's benchmark runs, and says yes or no by its own figures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from himix_megatron.flops import Work, step_flops
from tools.bench_concatenation import lines_of
from tools.bench_model import Arguments, sizes
from tools.measure import Line


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.bench_model", "--repetitions", "1", "--threads", "1", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_it_compares_and_fails_where_a_line_is_missed() -> None:
    small = ("--layers", "1", "--samples", "2", "--text-tokens", "64", "--vision-tokens", "20")
    done = bench("--part", "concatenation", *small)
    assert done.returncode == 1, done.stderr  # 20 vision tokens leave nothing to gain
    assert "wanted >= 12, MISSED" in done.stdout.splitlines()[0]


def test_a_whole_decoder_is_measured_on_a_cpu_too() -> None:
    flags = ("--recipe", "tiny_align", "--pack-text-tokens", "128", "--pack-images", "3", "--packs", "2", "--optimizer")
    done = bench("--part", "training", *flags)
    assert done.returncode == 0, done.stderr
    assert "decoder's MFU" in done.stdout
    assert "optimizer's share" in done.stdout


def test_lines_are_held_to_what_was_wanted() -> None:
    arguments = Arguments(part="concatenation", text_tokens=(64,))
    config = sizes(arguments)
    needed = step_flops(config, Work.of([64] * 8, [729] * 8, head_tokens=0, causal=False)).decoder
    at_peak = needed / (2 * 2048**3)  # seconds, where a product takes one
    seconds = {"product": [1.0], "himix 64": [at_peak / 0.8], "vanilla 64": [13 * at_peak / 0.8], "align 64": [1.0]}
    seconds["ours, concatenating 64"] = [15 * at_peak / 0.8]
    ratio, ours, of_product, of_full = lines_of(arguments, config, seconds)
    assert ratio.value == pytest.approx(13)
    assert ours.value == pytest.approx(15)
    assert ours.wanted is None
    assert of_product.value == pytest.approx(0.8)
    assert ratio.holds
    assert of_product.holds
    assert of_full.wanted == 0.95
    assert Line.code([Line("", 0.5, 0.6, at_most=True)]) == 0
    assert Line.code([Line("", 0.7, 0.6, at_most=True)]) == 1
    assert not lines_of(arguments, config, seconds | {"vanilla 64": [11 * at_peak / 0.8]})[0].holds
