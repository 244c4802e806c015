"""Making image shards: list the images, make each sample, write shard by shard."""
