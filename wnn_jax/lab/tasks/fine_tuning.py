"""Fine-tuning of a pre-trained network: of all its weights, or of low-rank adapters."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from wnn_jax import default_roles
from wnn_jax._files import read_arrays, write_arrays
from wnn_jax._orthogonal import matrix_axes
from wnn_jax._roles import bias_shapes
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data.datasets import TextDataset, arrays_digest
from wnn_jax.lab.tasks.language_model import LanguageModel, transformer_task
from wnn_jax.lab.tasks.reparameterized import Reparameterized
from wnn_jax.lab.tasks.task import ModelState, Params

# The network of `shakespeare-transformer`, trained on the first half of the text by `experiments/pretraining.py`.
PRETRAINED = Path(__file__).parent / "pretrained" / "shakespeare-first-half.npz"
_FORMAT = "wnn_jax.params"
_RANK, _ALPHA = 4, 8.0


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuning(Reparameterized):
    """Another task without model state, `base`, that begins with the pre-trained parameters of its network.

    Raises:
      UsageError: if `pretrained` belongs to another network than the task's.
    """

    pretrained: Params

    def __post_init__(self) -> None:
        expected, _ = jax.eval_shape(self.base.init, jax.random.key(0))
        if jax.tree.map(np.shape, self.pretrained) != jax.tree.map(np.shape, expected):
            raise UsageError("pretrained has other shapes than the task's network; give weights of a network like it.")

    def describe(self) -> Mapping[str, Any]:
        weights = [np.asarray(leaf) for leaf in jax.tree.leaves(self.pretrained)]
        return {"kind": "fine-tuning", "base": dict(self.base.describe()), "sha256": arrays_digest(*weights)}

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        del key
        return jax.tree.map(jnp.asarray, self.pretrained), {}


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankFineTuning(FineTuning):
    """Trains low-rank adapters of all dense kernels, and leaves the pre-trained parameters as they are.

    This is LoRA (Hu et al., ICLR 2022, section 4.1): a kernel `W` becomes `W + (alpha / rank) a b`, where `a` has
    `rank` columns. Parameters are nested dicts, and no kernel is a stack of matrices.
    """

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "rank": _RANK, "alpha": _ALPHA}

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Return adapters that change nothing yet.

        In the place of each dense kernel is `{"a": [rows, rank], "b": [rank, columns]}`, where `b` is 0.
        """
        adapters = {}
        keys = jax.random.split(key, len(self._matrices))
        for kernel_key, (path, (rows, columns)) in zip(keys, self._matrices.items(), strict=True):
            a = jax.nn.initializers.he_uniform()(kernel_key, (rows, _RANK))
            adapters[path] = {"a": a, "b": jnp.zeros((_RANK, columns))}
        return traverse_util.unflatten_dict(adapters), {}

    def network(self, params: Params) -> Params:
        """Return the pre-trained parameters plus the adapters."""
        weights: Any = dict(traverse_util.flatten_dict(self.pretrained))
        factors: Any = traverse_util.flatten_dict(params)
        for path in self._matrices:
            product = factors[*path, "a"] @ factors[*path, "b"]
            weights[path] = weights[path] + _ALPHA / _RANK * product.reshape(weights[path].shape)
        return traverse_util.unflatten_dict(weights)

    @functools.cached_property
    def _matrices(self) -> dict[tuple[str, ...], tuple[int, int]]:
        """The path of each dense kernel, and its shape as a matrix."""
        leaves = jax.tree_util.tree_leaves_with_path(self.pretrained)
        roles, biases = jax.tree.leaves(default_roles(self.pretrained)), bias_shapes(self.pretrained)
        matrices: dict[tuple[str, ...], tuple[int, int]] = {}
        for (path, leaf), role, bias in zip(leaves, roles, biases, strict=True):
            axes = matrix_axes(role, leaf.shape, bias)
            if role == "dense" and axes is not None:
                rows = math.prod(leaf.shape[: axes[1]])
                matrices[tuple(key.key for key in path)] = rows, leaf.size // rows
        return matrices


def shakespeare_half(half: Literal["first", "second"], text: TextDataset) -> LanguageModel:
    """Make the task `shakespeare-transformer` on one half of its training text.

    The validation text continues the last play of the second half. The first half has nothing of that play.
    """
    middle = len(text.train) // 2
    train = text.train[:middle] if half == "first" else text.train[middle:]
    return transformer_task(dataclasses.replace(text, train=train))


def save_params(params: Params, file: Path) -> None:
    """Write parameters, as nested dicts, to a file that `load_params` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    arrays = jax.device_get(traverse_util.flatten_dict(params, sep="/"))
    write_arrays(file, arrays, {"format": _FORMAT, "version": 1})


def load_params(file: Path) -> Params:
    """Read what `save_params` wrote. A damaged or other file is a `ValueError`."""
    _, arrays = read_arrays(file, format_name=_FORMAT, version=1)
    return traverse_util.unflatten_dict(arrays, sep="/")
