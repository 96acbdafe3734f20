"""`pretrain()`: inputs, components, the loop, one step, resume."""
