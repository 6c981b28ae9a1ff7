"""Haiku: train a transformed function.

- Pass Haiku's parameters to `nowcast` without a change. It knows the names `w`, `b`, `scale` and `offset`.
- With `hk.transform_with_state`, Haiku keeps the state apart from the parameters, so `nowcast` does not forecast it.
"""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16), jnp.asarray(DIGITS.target)
NUM_TRAIN = 1500
TX = optax.chain(optax.adam(3e-3), wnn_jax.nowcast())


@hk.without_apply_rng
@hk.transform
def network(images: jax.Array) -> jax.Array:
    """Return the logits of images `[batch, 64]`."""
    return hk.nets.MLP([64, 10])(images)


@jax.jit
def train_step(params: hk.Params, opt_state: Any, rows: jax.Array) -> tuple[hk.Params, Any]:
    """Take one training step on some rows of the data."""

    def loss_fn(params: hk.Params) -> jax.Array:
        logits = network.apply(params, IMAGES[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()

    updates, opt_state = TX.update(jax.grad(loss_fn)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def main(num_steps: int = 300) -> dict[str, float]:
    """Train, and return the test accuracy and the counts of `nowcast`."""
    params = jax.jit(network.init)(jax.random.key(0), IMAGES[:1])
    opt_state = TX.init(params)
    for step in range(num_steps):
        params, opt_state = train_step(params, opt_state, jax.random.randint(jax.random.key(step), [128], 0, NUM_TRAIN))

    is_right = jnp.argmax(jax.jit(network.apply)(params, IMAGES[NUM_TRAIN:]), axis=-1) == LABELS[NUM_TRAIN:]
    return {"accuracy": float(is_right.mean()), **jax.tree.map(float, wnn_jax.metrics(opt_state))}


if __name__ == "__main__":
    print(main())
