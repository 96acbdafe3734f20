"""Rendered worlds, from one shape an image to documents in miniature: what is seen, asked and told. No files, no settings."""
