"""Networks that predict the next token. All map tokens `[n, length]` to logits `[n, length, vocab_size]`."""

# ruff: noqa: D102 - the lines above say what every `__call__` does.

import flax.linen as nn
import jax
import jax.numpy as jnp


class TransformerLM(nn.Module):
    """A small decoder-only transformer in the style of GPT-2: LayerNorm first, learned positions, GELU.

    `width` are the features of every position, `max_length` is the longest sequence in tokens.
    """

    vocab_size: int
    width: int = 32
    num_layers: int = 1
    num_heads: int = 4
    max_length: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
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


class LSTM(nn.Module):
    """One recurrent layer of `width` features, from a state of zeros (Hochreiter and Schmidhuber, 1997)."""

    vocab_size: int
    width: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab_size, self.width, name="wte")(tokens)
        return nn.Dense(self.vocab_size)(nn.RNN(nn.OptimizedLSTMCell(self.width))(x))
