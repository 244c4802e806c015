"""What lies on disk: shards of images and of codes, their manifests, and where they are kept."""
