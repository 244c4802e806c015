"""The benchmarks of tools/benchmark.py, one per module."""
