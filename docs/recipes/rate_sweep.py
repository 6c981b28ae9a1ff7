"""Is it any better? A sweep over learning rates, in which each arm gets its own best rate.

- The rate that is best without a nowcast need not be the best with one, which may be a half or a quarter of it, or
  less. To give both arms the rate that was tuned for one of them decides the comparison before it begins. Here the best
  rates are 3.2e-2 without and 4e-3, an eighth, with a nowcast, at which the two end level.
- The rate is chosen on validation data, as the mean over several seeds. The test data is looked at once, at that rate.
- If the best rate is the first or the last of the grid, the grid is too short.

All rates and seeds of an arm train together, by `jax.vmap`: a learning rate may be traced. For more tasks, arms and
readings: [compare ways to train](../guides/comparisons.md).
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
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
NETWORK = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])


def loss_fn(params: Any, rows: Any) -> jax.Array:
    """The mean cross entropy on some rows of the data."""
    logits = NETWORK.apply(params, IMAGES[rows])
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()


def train(rate: jax.Array, key: jax.Array, nowcaster: str | None, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """The validation loss and the test accuracy of one training."""
    tx = optax.chain(optax.adam(rate), wnn_jax.nowcast(nowcaster) if nowcaster else optax.identity())
    init_key, batch_key = jax.random.split(key)  # The same in both arms: the same network, the same batches.
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
    """Sweeps both arms; returns the validation losses of each by rate, its best rate, and the test accuracy there."""
    keys = jax.random.split(jax.random.key(0), num_seeds)
    results = {}
    for arm, of_arm in {"adam": None, "adam and nowcast": nowcaster}.items():
        one = functools.partial(train, nowcaster=of_arm, num_steps=num_steps)
        loss, accuracy = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(jnp.array(RATES), keys)
        best = int(np.argmin(loss.mean(axis=1)))
        results[arm] = {
            "validation_losses": dict(zip(RATES, loss.mean(axis=1).tolist(), strict=True)),
            "rate": RATES[best],
            "accuracy": float(accuracy[best].mean()),
        }
    return results


if __name__ == "__main__":
    print(main())
