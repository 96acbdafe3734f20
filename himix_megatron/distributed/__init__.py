"""Ranks, process groups and megatron-core: the launch, the topology, its settings, fused kernels, CPU."""
