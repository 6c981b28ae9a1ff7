"""Timings, run on demand: `python -m benchmarks.NAME`. Each keeps its last result as text beside it."""
