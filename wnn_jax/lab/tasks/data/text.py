"""Texts."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from wnn_jax.lab.tasks.data.digest import arrays_digest
from wnn_jax.lab.tasks.data.prepared import read_prepared


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextDataset:
    """A text in three parts, as tokens.

    Attributes:
      name: as in the table of data sets.
      train: `[n]` uint8, what is trained on.
      validation: the same of what targets are read on.
      test: the same, for one score at the end.
      vocab_size: number of different tokens.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    vocab_size: int

    @functools.cached_property
    def digest(self) -> str:
        """A checksum of everything in the data set but its name."""
        return arrays_digest(np.array([self.vocab_size], np.int64), self.train, self.validation, self.test)


def load_tiny_shakespeare(data_dir: Path) -> TextDataset:
    """Tiny Shakespeare, 1.1 million characters, each of which is a token."""
    texts = {
        split: np.frombuffer(read_prepared("tiny_shakespeare", split, data_dir, ["text"])[0]["text"], np.uint8)
        for split in ("train", "validation", "test")
    }
    characters = np.unique(np.concatenate(list(texts.values())))
    tokens = {split: np.searchsorted(characters, text).astype(np.uint8) for split, text in texts.items()}
    return TextDataset(name="tiny_shakespeare", **tokens, vocab_size=len(characters))
