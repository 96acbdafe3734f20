"""Is HiMix as fast as its FLOPs promise?

    python -m tools.bench.decoder                          every part that this machine can run
    python -m tools.bench.decoder --part concatenation     HiMix and images inside the text, one process, 2 threads
    python -m tools.bench.decoder --part tensor            the same on two tensor-parallel ranks of one thread
    python -m tools.bench.decoder --part padding           packed samples and plain padded ones, LLaVA-like lengths
    python -m tools.bench.decoder --part training --recipe llama3_2_3b_instruct     a whole decoder; on a GPU its MFU

Vanilla concatenation is megatron-core's own layers with the images as tokens in front of the text (`vanilla_decoder.py`).
Measured is forward and backward of the layers, without embedding, head and optimizer; both sides accumulate gradients in place.
Repetitions take turns. Ratios are printed first, with what was wanted, then medians with the smallest and largest. Exit code 1
if a stated ratio is missed.
"""

from __future__ import annotations

import os
import subprocess
import sys

from pipelines.cli import parse_settings, run_main
from tools.bench.decoder_setup import Arguments, sizes
from tools.bench.measure import Line

PARTS = ("concatenation", "tensor", "padding")


def run_parts() -> int:
    """Run each part in its own process. Returns: 1 if one missed a line."""
    codes = [
        subprocess.run([sys.executable, "-m", "tools.bench.decoder", "--part", p, *sys.argv[1:]]).returncode for p in PARTS
    ]
    return max(codes)


def main() -> int:
    arguments = parse_settings(Arguments, sys.argv[1:], "python -m tools.bench.decoder", __doc__)
    sizes(arguments)
    if arguments.part == "all":
        return run_parts()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.part == "padding":
        from tools.bench.padding import padding as measure
    elif arguments.part == "training":
        from tools.bench.training import training as measure
    else:
        from tools.bench.concatenation import concatenation as measure
    return Line.code(measure(arguments))


if __name__ == "__main__":
    run_main(main)
