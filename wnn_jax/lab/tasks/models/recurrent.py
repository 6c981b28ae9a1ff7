"""Recurrent networks."""

import flax.linen as nn
import jax


class LSTM(nn.Module):
    """A language model of one recurrent layer, which starts from a state of zeros.

    Attributes:
      vocab_size: number of different tokens.
      width: features of every token, and of the state.

    References:
      Hochreiter, Schmidhuber, `Long Short-Term Memory <https://doi.org/10.1162/neco.1997.9.8.1735>`_, Neural
      Computation 1997
    """

    vocab_size: int
    width: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[n, length]` to the logits of the next ones, `[n, length, vocab_size]`."""
        x = nn.Embed(self.vocab_size, self.width, name="wte")(tokens)
        return nn.Dense(self.vocab_size)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x))
