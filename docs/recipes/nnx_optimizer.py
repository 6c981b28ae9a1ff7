"""Flax nnx: use `nowcast()` in an `nnx.Optimizer`.

- Pass the chain as usual, with `wrt=nnx.Param`. `nowcast` then forecasts only parameters, not statistics, counters or
  keys.
- The optimizer's state holds nnx variables. `nnx.as_pure` takes the arrays out of them, for `wnn_jax.metrics`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import wnn_jax

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16), jnp.asarray(DIGITS.target)
NUM_TRAIN = 1500


class Network(nnx.Module):
    """Two dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of images `[batch, 64]`."""
        return self.output(nnx.relu(self.hidden(images)))


@nnx.jit
def train_step(network: Network, optimizer: nnx.Optimizer[Network], rows: jax.Array) -> None:
    """Take one training step on some rows of the data, in place."""

    def loss_fn(network: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(network(IMAGES[rows]), LABELS[rows]).mean()

    optimizer.update(network, nnx.grad(loss_fn)(network))


def main(num_steps: int = 300) -> dict[str, float]:
    """Train, and return the test accuracy and the counts of `nowcast`."""
    network = Network(nnx.Rngs(0))
    tx = optax.chain(optax.adam(3e-3), wnn_jax.nowcast())
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
    for step in range(num_steps):
        train_step(network, optimizer, jax.random.randint(jax.random.key(step), [128], 0, NUM_TRAIN))

    is_right = jnp.argmax(network(IMAGES[NUM_TRAIN:]), axis=-1) == LABELS[NUM_TRAIN:]
    counts = wnn_jax.metrics(nnx.as_pure(optimizer.opt_state))
    return {"accuracy": float(is_right.mean()), **jax.tree.map(float, counts)}


if __name__ == "__main__":
    print(main())
