"""Weights in and out: Hugging Face folders, the authors' layout, and the parity of both sides."""
