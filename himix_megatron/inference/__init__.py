"""Answers from a model at any layout: generation, sampling, streamed text."""
