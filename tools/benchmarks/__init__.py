"""The benchmarks of tools/benchmark.py, one a module."""
