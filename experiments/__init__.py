"""Experiments: one file per recorded table, a configuration whose docstring is the record."""

from wnn_jax.lab.errors import check_extra, one_line_errors

with one_line_errors():
    check_extra("lab")
