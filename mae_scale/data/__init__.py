"""Reading training data: shards, sample order, transforms and loaders."""
