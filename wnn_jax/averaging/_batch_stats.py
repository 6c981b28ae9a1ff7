"""Statistics of batch normalisation for averaged weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def update_batch_stats(
    apply_fn: Callable[..., tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    **options: Any,
) -> dict[str, Any]:
    """Return variables with batch statistics estimated from scratch, as averages over batches.

    Averaged weights were never trained, so no running statistics fit their activations. Whatever the momentum of the
    layers is, the result is the mean over all batches, weighted by their sizes.

    Args:
      apply_fn: the `apply` of a Flax linen module, or a function that is called like it:
        `apply_fn(variables, batch, mutable="batch_stats", **options)` returns the outputs, which are not used, and the
        collections that changed, `{"batch_stats": ...}`.
      variables: the variables of the model, with the collection `"batch_stats"`. They are not changed.
      batches: inputs of `apply_fn`, trees of arrays whose first axis is the batch.
      **options: hashable arguments of `apply_fn` that put the model in training mode, such as `train=True`.

    Returns:
      Variables with new statistics, and everything else as in `variables`.

    Raises:
      ValueError: if `variables` has no `"batch_stats"`, there are no batches, or the statistics do not change with
        them, because the model is not in training mode.

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from wnn_jax import averaging
      >>> model = nn.BatchNorm()
      >>> batches = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [6.0]])]
      >>> variables = model.init(jax.random.key(0), batches[0], use_running_average=False)
      >>> variables = averaging.update_batch_stats(model.apply, variables, batches, use_running_average=False)
      >>> print(f"{variables['batch_stats']['mean'].item():.3f}")  # of the means 1.5 and 4.5
      3.000
    """
    if not jax.tree.leaves(variables.get("batch_stats")):
        raise ValueError(f"variables has the collections {sorted(variables)}, and no batch_stats to estimate.")
    compiled = jax.jit(apply_fn, static_argnames=("mutable", *options))

    def step(batch_stats: Any, batch: Any) -> Any:
        _, changed = compiled({**variables, "batch_stats": batch_stats}, batch, mutable="batch_stats", **options)
        return changed["batch_stats"]

    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    total, num_examples, momentum = zeros, 0, None
    for batch in batches:
        size = jax.tree.leaves(batch)[0].shape[0]
        # A running statistic becomes `momentum * old + (1 - momentum) * new`.
        stats = step(zeros, batch)
        if momentum is None:
            momentum = jax.tree.map(jnp.subtract, step(jax.tree.map(jnp.ones_like, zeros), batch), stats)
            if all((leaf == 1).all() for leaf in jax.tree.leaves(momentum)):
                raise ValueError(
                    f"apply_fn={apply_fn!r} leaves batch_stats as they are with the options {options}: the model does "
                    "not train. Pass what puts it in training mode, such as train=True, after the batches."
                )
        means = jax.tree.map(lambda stat, kept: stat / (1 - kept), stats, momentum)
        total = optax.tree.add_scale(total, size, means)
        num_examples += size
    if num_examples == 0:
        raise ValueError("batches is empty; give at least one batch to estimate the statistics from.")
    return {**variables, "batch_stats": jax.tree.map(lambda sums: sums / num_examples, total)}
