"""Benchmark scores as mathematics: an answer's text in, figures and official answer files out. No model, no files, no torch.

Each benchmark is a module with three functions: `tallies` (what each answer adds to sums), `figures` (published figures from
the sums) and `files` (the answers as the benchmark's own tools and servers read them). `bootstrap` resamples the tallies.
"""
