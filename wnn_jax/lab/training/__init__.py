"""Train a task: one step, one loop, optimizers, evaluation weights, checkpoints, and the keys of results."""
