"""Compare methods of training: options, runs, results, tables and plots."""
