"""Flax linen: use a `TrainState` with batch normalisation and an average of the weights.

- Put `nowcast()` into the chain that you pass to `TrainState.create`. The rest of the loop stays the same. An average
  of the parameters does not change updates, so it may come after `nowcast`.
- Running statistics of batch normalisation are not parameters, so `nowcast` does not forecast them. They adapt to the
  parameters with every batch. The jumps of the default are small enough for that.
- The running statistics do not fit averaged weights. Estimate new ones before you evaluate the average.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from sklearn.datasets import load_digits

import wnn_jax
from wnn_jax import averaging

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.images[..., None] / 16), jnp.asarray(DIGITS.target)
NUM_TRAIN = 1500


class Network(nn.Module):
    """A convolution, batch normalisation, and a classifier."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Return the logits of images `[batch, 8, 8, 1]`."""
        x = nn.Conv(16, (3, 3), strides=2, use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class TrainState(train_state.TrainState):
    """A `TrainState` with running statistics."""

    batch_stats: Any


@jax.jit
def train_step(state: TrainState, rows: jax.Array) -> TrainState:
    """Take one training step on some rows of the data."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, IMAGES[rows], train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[rows]).mean()
        return loss, updates["batch_stats"]

    gradient, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradient, batch_stats=batch_stats)


def main(num_steps: int = 300) -> dict[str, float]:
    """Train, and return the test accuracy of the weights and of their average, and the counts of `nowcast`."""
    network = Network()
    variables = jax.jit(network.init, static_argnames="train")(jax.random.key(0), IMAGES[:1], train=True)
    tx = optax.chain(optax.adam(3e-3), wnn_jax.nowcast(), averaging.ema(0.95))
    state = TrainState.create(apply_fn=network.apply, tx=tx, **variables)
    for step in range(num_steps):
        state = train_step(state, jax.random.randint(jax.random.key(step), [128], 0, NUM_TRAIN))

    batches = IMAGES[:NUM_TRAIN].reshape(12, -1, 8, 8, 1)
    average = {"params": averaging.ema_eval_params(state.opt_state, state.params), "batch_stats": state.batch_stats}
    average = averaging.update_batch_stats(network.apply, average, batches, train=True)

    @jax.jit
    def accuracy(variables: Any) -> jax.Array:
        logits = network.apply(variables, IMAGES[NUM_TRAIN:], train=False)
        return jnp.mean(jnp.argmax(logits, axis=-1) == LABELS[NUM_TRAIN:])

    return {
        "accuracy": float(accuracy({"params": state.params, "batch_stats": state.batch_stats})),
        "accuracy_of_average": float(accuracy(average)),
        **jax.tree.map(float, wnn_jax.metrics(state.opt_state)),
    }


if __name__ == "__main__":
    print(main())
