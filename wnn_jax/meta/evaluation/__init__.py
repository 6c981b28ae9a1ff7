"""Judging ways to train: arms, comparisons, errors of forecasts, tables and plots."""
