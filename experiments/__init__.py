"""Experiments: one file per task, whose docstring is its record. They share `experiments.harness`."""
