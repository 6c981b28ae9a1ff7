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
from wnn_jax.lab.tasks.data import TextDataset, arrays_digest
from wnn_jax.lab.tasks.language_model import LanguageModel, transformer_task
from wnn_jax.lab.tasks.reparameterized import Reparameterized
from wnn_jax.lab.tasks.task import ModelState, Params

# The network of `shakespeare-transformer`, trained on the first half of the text by `experiments/pretraining.py`.
PRETRAINED = Path(__file__).parent / "pretrained" / "shakespeare-first-half.npz"
_FORMAT = "wnn_jax.params"


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuning(Reparameterized):
    """Another task that begins with pre-trained parameters.

    Attributes:
      base: the other task.
      pretrained: parameters of its network.
      model_state: its model state to begin with.

    Raises:
      UsageError: if these belong to another network than the task's.
    """

    pretrained: Params
    model_state: ModelState = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = zip(("pretrained", "model_state"), jax.eval_shape(self.base.init, jax.random.key(0)), strict=True)
        for name, tree in expected:
            given, wanted = _shapes(getattr(self, name)), _shapes(tree)
            if differences := given.items() ^ wanted.items():
                where = min(path for path, _ in differences)
                raise UsageError(
                    f"{name} has {given.get(where, 'nothing')} at {where}, and the network of the task has "
                    f"{wanted.get(where, 'nothing')}; give weights of a network like it."
                )

    def describe(self) -> Mapping[str, Any]:
        """The base task, and a checksum of the weights to begin with."""
        weights = [np.asarray(leaf) for leaf in jax.tree.leaves((self.pretrained, self.model_state))]
        return {"kind": "fine-tuning", "base": dict(self.base.describe()), "sha256": arrays_digest(*weights)}

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """The pre-trained parameters, whatever the key is."""
        del key
        return jax.tree.map(jnp.asarray, (self.pretrained, self.model_state))


@dataclasses.dataclass(frozen=True, eq=False)
class LowRankFineTuning(FineTuning):
    """Trains low-rank adapters of all dense kernels, and leaves the pre-trained parameters as they are.

    This is LoRA (Hu et al., ICLR 2022, section 4.1): a kernel `W` becomes `W + (alpha / rank) a b`, where `a` has
    `rank` columns. The other attributes are those of `FineTuning`; parameters are nested dicts.

    Raises:
      UsageError: as `FineTuning`, or if there is no dense kernel, or the rank is not positive or too large for one.
    """

    rank: int = 4
    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UsageError(f"rank={self.rank} must be positive.")
        if not self._matrices:
            raise UsageError("pretrained has no dense kernel to adapt; fine-tune all weights of this network.")
        for path, (*_, rows, columns) in self._matrices.items():
            if self.rank > min(rows, columns):
                raise UsageError(
                    f"rank={self.rank} is greater than the rank of the kernel {'/'.join(path)}, a matrix of {rows} x "
                    f"{columns}; give at most {min(rows, columns)}."
                )

    def describe(self) -> Mapping[str, Any]:
        """The base task, a checksum of the pre-trained parameters, and the form of the adapters."""
        return {**super().describe(), "rank": self.rank, "alpha": self.alpha}

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Adapters that change nothing yet, and the model state.

        In the place of each dense kernel is `{"a": [rows, rank], "b": [rank, columns]}`, where `b` is 0.
        """
        adapters = {}
        keys = jax.random.split(key, len(self._matrices))
        for kernel_key, (path, (*stack, rows, columns)) in zip(keys, self._matrices.items(), strict=True):
            initialize = jax.nn.initializers.he_uniform(batch_axis=range(len(stack)))
            a = initialize(kernel_key, (*stack, rows, self.rank))
            adapters[path] = {"a": a, "b": jnp.zeros((*stack, self.rank, columns))}
        return traverse_util.unflatten_dict(adapters), jax.tree.map(jnp.asarray, self.model_state)

    def network(self, params: Params) -> Params:
        """The pre-trained parameters plus the adapters."""
        weights: Any = dict(traverse_util.flatten_dict(self.pretrained))
        factors: Any = traverse_util.flatten_dict(params)
        for path in self._matrices:
            product = factors[*path, "a"] @ factors[*path, "b"]
            weights[path] = weights[path] + self.alpha / self.rank * product.reshape(weights[path].shape)
        return traverse_util.unflatten_dict(weights)

    @functools.cached_property
    def _matrices(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """The path of each dense kernel, and its shape as a matrix or as a stack of matrices."""
        leaves = jax.tree_util.tree_leaves_with_path(self.pretrained)
        roles, biases = jax.tree.leaves(default_roles(self.pretrained)), bias_shapes(self.pretrained)
        matrices: dict[tuple[str, ...], tuple[int, ...]] = {}
        for (path, leaf), role, bias in zip(leaves, roles, biases, strict=True):
            axes = matrix_axes(role, leaf.shape, bias)
            if role == "dense" and axes is not None:
                start, stop = axes
                sizes = math.prod(leaf.shape[start:stop]), math.prod(leaf.shape[stop:])
                matrices[tuple(key.key for key in path)] = (*leaf.shape[:start], *sizes)
        return matrices


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def shakespeare_half(half: Literal["first", "second"], text: TextDataset) -> LanguageModel:
    """The task `shakespeare-transformer` on one half of its training text.

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
