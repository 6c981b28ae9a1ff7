"""Sweep over learning rates: give each method its own best one.

- The best learning rate with a nowcast may be a half, a quarter or less of the best one without. If both methods use
  the learning rate that was tuned for one of them, the comparison is unfair. Here the best ones are 3.2e-2 without and
  4e-3 with a nowcast, and the two methods end level.
- Choose the learning rate on validation data, by the mean over several seeds. Look at the test data once, at that
  learning rate.
- If the best one is the first or the last of the grid, extend the grid.

`jax.vmap` trains all learning rates and seeds of a method together, because a learning rate may be traced. For more
tasks and methods, see [Compare methods on your task](../guides/comparisons.md).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16), jnp.asarray(DIGITS.target)
TRAIN, VALIDATION, TEST = slice(0, 1200), slice(1200, 1500), slice(1500, None)
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
NETWORK = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])


def loss_fn(params: Any, rows: Any) -> jax.Array:
    """Return the mean cross entropy on some rows of the data."""
    logits = NETWORK.apply(params, IMAGES[rows])
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()


def train(
    learning_rate: jax.Array, key: jax.Array, nowcaster: str | None, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Train once, and return the validation loss and the test accuracy."""
    tx = optax.chain(optax.adam(learning_rate), wnn_jax.nowcast(nowcaster) if nowcaster else optax.identity())
    init_key, batch_key = jax.random.split(key)  # Both methods get the same network and the same batches.
    params = NETWORK.init(init_key, IMAGES[:1])

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, opt_state = carry
        gradient = jax.grad(loss_fn)(params, jax.random.randint(key, [64], 0, TRAIN.stop))
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(batch_key, num_steps))
    is_right = jnp.argmax(NETWORK.apply(params, IMAGES[TEST]), axis=-1) == LABELS[TEST]
    return loss_fn(params, VALIDATION), is_right.mean()


def main(num_steps: int = 200, num_seeds: int = 3, nowcaster: str = "drift") -> dict[str, dict[str, Any]]:
    """Sweep both methods. Return validation losses by learning rate, the best one, and the test accuracy there."""
    keys = jax.random.split(jax.random.key(0), num_seeds)
    results = {}
    for method, name in {"adam": None, "adam and nowcast": nowcaster}.items():
        train_once = functools.partial(train, nowcaster=name, num_steps=num_steps)
        loss, accuracy = jax.jit(jax.vmap(jax.vmap(train_once, (None, 0)), (0, None)))(jnp.array(LEARNING_RATES), keys)
        best = int(np.argmin(loss.mean(axis=1)))
        results[method] = {
            "validation_losses": dict(zip(LEARNING_RATES, loss.mean(axis=1).tolist(), strict=True)),
            "learning_rate": LEARNING_RATES[best],
            "accuracy": float(accuracy[best].mean()),
        }
    return results


if __name__ == "__main__":
    print(main())
