"""Training: one step, one loop, what it reads, and the keys of its results."""
