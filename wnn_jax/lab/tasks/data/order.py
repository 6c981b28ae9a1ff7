"""The order in which a training sees its examples."""

import functools

import numpy as np

from wnn_jax.lab.errors import UsageError


def batch_indices(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """Which examples are in the batch of a step.

    Every epoch has an order of its own, and its incomplete last batch is left out.

    Args:
      seed: decides the order.
      step: the number of the step, from 0.
      num_examples: size of the training set.
      batch_size: examples per step, at most `num_examples`.

    Returns:
      `[batch_size]` int32.
    """
    epoch, position = divmod(step, num_examples // batch_size)
    return _epoch_order(seed, epoch, num_examples)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=32)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_examples).astype(np.int32)
    order.setflags(write=False)
    return order


def check_batch_size(batch_size: int, num_examples: int) -> None:
    """Refuses batches that cannot be made.

    Raises:
      UsageError: if the batch size is not positive, or larger than the training set.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be positive.")
    if batch_size > num_examples:
        raise UsageError(
            f"batch_size={batch_size} is larger than the training set of {num_examples} examples; choose at most that."
        )
