"""The trials of tools/chaos.py."""
