"""Offline preparation: collections of images become image shards, and these become code shards."""
