"""Equinox: train a model that contains functions and numbers besides arrays.

- Pass `eqx.filter(model, eqx.is_inexact_array)` to `init` and `update`. If you pass the whole model, `nowcast` raises
  an error that says so.
- `nowcast` reads the role of each parameter (kernel, bias, scale) from the classes of the modules.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16), jnp.asarray(DIGITS.target)
NUM_TRAIN = 1500
TX = optax.chain(optax.adam(3e-3), wnn_jax.nowcast())


@eqx.filter_jit
def train_step(model: eqx.Module, opt_state: Any, rows: jax.Array) -> tuple[eqx.Module, Any]:
    """Take one training step on some rows of the data."""

    @eqx.filter_grad
    def gradient_fn(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(IMAGES[rows]), LABELS[rows]).mean()

    updates, opt_state = TX.update(gradient_fn(model), opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state


def main(num_steps: int = 300) -> dict[str, float]:
    """Train, and return the test accuracy and the counts of `nowcast`."""
    model: Any = eqx.nn.MLP(64, 10, width_size=64, depth=1, key=jax.random.key(0))
    opt_state = TX.init(eqx.filter(model, eqx.is_inexact_array))
    for step in range(num_steps):
        model, opt_state = train_step(model, opt_state, jax.random.randint(jax.random.key(step), [128], 0, NUM_TRAIN))

    is_right = jnp.argmax(jax.vmap(model)(IMAGES[NUM_TRAIN:]), axis=-1) == LABELS[NUM_TRAIN:]
    return {"accuracy": float(is_right.mean()), **jax.tree.map(float, wnn_jax.metrics(opt_state))}


if __name__ == "__main__":
    print(main())
