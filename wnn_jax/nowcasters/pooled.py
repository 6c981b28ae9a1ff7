"""A linear extrapolation whose coefficients follow from pooled histories: of a weight's row, column and tensor."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._trees import following, wide_dtype
from wnn_jax._window import LeafHistory
from wnn_jax.nowcasters._leaves import finite_or_last
from wnn_jax.nowcasters._moments import log_ratio, namespace, ratio, units_of
from wnn_jax.nowcasters._multi_horizon import CONTEXT, Dense, HorizonNetwork, MultiHorizonNowcaster

_NUM_CHANGES = CONTEXT - 1
_NUM_LAGS = _NUM_CHANGES - 1
_NUM_FEATURES = _NUM_CHANGES + 2 * _NUM_LAGS + 3


class Pools(NamedTuple):
    """What is known of the rows, the columns and the whole of a tensor: arrays that broadcast with it.

    Attributes:
      row: `[1, ..., rows, 1, features]` for a tensor `[..., rows, columns]`. A vector is a single row.
      column: `[1, ..., 1, columns, features]`.
      tensor: `[1, ..., 1, 1, features]`.
    """

    row: Any
    column: Any
    tensor: Any


class PoolNetwork(HorizonNetwork):
    """Chooses the coefficients of changes for pools of one kind, given what is known of them and of their tensor."""

    outputs_per_horizon = (_NUM_CHANGES,)

    def expand(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """See `HorizonNetwork.expand`."""
        pool, tensor = inputs
        # Not one layer for both together: to put them together could move what is sharded.
        return Dense(self.width, name="expand")(pool) + Dense(self.width, use_bias=False, name="tensor")(tensor)


class PooledNetwork(HorizonNetwork):
    """Chooses the coefficients of changes for every row, every column and the tensor, by a network for each kind."""

    @nn.compact
    def __call__(self, inputs: Pools, role: jax.Array, horizon: Any = None) -> Pools:
        """Maps what is known of the pools to the coefficients that they add up to; see `HorizonNetwork`."""
        return Pools(
            *(
                PoolNetwork(self.width, self.num_hidden, self.num_horizons, name=name)(
                    (pool, inputs.tensor), role, horizon
                )
                for name, pool in inputs._asdict().items()
            )
        )

    def example(self) -> Pools:
        """See `HorizonNetwork.example`."""
        return Pools(*[jnp.zeros([1, _NUM_FEATURES])] * len(Pools._fields))

    @classmethod
    def of(cls, params: Any) -> Self:
        """See `HorizonNetwork.of`."""
        network = PoolNetwork.of(params["tensor"])
        return cls(network.width, network.num_hidden, network.num_horizons)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pooled(MultiHorizonNowcaster):
    r"""A linear extrapolation whose coefficients depend on the weight's row, its column and its tensor.

    Let :math:`c_1, \dots, c_4` be the changes of a weight from each of its last 5 snapshots to the next. The forecast
    `k` snapshots ahead of the weight in row `i` and column `j` is its last value plus
    :math:`\sum_t (u_{i,k,t} + v_{j,k,t} + s_{k,t}) c_t`. Three small networks choose these coefficients, one for rows,
    one for columns and one for tensors, from the pooled history of each: how large its changes are beside those of its
    tensor, whether they grow or fade, the correlations of changes that are 1, 2 or 3 snapshots apart, how much of them
    the pool has in common, and how large it is; and from the role.

    The four changes of a single weight are mostly noise, which averages out over a row or a column, and these still
    tell one neuron from another. Columns are the outputs of a matrix, the last axis; rows are its inputs, the axis
    before, pooled over the window of a convolution. A vector is a single row, and each of its weights a column of its
    own.

    The networks work on rows and columns; a weight takes some fifty multiply-adds, most of them for the sums. The
    temporary memory is at most that of the largest leaf, and of its history where there are several of one shape. Where
    leaves are sharded, sums of rows and columns are all that devices exchange; over automatic mesh axes leaves of one
    shape whose names differ in numbers only are to be sharded alike for that. A pool ends with its leaf: that the
    columns of one are the rows of the next is not to be read from names and shapes alone, where flattened convolutions,
    heads and residual sums come between.

    Nothing that the networks are given depends on the scale of the weights or of their changes; a weight that did not
    move stays; and far from anything that was trained on the forecast is still a combination of recent changes.

    Attributes:
      params: the parameters of its networks.
      default_horizon: how many snapshots ahead it forecasts where `horizon` is `None`.
      record: how the networks were trained; kept by `wnn_jax.save`.

    Raises:
      ValueError: if `params` are of other networks, or `default_horizon` is not one that they forecast.
    """

    network_class: ClassVar[type[HorizonNetwork]] = PooledNetwork
    # What is compiled once is given leaves that are sharded in one way, which over automatic mesh axes no type tells.
    by_name = True

    def forecast_leaves(self, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any) -> list[jax.Array]:
        """See `MultiHorizonNowcaster.forecast_leaves`."""
        params = jax.tree.map(jnp.asarray, dict(self.params))
        alike: dict[Any, list[int]] = {}
        for index, history in enumerate(leaves):
            if history[-1].size:
                alike.setdefault(jax.typeof(history[-1]), []).append(index)
        forecasts = [history[-1] for history in leaves]
        for indices in alike.values():
            made = _forecast(type(self), params, [leaves[index] for index in indices], role, horizon)
            for index, forecast in zip(indices, made, strict=True):
                forecasts[index] = forecast
        return forecasts

    @classmethod
    def statistics(cls, history: Sequence[Any]) -> Pools:
        """What the networks are told of the pools of a tensor; see `MultiHorizonNowcaster.statistics`."""
        return _pools(_sums(history), history[0].shape)

    @classmethod
    def statistics_of(cls, history: Sequence[Any], chosen: Any) -> Pools:
        """See `MultiHorizonNowcaster.statistics_of`; arrays `[n, features]`."""
        history = [snapshot.reshape(snapshot.shape or (1,)) for snapshot in history]
        places = np.unravel_index(chosen, history[0].shape)

        def of_weights(pool: Any) -> Any:
            # Axes of one element are those that were pooled.
            sizes = zip(places, pool.shape[:-1], strict=True)
            return pool[tuple(place if size > 1 else np.zeros_like(place) for place, size in sizes)]

        return Pools(*map(of_weights, cls.statistics(history)))

    def changes(self, history: tuple[jax.Array, ...], statistics: Pools, role: jax.Array, horizon: Any = None) -> Any:
        """Forecasts how far weights will have moved, of any shape; see `MultiHorizonNowcaster.changes`."""
        coefficients = self.network.apply({"params": self.params}, statistics, role, horizon)
        assert isinstance(coefficients, Pools)
        if horizon is None:  # Coefficients have an axis for horizons.
            history = tuple(snapshot[..., None] for snapshot in history)
        return _changes(history, coefficients)


# What is compiled on its own is traced once for all leaves, or all groups of leaves, that are alike.
@functools.partial(jax.jit, static_argnames="cls")
def _forecast(
    cls: type[Pooled], params: Any, leaves: Sequence[LeafHistory], role: jax.Array, horizon: Any
) -> list[jax.Array]:
    """Forecasts leaves of one shape that are not empty."""
    network, shape = cls(params).network, leaves[0][0].shape

    def coefficients_of(sums: _Sums) -> Any:
        return network.apply({"params": params}, _pools(sums, shape), role, horizon)

    # Sums are made of one leaf after the other, and what is done with pools for all at once: both are compiled once.
    coefficients = jax.vmap(coefficients_of)(_sums_of_all(leaves))
    return [
        _go_on(history, jax.tree.map(lambda of_leaves, index=index: of_leaves[index], coefficients))
        for index, history in enumerate(leaves)
    ]


@jax.jit
def _go_on(history: LeafHistory, coefficients: Pools) -> jax.Array:
    """The forecast of a leaf, given the coefficients of its changes."""
    wide = tuple(snapshot.astype(wide_dtype(snapshot)) for snapshot in history)
    return finite_or_last(wide[-1] + _changes(wide, coefficients), history)


def _changes(history: tuple[jax.Array, ...], coefficients: Pools) -> Any:
    """How far weights will have moved, given the coefficients of their changes."""
    # One after the other, and so in one pass over the history, of which nothing is copied.
    terms = []
    for index, (earlier, later) in enumerate(itertools.pairwise(history)):
        row, column, tensor = (of_pool[..., index] for of_pool in coefficients)
        terms.append((row + column + tensor) * (later - earlier))
    return sum(terms)


class _Sums(NamedTuple):
    """What is summed over a tensor `[..., rows, columns]`; a vector or a scalar has axes of one element in front.

    Attributes:
      means: the means over pools, as `_means` makes them.
      std: the standard deviation of all values, in the unit of the changes.
    """

    means: Pools
    std: Any


def _sums(history: Sequence[Any]) -> _Sums:
    """The sums of a tensor that is not empty."""
    history = [snapshot.reshape((1,) * (2 - snapshot.ndim) + snapshot.shape) for snapshot in history]
    scales, std = _scales(history)
    return _Sums(Pools(*zip(*_means(history, scales), strict=True)), std * scales.change)


def _sums_of_all(leaves: Sequence[LeafHistory]) -> _Sums:
    """The sums of leaves of one shape, with a leading axis. If there are several, each is copied for it."""
    if len(leaves) == 1:
        return jax.tree.map(lambda of_leaf: of_leaf[None], _sums(leaves[0]))
    branches = [functools.partial(tuple, leaf) for leaf in leaves]
    return jax.lax.map(lambda index: _sums(jax.lax.switch(index, branches)), jnp.arange(len(leaves)))


def _pools(sums: _Sums, shape: tuple[int, ...]) -> Pools:
    """What the networks are told of the pools of a tensor of this shape."""
    means, added = sums.means, 2 - len(shape)
    rows, columns = ((1,) * added + shape)[-2:]
    size = math.prod(shape)
    rms = _rms(means.tensor)
    pools = (
        _features(means.row, size // rows, rms),
        _features(means.column, size // columns, rms),
        _features(means.tensor, size, sums.std),
    )
    # What was put in front of the axes of a vector or a scalar is taken away again.
    return Pools(*(pool[(0,) * added].astype(np.float32) for pool in pools))


class _Scales(NamedTuple):
    """The inverses of units, powers of two: `value` for values, and `change` for changes of values in such units.

    In units of the size of the largest, so that no square overflows, and none that counts vanishes. To multiply by the
    inverse is exact, and a compiler repeats it rather than keep the result, as it does with that of a division.
    """

    value: Any
    change: Any

    def following(self, known: Any, leaf: Any) -> Self:
        """The same, and not before something is known: see `wnn_jax._trees.following`."""
        if namespace([leaf]) is np:
            return self
        return self._replace(value=following(abs(known), self.value, leaf))

    def changes(self, history: Sequence[Any]) -> list[Any]:
        """The changes of a tensor, in their unit."""
        values = [snapshot.astype(self.value.dtype) * self.value for snapshot in history]
        return [(later - earlier) * self.change for earlier, later in itertools.pairwise(values)]


def _scales(history: Sequence[Any]) -> tuple[_Scales, Any]:
    """The scales of a tensor, and the standard deviation of its values in their unit."""
    xp = namespace(history)

    def inverse_unit(arrays: Sequence[Any]) -> Any:
        largest = functools.reduce(xp.maximum, map(abs, arrays))
        return 1 / units_of(largest.max(axis=None, keepdims=True))

    inverse = inverse_unit(history)
    scales = _Scales(inverse, xp.ones_like(inverse))
    scales = scales._replace(change=inverse_unit(scales.changes(history)))

    def mean(scale: Any, function: Callable[[Any], Any]) -> Any:
        terms = [function(snapshot.astype(scale.dtype) * scale) for snapshot in history]
        return functools.reduce(operator.add, terms).mean(axis=None, keepdims=True) / len(terms)

    center = mean(scales.following(scales.change, history[0]).value, lambda value: value)
    square = mean(scales.following(center, history[0]).value, lambda value: (value - center) ** 2)
    # Unbiased.
    return scales, (square / (1 - 1 / (len(history) * history[0].size))) ** 0.5


def _means(history: Sequence[Any], scales: _Scales) -> Iterator[Pools]:
    """The means over pools: of every change, of every square, and of the products at every lag.

    What reductions read is written first on some devices, and so they are made one after the other.
    """
    *others, rows, columns = range(history[0].ndim)
    changes, known = scales.changes(history), scales.value

    def lagged(lag: int) -> Any:
        products = [one * other for one, other in zip(changes, changes[lag:], strict=False)]
        return functools.reduce(operator.add, products) / len(products)

    terms: list[Callable[[], Any]] = [
        *(lambda index=index: changes[index] for index in range(_NUM_CHANGES)),
        *(lambda index=index: changes[index] ** 2 for index in range(_NUM_CHANGES)),
        *(functools.partial(lagged, lag) for lag in range(1, _NUM_LAGS + 1)),
    ]
    for term in terms:
        after = scales.following(known, history[0])
        if after.value is not scales.value:
            changes = after.changes(history)
        values = term()
        row = values.mean(axis=(*others, columns), keepdims=True)
        column = values.mean(axis=(*others, rows), keepdims=True)
        known = row.mean(axis=rows, keepdims=True)
        yield Pools(row, column, known)


def _features(means: Sequence[Any], count: int, reference: Any) -> Any:
    """What the networks are told of pools: `[..., features]`, of the order of 1.

    Args:
      means: over each pool, as `_means` makes them.
      count: weights in a pool.
      reference: what the size of changes is compared with.
    """
    xp = namespace(means)
    # Together, since every operation of its own takes time to compile, for every leaf.
    changes, squares, lagged = (
        xp.stack(of, axis=-1)
        for of in (means[:_NUM_CHANGES], means[_NUM_CHANGES : 2 * _NUM_CHANGES], means[2 * _NUM_CHANGES :])
    )
    rms = _rms(means)[..., None]
    in_common = ratio(changes, rms)
    lagged_in_common = [
        (in_common[..., lag:] * in_common[..., :-lag]).mean(axis=-1, keepdims=True) for lag in range(1, _NUM_LAGS + 1)
    ]
    features = [
        log_ratio(rms, reference[..., None]),
        log_ratio(squares**0.5, rms),
        ratio(lagged, rms**2),
        (in_common**2).mean(axis=-1, keepdims=True) ** 0.5,
        *lagged_in_common,
        xp.full_like(rms, math.log(count) / 8),
    ]
    return xp.concatenate(features, axis=-1)


def _rms(means: Sequence[Any]) -> Any:
    """The root mean square of all changes of pools, from what `_means` makes of them."""
    return (sum(means[_NUM_CHANGES : 2 * _NUM_CHANGES]) / _NUM_CHANGES) ** 0.5
