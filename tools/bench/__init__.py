"""Benchmarks: each prints ratios, what was wanted, and exits 1 where a line is missed."""
