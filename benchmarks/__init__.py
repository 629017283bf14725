"""Measurements: `python benchmarks/run.py SUITE`."""
