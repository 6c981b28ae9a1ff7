"""Several seeds: train them at once with `jax.vmap`.

- The forecast stays inside a conditional under `vmap`. It runs only on steps at which some seed jumps.
- Seeds are independent. If the jump of one seed is not finite, `nowcast` rejects only that jump.
- Each count has one value for each seed. Never report the result of a single seed.
"""

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
NUM_TRAIN = 1500
NETWORK = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(10)])


def train(key: jax.Array, num_steps: int, nowcaster: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Train one seed, and return the test accuracy and the counts of `nowcast`."""
    tx = optax.chain(optax.adam(3e-3), wnn_jax.nowcast(nowcaster))
    init_key, batch_key = jax.random.split(key)
    params = NETWORK.init(init_key, IMAGES[:1])

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        logits = NETWORK.apply(params, IMAGES[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, opt_state = carry
        gradient = jax.grad(loss_fn)(params, jax.random.randint(key, [128], 0, NUM_TRAIN))
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(batch_key, num_steps)
    (params, opt_state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    is_right = jnp.argmax(NETWORK.apply(params, IMAGES[NUM_TRAIN:]), axis=-1) == LABELS[NUM_TRAIN:]
    return is_right.mean(), wnn_jax.metrics(opt_state)


def main(num_steps: int = 300, num_seeds: int = 4, nowcaster: str = "drift") -> dict[str, np.ndarray]:
    """Train all seeds together, and return the test accuracy and the counts of each."""
    keys = jax.random.split(jax.random.key(0), num_seeds)
    accuracy, counts = jax.jit(jax.vmap(lambda key: train(key, num_steps, nowcaster)))(keys)
    return jax.tree.map(np.asarray, {"accuracy": accuracy, **counts})


if __name__ == "__main__":
    print(main())
