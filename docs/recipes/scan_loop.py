"""Plain Optax: run the whole training loop in one `jax.lax.scan`.

- The state of `nowcast` is a tree of arrays with fixed shapes, so `scan` can carry it.
- Call `wnn_jax.metrics` inside the scan to get its scalars for every step.
- Donate parameters and state. Then most steps do not copy the history.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16), jnp.asarray(DIGITS.target)
NUM_TRAIN = 1500
TX = optax.chain(optax.adam(3e-3), wnn_jax.nowcast())


def logits_fn(params: Any, images: jax.Array) -> jax.Array:
    """Return the logits of images `[batch, 64]`."""
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
    """Return the mean cross entropy on some rows of the data."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, IMAGES[rows]), LABELS[rows]).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="num_steps")
def train(params: Any, opt_state: Any, num_steps: int) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Train for some steps. Return the parameters, the state, and the loss and counts of each step."""

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], dict[str, jax.Array]]:
        params, opt_state = carry
        rows = jax.random.randint(key, [128], 0, NUM_TRAIN)
        loss, gradient = jax.value_and_grad(loss_fn)(params, rows)
        updates, opt_state = TX.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss, **wnn_jax.metrics(opt_state)}

    keys = jax.random.split(jax.random.key(1), num_steps)
    (params, opt_state), history = jax.lax.scan(step, (params, opt_state), keys)
    return params, opt_state, history


@jax.jit
def init(key: jax.Array) -> Any:
    """Return the parameters of two dense layers."""
    keys = jax.random.split(key)
    kernel_init = jax.nn.initializers.lecun_normal()
    return {
        "hidden": {"kernel": kernel_init(keys[0], (64, 64)), "bias": jnp.zeros(64)},
        "output": {"kernel": kernel_init(keys[1], (64, 10)), "bias": jnp.zeros(10)},
    }


def main(num_steps: int = 300) -> dict[str, float]:
    """Train, and return the test accuracy, and the loss and counts of the last step."""
    params = init(jax.random.key(0))
    params, _, history = train(params, TX.init(params), num_steps)
    is_right = jnp.argmax(logits_fn(params, IMAGES[NUM_TRAIN:]), axis=-1) == LABELS[NUM_TRAIN:]
    return {"accuracy": float(is_right.mean()), **{name: float(values[-1]) for name, values in history.items()}}


if __name__ == "__main__":
    print(main())
