"""Images to code shards: any number of workers, stopped and started in any way, same bytes."""
