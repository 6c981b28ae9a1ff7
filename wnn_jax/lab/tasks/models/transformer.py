"""Transformers."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class TransformerLM(nn.Module):
    """A small decoder-only transformer in the style of GPT-2: LayerNorm first, learned positions, GELU.

    Attributes:
      vocab_size: number of different tokens.
      width: features of every position.
      num_layers: blocks of attention and MLP.
      num_heads: attention heads.
      max_length: the longest sequence, in tokens.
    """

    vocab_size: int
    width: int = 32
    num_layers: int = 1
    num_heads: int = 4
    max_length: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[n, length]` to the logits of the next ones, `[n, length, vocab_size]`.

        Raises:
          ValueError: if the sequence is longer than `max_length`.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"tokens has sequences of {length} tokens; set max_length={self.max_length} to as many.")
        positions = nn.Embed(self.max_length, self.width, name="wpe")(jnp.arange(length))
        x = nn.Embed(self.vocab_size, self.width, name="wte")(tokens) + positions[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.num_layers):
            x = x + nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x), mask=mask)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocab_size)(nn.LayerNorm()(x))
