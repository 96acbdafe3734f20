"""What a model costs, by arithmetic: FLOPs of a training step, memory of a rank, peaks of accelerators."""
