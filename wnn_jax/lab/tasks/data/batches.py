"""Which examples are in a batch."""

import functools
from collections.abc import Iterator, Mapping

import numpy as np

from wnn_jax.lab.errors import UsageError


def batch_indices(seed: int, step: int, *, num_examples: int, batch_size: int) -> np.ndarray:
    """The indices of the examples in the training batch of a step.

    Every epoch has its own random order, which the seed decides. Its incomplete last batch is left out. `batch_size` is
    at most `num_examples`. The result is `[batch_size]` int32.
    """
    epoch, position = divmod(step, num_examples // batch_size)
    return _epoch_order(seed, epoch, num_examples)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=32)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(num_examples).astype(np.int32)
    order.setflags(write=False)
    return order


def consecutive_batches(examples: Mapping[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield all examples in their order, `batch_size` at a time. The last batch may be smaller."""
    for start in range(0, len(next(iter(examples.values()))), batch_size):
        yield {name: array[start : start + batch_size] for name, array in examples.items()}


def check_batch_size(batch_size: int, num_examples: int) -> None:
    """Refuse a batch size that is not positive or exceeds the training set, by a `UsageError`."""
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be positive.")
    if batch_size > num_examples:
        raise UsageError(
            f"batch_size={batch_size} is larger than the training set of {num_examples} examples; choose at most that."
        )
