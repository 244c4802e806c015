"""Collections of images before they are sharded: one class per way of storing them.

Every class yields `Entry` records and keeps none, so ten million files take no memory.
"""
