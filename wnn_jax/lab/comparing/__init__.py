"""Judging ways to train: methods, comparisons, errors of forecasts, tables and plots."""
