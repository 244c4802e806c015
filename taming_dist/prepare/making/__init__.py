"""From images, wherever they are, to shards: list them, make each sample, write shard by shard."""
