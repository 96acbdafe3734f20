"""Whether this project is right, and how fast it is, on the GPU of a bare machine; see `__main__`."""
