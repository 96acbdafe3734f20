"""Saving and loading at any layout: snapshot, asynchronous write, manifest, run lock, preflight."""
