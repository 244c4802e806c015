"""What is done offline, before training: collections of images to shards, and shards to codes."""
