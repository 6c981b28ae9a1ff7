"""A linear extrapolation with coefficients from pooled histories: of a weight's row, column and tensor."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import following, wide_dtype
from wnn_jax._window import LeafHistory
from wnn_jax.nowcasters._leaves import CONTEXT, finite_or_last
from wnn_jax.nowcasters._multi_horizon import Dense, HorizonNetwork, MultiHorizonNowcaster
from wnn_jax.nowcasters._scale import units_of

_NUM_CHANGES = CONTEXT - 1
_LAGS = range(1, _NUM_CHANGES)
# The changes, or pairs of changes, whose products are averaged: every change, every square, and products at every lag.
_MOMENTS: list[list[tuple[int, int | None]]] = [
    *([(index, None)] for index in range(_NUM_CHANGES)),
    *([(index, index)] for index in range(_NUM_CHANGES)),
    *([(index, index + lag) for index in range(_NUM_CHANGES - lag)] for lag in _LAGS),
]
_SQUARES = slice(_NUM_CHANGES, 2 * _NUM_CHANGES)
_NUM_FEATURES = _NUM_CHANGES + 2 * len(_LAGS) + 3


class Pools(NamedTuple):
    """Numbers of rows `[..., rows, 1, features]`, columns `[..., 1, columns, features]`, and the whole of a tensor."""

    row: Any
    column: Any
    tensor: Any


class PoolNetwork(HorizonNetwork):
    """Choose coefficients for one kind of pool, given the features of the pools and of their tensor."""

    outputs_per_horizon = (_NUM_CHANGES,)

    def expand(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """See `HorizonNetwork.expand`."""
        pool, tensor = inputs
        # Two layers, because concatenating the inputs could move what is sharded.
        return Dense(self.width, name="expand")(pool) + Dense(self.width, use_bias=False, name="tensor")(tensor)


class PooledNetwork(HorizonNetwork):
    """Choose coefficients for every row, every column and the tensor, with a network for each kind."""

    example = Pools(*[np.zeros([1, _NUM_FEATURES], np.float32)] * 3)

    @nn.compact
    def __call__(self, inputs: Pools, role: jax.Array, horizon: Any = None) -> Pools:
        """Map the features of the pools to their coefficients; see `HorizonNetwork`."""
        sizes = self.width, self.num_hidden, self.num_horizons
        pools = inputs._asdict().items()
        return Pools(*(PoolNetwork(*sizes, name=name)((pool, inputs.tensor), role, horizon) for name, pool in pools))

    @classmethod
    def of(cls, params: Any) -> Self:
        """See `HorizonNetwork.of`."""
        network = PoolNetwork.of(params["tensor"])
        return cls(network.width, network.num_hidden, network.num_horizons)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PooledLinear(MultiHorizonNowcaster):
    r"""A linear extrapolation with coefficients for each row, each column and each tensor.

    Let :math:`c_1, \dots, c_4` be the changes of a weight from each of its last 5 snapshots to the next. The forecast
    `k` snapshots ahead of the weight in row `i` and column `j` is its last value plus
    :math:`\sum_t (u_{i,k,t} + v_{j,k,t} + s_{k,t}) c_t`. Three small networks choose these coefficients: one for rows,
    one for columns and one for tensors. Each is given the role and statistics of the pool's changes:

    - how large they are relative to those of its tensor, and whether they grow or fade;
    - the correlations of changes that are 1, 2 or 3 snapshots apart;
    - how much of its changes a pool has in common, and how many weights it has.

    The four changes of a single weight are mostly noise. Over a row or a column the noise averages out, and rows and
    columns still tell one neuron from another. Columns are the outputs of a matrix, its last axis. Rows are its inputs,
    the axis before, pooled over the window of a convolution. A vector is a single row of columns.

    The temporary memory is at most the size of the largest leaf, or of its history if several leaves have one shape.
    Devices exchange only sums of rows and columns. Over automatic mesh axes this needs leaves of one shape to be
    sharded alike if their names differ in numbers only.

    Attributes:
      params: the parameters of its networks.
      default_horizon: how many snapshots ahead it forecasts if `horizon` is `None`.
      record: how the networks were trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of other networks, or `default_horizon` is not one that they forecast.
    """

    network_class: ClassVar[type[HorizonNetwork]] = PooledNetwork
    # Leaves that are forecast by one program must be sharded alike. Over automatic mesh axes no type says how.
    by_name = True

    def forecast_leaves(self, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
        """See `MultiHorizonNowcaster.forecast_leaves`."""
        params = jax.tree.map(jnp.asarray, dict(self.params))
        forecasts = [history[-1] for history in leaves]
        groups: dict[Any, list[int]] = {}
        for index, last in enumerate(forecasts):
            if last.size:
                groups.setdefault(jax.typeof(last), []).append(index)
        for indices in groups.values():
            group = _forecast(params, [leaves[index] for index in indices], role, horizon)
            for index, forecast in zip(indices, group, strict=True):
                forecasts[index] = forecast
        return forecasts

    @classmethod
    def statistics(cls, history: Sequence[Any]) -> Pools:
        """Return the features of the pools of a tensor; see `MultiHorizonNowcaster.statistics`."""
        return _features(history)

    @classmethod
    def statistics_of(cls, history: Sequence[Any], chosen: Any) -> Pools:
        """See `MultiHorizonNowcaster.statistics_of`; arrays `[n, features]`."""
        shape = history[0].shape or (1,)
        pools = cls.statistics([snapshot.reshape(shape) for snapshot in history])
        spread = (np.broadcast_to(pool, (*shape, _NUM_FEATURES)) for pool in pools)
        return Pools(*(pool[np.unravel_index(chosen, shape)] for pool in spread))

    def changes(self, history: tuple[jax.Array, ...], statistics: Pools, role: jax.Array, horizon: Any = None) -> Any:
        """Forecast how far weights will have moved, of any shape; see `MultiHorizonNowcaster.changes`."""
        coefficients = self.network.apply({"params": self.params}, statistics, role, horizon)
        assert isinstance(coefficients, Pools)
        if horizon is None:  # Coefficients have an axis for horizons.
            history = tuple(snapshot[..., None] for snapshot in history)
        return _combine(history, coefficients)


# A function that is compiled on its own is traced once for all leaves, or groups of leaves, of one type.
@jax.jit
def _forecast(params: Any, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
    """Forecast leaves of one shape that are not empty."""
    network = PooledNetwork.of(params)
    # The features are computed leaf by leaf, and the coefficients for all leaves at once: both are compiled once.
    if len(leaves) == 1:
        features = jax.tree.map(lambda array: array[None], _features(leaves[0]))
    else:  # Copies each leaf.
        branches = [functools.partial(tuple, leaf) for leaf in leaves]
        features = jax.lax.map(lambda index: _features(jax.lax.switch(index, branches)), jnp.arange(len(leaves)))
    coefficients = jax.vmap(lambda pools: network.apply({"params": params}, pools, role, horizon))(features)
    return [
        _extrapolate(history, jax.tree.map(lambda numbers, index=index: numbers[index], coefficients))
        for index, history in enumerate(leaves)
    ]


@jax.jit
def _extrapolate(history: LeafHistory, coefficients: Any) -> jax.Array:
    """Forecast a leaf."""
    wide = tuple(snapshot.astype(wide_dtype(snapshot)) for snapshot in history)
    return finite_or_last(wide[-1] + _combine(wide, coefficients), history)


def _combine(history: tuple[jax.Array, ...], coefficients: Pools) -> Any:
    """Return the changes of weights, each times the sum of its coefficients."""
    # One term after the other, so that XLA makes one pass over the history and copies nothing.
    terms = []
    for index, (earlier, later) in enumerate(itertools.pairwise(history)):
        row, column, tensor = (numbers[..., index] for numbers in coefficients)
        terms.append((row + column + tensor) * (later - earlier))
    return sum(terms)


def _features(history: Sequence[Any]) -> Pools:
    """Return the features of the pools of a tensor that is not empty.

    Values and changes are in units that are powers of two, so that squares neither overflow nor vanish. Some devices
    store the inputs of a reduction. Reductions that wait for each other can use the same memory.
    """
    xp, dtype, shape = _namespace(history[0]), wide_dtype(history[0]), history[0].shape
    added = (1,) * (2 - len(shape))  # Axes in front of those of a vector or a scalar.
    history = [snapshot.reshape(added + shape) for snapshot in history]
    *others, rows, columns = range(history[0].ndim)

    def inverse_unit(arrays: Sequence[Any]) -> Any:
        # To multiply is exact, and XLA repeats a multiplication where it would store the result of a division.
        largest = functools.reduce(xp.maximum, map(abs, arrays))
        return 1 / units_of(largest.max(axis=None, keepdims=True).astype(dtype))

    def scale_after(known: Any) -> Any:
        return value_scale if xp is np else following(abs(known), value_scale, history[0])

    def scaled(scale: Any) -> list[Any]:
        return [snapshot.astype(dtype) * scale for snapshot in history]

    def mean(terms: Sequence[Any]) -> Any:
        return functools.reduce(operator.add, terms).mean(axis=None, keepdims=True) / len(terms)

    value_scale = inverse_unit(history)
    changes = [later - earlier for earlier, later in itertools.pairwise(scaled(value_scale))]
    change_scale = inverse_unit(changes)
    changes = [change * change_scale for change in changes]
    center = mean(scaled(scale_after(change_scale)))
    square = mean([(value - center) ** 2 for value in scaled(scale_after(center))])
    std = (square / (1 - 1 / (len(history) * history[0].size))) ** 0.5 * change_scale

    means, known = [], value_scale
    for pairs in _MOMENTS:
        scale = scale_after(known)
        if scale is not value_scale:
            changes = [(later - earlier) * change_scale for earlier, later in itertools.pairwise(scaled(scale))]
        terms = [changes[first] if second is None else changes[first] * changes[second] for first, second in pairs]
        values = functools.reduce(operator.add, terms) / len(terms)
        row = values.mean(axis=(*others, columns), keepdims=True)
        column = values.mean(axis=(*others, rows), keepdims=True)
        known = row.mean(axis=rows, keepdims=True)
        means.append((row, column, known))
    row, column, tensor = (xp.stack(pool, axis=-1) for pool in zip(*means, strict=True))
    size, rms = history[0].size, _rms(tensor)
    pools = (
        _pool_features(row, size // row.shape[rows], rms),
        _pool_features(column, size // column.shape[columns], rms),
        _pool_features(tensor, size, std[..., None]),
    )
    return Pools(*(pool[(0,) * len(added)].astype(np.float32) for pool in pools))


def _pool_features(means: Any, count: int, reference: Any) -> Any:
    """Return the features of pools of `count` weights; `reference` is a size to compare the size of changes with."""
    xp, rms = _namespace(means), _rms(means)

    def ratio(value: Any, size: Any) -> Any:
        return value / xp.where(size == 0, 1, size)

    def log_ratio(value: Any, size: Any) -> Any:
        return xp.log(xp.clip(ratio(value, size), 1e-4, 1e4)) / 2  # From -4.6 to 4.6.

    common = ratio(means[..., :_NUM_CHANGES], rms)
    features = [
        log_ratio(rms, reference),
        log_ratio(means[..., _SQUARES] ** 0.5, rms),
        ratio(means[..., _SQUARES.stop :], rms**2),
        (common**2).mean(axis=-1, keepdims=True) ** 0.5,
        *((common[..., lag:] * common[..., :-lag]).mean(axis=-1, keepdims=True) for lag in _LAGS),
        xp.full_like(rms, math.log(count) / 8),
    ]
    return xp.concatenate(features, axis=-1)


def _rms(means: Any) -> Any:
    """Return the root mean square of all changes of pools, `[..., 1]`, from their moments."""
    return means[..., _SQUARES].mean(axis=-1, keepdims=True) ** 0.5


def _namespace(array: Any) -> Any:
    """Return NumPy for an array of NumPy, and else JAX."""
    return np if isinstance(array, np.ndarray) else jnp
