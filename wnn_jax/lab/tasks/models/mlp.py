"""Networks of dense layers only."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Dense layers with ReLUs between them.

    Attributes:
      num_classes: number of logits.
      widths: features of each hidden layer.
    """

    num_classes: int = 10
    widths: Sequence[int] = (64,)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[n, height, width, channels]` to logits `[n, num_classes]`."""
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)
