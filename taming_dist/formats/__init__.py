"""The formats on disk: image shards, code shards, their manifests, and the storage under them."""
