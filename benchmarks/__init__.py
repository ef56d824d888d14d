"""Measurements of speed and memory: `python -m internvl.benchmarks`."""
