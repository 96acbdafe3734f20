"""Raw rows to shards and features, and the check that they are whole."""
