"""Where images are before they are in shards: a class for each way in which people keep them.

Every class yields `Entry` records and never holds them: ten million files are no burden.
"""
