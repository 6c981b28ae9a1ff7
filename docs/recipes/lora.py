"""Low-rank adapters: freeze the base, and forecast only the adapters.

- With `optax.partition`, the frozen base has no optimizer, so it takes no memory for moments or history.
- Under a partition `nowcast` sees only the adapters. If you pass `roles`, pass a function. By default `nowcast`
  recognises adapters called `a` and `b`. Here they have other names, so `roles` says that they are matrices.

The base learns upright digits. The adapters learn digits that lie on their side.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
UPRIGHT, LABELS = jnp.asarray(DIGITS.images / 16), jnp.asarray(DIGITS.target)
LYING = jnp.rot90(UPRIGHT, axes=(1, 2))
NUM_TRAIN = 1500
RANK = 8


def logits_fn(params: Any, images: jax.Array) -> jax.Array:
    """Return the logits of images `[batch, 8, 8]`, from two layers with one adapter each."""
    x = images.reshape(-1, 64)
    for name in ("hidden", "output"):
        layer, adapter = params["base"][name], params["adapters"][name]
        x = x @ layer["kernel"] + layer["bias"] + x @ adapter["down"] @ adapter["up"]
        x = jax.nn.relu(x) if name == "hidden" else x
    return x


def train(params: Any, tx: optax.GradientTransformationExtraArgs, images: jax.Array, num_steps: int) -> tuple[Any, Any]:
    """Train for some steps, and return the parameters and the state of the optimizer."""

    def loss_fn(params: Any, rows: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, images[rows]), LABELS[rows]).mean()

    @jax.jit
    def step(params: Any, state: Any, rows: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss_fn)(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in range(num_steps):
        params, state = step(params, state, jax.random.randint(jax.random.key(number), [128], 0, NUM_TRAIN))
    return params, state


@jax.jit
def init(key: jax.Array) -> Any:
    """Return a base of two layers with one adapter each. An adapter adds nothing at first."""
    kernel_init = jax.nn.initializers.lecun_normal()
    params: Any = {"base": {}, "adapters": {}}
    keys = iter(jax.random.split(key, 4))
    for name, num_outputs in {"hidden": 64, "output": 10}.items():
        params["base"][name] = {"kernel": kernel_init(next(keys), (64, num_outputs)), "bias": jnp.zeros(num_outputs)}
        params["adapters"][name] = {"down": kernel_init(next(keys), (64, RANK)), "up": jnp.zeros((RANK, num_outputs))}
    return params


def main(num_steps: int = 300, nowcaster: str = "drift") -> dict[str, float]:
    """Train the base, then the adapters. Return accuracies, counts, and whether the base is unchanged."""
    labels = {"base": "base", "adapters": "adapters"}
    base_only = {"base": optax.adam(3e-3), "adapters": optax.set_to_zero()}
    trained, _ = train(init(jax.random.key(0)), optax.partition(base_only, labels), UPRIGHT, num_steps)

    def all_dense(adapters: Any) -> Any:
        return jax.tree.map(lambda _: "dense", adapters)

    adapters_only = {
        "base": optax.set_to_zero(),
        "adapters": optax.chain(optax.adam(3e-3), wnn_jax.nowcast(nowcaster, roles=all_dense)),
    }
    tuned, state = train(trained, optax.partition(adapters_only, labels), LYING, num_steps)

    @jax.jit
    def accuracy(params: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(logits_fn(params, LYING[NUM_TRAIN:]), axis=-1) == LABELS[NUM_TRAIN:])

    return {
        "accuracy_before": float(accuracy(trained)),
        "accuracy": float(accuracy(tuned)),
        "is_base_unchanged": all(jax.tree.leaves(jax.tree.map(np.array_equal, tuned["base"], trained["base"]))),
        **jax.tree.map(float, wnn_jax.metrics(state)),
    }


if __name__ == "__main__":
    print(main())
