"""The shard format, local and remote storage, and reading samples from verified shards."""
