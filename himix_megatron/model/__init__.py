"""The HiMix model over stock megatron-core: layer, vision tower and encoder, loss, schedule."""
