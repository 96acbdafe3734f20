"""Benchmarks: their question files, the runner that asks and resumes, the scores."""
