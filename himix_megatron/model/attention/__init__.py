"""Mixture attention, where vision meets text: the layout of samples, the kernels, the cache of generation."""
