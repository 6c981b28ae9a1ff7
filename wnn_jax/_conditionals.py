"""What keeps a conditional on the steps of a training a conditional."""

import jax
import jax.custom_batching
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def any_member(predicate: jax.Array) -> jax.Array:
    """The predicate itself; under `vmap`, one unbatched scalar: whether it holds for any member of the batch.

    `vmap` turns a conditional on a batched predicate into a select, which runs both branches at every step. With
    `lax.cond(any_member(predicate), write, keep, ...)` it stays a conditional, and `write` runs when some member is to
    write: it must itself leave those members as they are for which `predicate` is false.

    Args:
      predicate: a bool scalar.

    Returns:
      A bool scalar.
    """
    return predicate


@any_member.def_vmap
def _any_member_vmap(axis_size: int, in_batched: list[bool], predicate: jax.Array) -> tuple[jax.Array, bool]:  # pyright: ignore[reportUnusedFunction]
    del axis_size
    return any_member(jnp.any(predicate, axis=0) if in_batched[0] else predicate), False
