"""From raw files to batches: shards, text, images, the order of samples, packs, preprocessing."""
