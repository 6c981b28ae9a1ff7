"""A drift of which a small network chooses, tensor by tensor, how far it goes and with how much memory."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_choice
from wnn_jax._nowcaster import Motion
from wnn_jax._roles import ROLES
from wnn_jax.nowcasters._spectral import orthogonalize
from wnn_jax.nowcasters.drift import Drift

# The memories of the running means, beside that of the rule: 0.1, 0.03 and 0.3 of the steps if that is 0.1.
_MEMORIES = (1.0, 0.3, 3.0)
_MEANS = ("shorter", "longer")
_MAX_LOG_FACTOR = 1.5
_MAX_SHARE = 1.5
_TINY = 1e-30

_Dense = functools.partial(nn.Dense, use_bias=False, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LearnedDrift:
    r"""The drift of a rule, changed for every tensor by what a network makes of the tensor's statistics.

    Let :math:`m_0` be the running mean that the rule goes by, :math:`m_1` one with a shorter memory and :math:`m_2` one
    with a longer, and :math:`O` the orthogonalisation of matrices that keeps their Frobenius norm (of other tensors
    the identity). A tensor moves by

    .. math::
      g f \, (s \, O(m) + (1 - s) \, m), \qquad m = m_0 + \textstyle\sum_i c_i (m_i - m_0)

    with the rule's gain :math:`g`. The network chooses the factor :math:`f`, between 0.22 and 4.5, the orthogonalised
    share :math:`s`, from 0 to 1.5, and the coefficients :math:`c_i`, between -1 and 1. It begins with
    :math:`f = 1`, :math:`c_i = 0` and the :math:`s` of the rule: as the rule exactly.

    It costs some ten sums over each tensor at a visit; what it is given are ratios, so that it does not depend on the
    scale of the weights. Nothing else is communicated where tensors are sharded.

    Attributes:
      params: the parameters of its network.
      rule: settings of the `Drift` that it began as; those that are not given are the present ones of `Drift`.
      num_means: 2, for the rule's memory and the shorter one, or 3. Each of them is a copy of the parameters.
      record: how the network was trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of another network, or a setting cannot be used.
    """

    params: Mapping[str, Any]
    rule: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    num_means: int = 3
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    roles: ClassVar[tuple[str, ...]] = ROLES

    def __post_init__(self) -> None:
        check_choice("num_means", self.num_means, (2, 3), "how many running means there are")
        object.__setattr__(self, "rule", dataclasses.asdict(Drift(**self.rule)))
        try:
            expected = jax.tree.map(jnp.shape, _init_shapes(self._network))
        except (KeyError, TypeError, ValueError, IndexError):
            expected = None
        if expected is None or jax.tree.map(jnp.shape, dict(self.params)) != expected:
            raise ValueError(
                f"params are not the parameters of a DriftNetwork for num_means={self.num_means}: they have the shapes "
                f"{jax.tree.map(jnp.shape, self.params)} where {expected or 'others'} are expected."
            )

    def __repr__(self) -> str:
        num_weights = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"LearnedDrift({num_weights:,} weights, num_means={self.num_means})"

    @classmethod
    def init(cls, key: jax.Array, *, width: int = 8, num_means: int = 3, **rule: Any) -> Self:
        """One that moves as the rule does, to be trained.

        Args:
          key: a `jax.random` key.
          width: features of the network's hidden layer.
          num_means: how many running means there are.
          **rule: settings of the rule.
        """
        check_choice("num_means", num_means, (2, 3), "how many running means there are")
        return cls(_init(_network(width, num_means), key), rule, num_means)

    @property
    def snapshot_every(self) -> int:
        """Steps between visits, where the user gives none: those of the rule."""
        return self._rule.snapshot_every

    @property
    def features(self) -> tuple[str, ...]:
        """What the network is told of each tensor, in the order of its inputs."""
        return _feature_names(self.num_means)

    def memories(self, step: Any, snapshot_every: Any) -> Sequence[Any]:
        """See `DriftNowcaster.memories`."""
        rules = [
            dataclasses.replace(self._rule, memory=share * self._rule.memory) for share in _MEMORIES[: self.num_means]
        ]
        return [memory for rule in rules for memory in rule.memories(step, snapshot_every)]

    def __call__(self, motion: Motion, roles: Any) -> Any:
        """See `DriftNowcaster.__call__`."""
        mean = motion.means[0]
        if not jax.tree.leaves(mean):
            return mean
        outputs = self.network_outputs(motion, roles)
        factors = jnp.exp(_MAX_LOG_FACTOR * jnp.tanh(outputs[:, 0]))
        shares = jnp.clip(float(self._rule.spectral) + outputs[:, 1], 0.0, _MAX_SHARE)
        coefficients = jnp.tanh(outputs[:, 2:])

        def per_tensor(values: jax.Array) -> Any:
            return jax.tree.unflatten(jax.tree.structure(mean), list(values))

        def mix(coefficients: jax.Array, first: jax.Array, *others: jax.Array) -> jax.Array:
            return first + sum(coefficients[i] * (other - first) for i, other in enumerate(others))

        def blend(factor: Any, share: Any, mixed: jax.Array, orthogonal: jax.Array) -> jax.Array:
            return factor * (share * orthogonal + (1 - share) * mixed)

        mixed = jax.tree.map(mix, per_tensor(coefficients), *motion.means)

        orthogonal = orthogonalize(mixed, roles, max_rows=self._rule.max_rows)
        direction = jax.tree.map(blend, per_tensor(factors), per_tensor(shares), mixed, orthogonal)
        gain = self._rule.gain_of(motion)
        return jax.tree.map(lambda leaf: gain.astype(leaf.dtype) * leaf, direction)

    def network_outputs(self, motion: Motion, roles: Any) -> jax.Array:
        """What the network chooses, before it is bounded: `[tensors, 1 + num_means]`."""
        outputs = self._network.apply({"params": self.params}, self.inputs(motion, roles))
        assert isinstance(outputs, jax.Array)
        return outputs

    def inputs(self, motion: Motion, roles: Any) -> jax.Array:
        """What the network is told: `[tensors, features]`, of the order of 1."""
        trees = map(jax.tree.leaves, (motion.params, motion.displacement, *motion.means))
        params, displacements, *means = map(list, zip(*map(_in_one_unit, *trees), strict=True))
        mean, *others = means
        # All sums first, so that what follows is a few operations for all tensors together.
        squares, of_params, of_displacements = (_dots(leaves, leaves) for leaves in (mean, params, displacements))
        has_length = motion.num_steps is not None
        memory = self.memories(motion.step, motion.snapshot_every)[0]
        columns = [param.shape[-1] if param.ndim else 1 for param in params]
        rows = [param.size / max(number, 1) for param, number in zip(params, columns, strict=True)]
        values: dict[str, Any] = {
            **{name: [float(role == name) for role in jax.tree.leaves(roles)] for name in ROLES},
            "log step": (jnp.log1p(jnp.asarray(motion.step, jnp.float32)) - 6) / 3,
            "has length": float(has_length),
            "progress": motion.step / motion.num_steps if has_length else 0.0,
            "rank": [min(param.ndim, 4) - 2 for param in params],
            "log rows": np.log(np.maximum(rows, 1)) / 2 - 2,
            "log columns": np.log(np.maximum(columns, 1)) / 2 - 2,
            "alignment": _cosine(_dots(displacements, mean), of_displacements, squares),
            # About -0.35 where the displacements are noise, whatever the memory.
            "signal": _log_ratio(squares, of_displacements)
            + jnp.log(jnp.asarray(memory / motion.snapshot_every, jnp.float32)) / 2,
            "speed": (_log_ratio(squares, of_params) + 6) / 3,
        }
        for name, other in zip(_MEANS, others, strict=False):
            of_other = _dots(other, other)
            values[f"alignment with {name}"] = _cosine(_dots(other, mean), of_other, squares)
            values[f"{name} beside mean"] = _log_ratio(of_other, squares)
        shape = (len(params),)
        inputs = [jnp.broadcast_to(jnp.asarray(values[name], jnp.float32), shape) for name in self.features]
        return jnp.stack(inputs, axis=1)

    @property
    def _rule(self) -> Drift:
        return Drift(**self.rule)

    @property
    def _network(self) -> "DriftNetwork":
        return _network(jnp.shape(self.params["hidden"]["kernel"])[1], self.num_means)


class DriftNetwork(nn.Module):
    """A linear layer, and beside it one with a hidden layer; both begin as zero.

    Attributes:
      width: features of the hidden layer.
      num_outputs: how much it chooses.
    """

    width: int
    num_outputs: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps inputs `[tensors, features]` to `[tensors, num_outputs]`."""
        hidden = nn.tanh(_Dense(self.width, name="hidden")(inputs))
        zeros = nn.initializers.zeros
        linear = _Dense(self.num_outputs, kernel_init=zeros, name="linear")(inputs)
        return linear + _Dense(self.num_outputs, kernel_init=zeros, name="output")(hidden)


