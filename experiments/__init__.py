"""Experiments: one file per recorded table, a configuration whose docstring is the record."""
