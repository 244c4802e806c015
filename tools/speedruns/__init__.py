"""What `tools/speedrun.py` consists of."""
