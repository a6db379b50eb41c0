"""Images on disk and on their way to the device: shards, sample order, transforms, loader."""
