"""Making, indexing and verifying shards."""
