"""Statistics of batch normalisation for weights that were never trained with any."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

_COLLECTION = "batch_stats"


def update_batch_stats(
    apply_fn: Callable[[Mapping[str, Any], Any], Any], variables: Mapping[str, Any], batches: Iterable[Any]
) -> dict[str, Any]:
    """Estimates the statistics of batch normalisation anew, as averages over batches.

    Averaged weights have not seen the activations that they make, so that the running statistics of no training fit
    them. Whatever the momentum of the layers is, the result is the mean over all batches, weighted by their sizes.

    Args:
      apply_fn: `(variables, batch) -> batch_stats`, the collection after a batch in training mode: for linen,
        `lambda variables, batch: model.apply(variables, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]`.
      variables: the variables of the model, with the collection `"batch_stats"`. They stay as they are.
      batches: inputs of `apply_fn`, trees of arrays whose first axis is the batch.

    Returns:
      Variables with new statistics, and everything else as it was.

    Raises:
      ValueError: if `variables` has no `"batch_stats"`, or there are no batches.

    References:
      Izmailov et al., UAI 2018
    """
    if not jax.tree.leaves(variables.get(_COLLECTION)):
        raise ValueError(f"variables has the collections {sorted(variables)}, and no batch_stats to estimate.")
    step = jax.jit(apply_fn)
    zeros = jax.tree.map(jnp.zeros_like, variables[_COLLECTION])
    total, num_examples, kept = zeros, 0, None
    for batch in batches:
        size = jax.tree.leaves(batch)[0].shape[0]
        # A running statistic becomes `kept * old + (1 - kept) * that of the batch`.
        of_batch = step({**variables, _COLLECTION: zeros}, batch)
        if kept is None:
            from_ones = step({**variables, _COLLECTION: jax.tree.map(jnp.ones_like, zeros)}, batch)
            kept = jax.tree.map(jnp.subtract, from_ones, of_batch)
        own = jax.tree.map(lambda new, m: new / (1 - m), of_batch, kept)
        total = optax.tree.add_scale(total, size, own)
        num_examples += size
    if num_examples == 0:
        raise ValueError("batches is empty; give at least one batch to estimate the statistics from.")
    return {**variables, _COLLECTION: jax.tree.map(lambda sums: sums / num_examples, total)}