def _feature_names(num_means: int) -> tuple[str, ...]:
    of_means = [text for name in _MEANS[: num_means - 1] for text in (f"alignment with {name}", f"{name} beside mean")]
    of_tensor = ("rank", "log rows", "log columns", "alignment", "signal", "speed")
    return (*ROLES, "log step", "has length", "progress", *of_tensor, *of_means)


def _network(width: int, num_means: int) -> DriftNetwork:
    return DriftNetwork(width, 1 + num_means)


def _init(network: DriftNetwork, key: jax.Array) -> Any:
    return network.init(key, jnp.zeros([1, len(_feature_names(network.num_outputs - 1))]))["params"]


def _init_shapes(network: DriftNetwork) -> Any:
    return jax.eval_shape(lambda key: _init(network, key), jax.random.key(0))


def _in_one_unit(*tensors: jax.Array) -> list[jax.Array]:
    """Tensors in a unit of their own, so that no square overflows or vanishes: ratios are as before."""
    limits = jnp.finfo(jnp.float32)
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(tensor), initial=0) for tensor in tensors])
    unit = jnp.clip(largest.astype(jnp.float32), limits.smallest_normal, limits.max / 8)
    return [tensor.astype(jnp.float32) / unit for tensor in tensors]


def _dots(ones: Sequence[jax.Array], others: Sequence[jax.Array]) -> jax.Array:
    # Sums of products, not `vdot`: flattening a sharded array could move it.
    pairs = zip(ones, others, strict=True)
    return jnp.stack([jnp.sum(one.astype(jnp.float32) * other.astype(jnp.float32)) for one, other in pairs])


def _cosine(product: jax.Array, square: jax.Array, other_square: jax.Array) -> jax.Array:
    return product / (jnp.sqrt(square * other_square) + _TINY)


def _log_ratio(square: jax.Array, other_square: jax.Array) -> jax.Array:
    """The logarithm of a ratio of norms, from their squares."""
    return jnp.clip(0.5 * jnp.log((square + _TINY) / (other_square + _TINY)), -12.0, 12.0)
