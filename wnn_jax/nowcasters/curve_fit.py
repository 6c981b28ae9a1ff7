"""Least-squares curve fits of every weight's history."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from wnn_jax._checks import check_choice, check_int
from wnn_jax._roles import ROLES
from wnn_jax._window import LeafHistory, clip_horizon, summarize_nowcaster
from wnn_jax.nowcasters._leaves import LeafMap, finite_or_last, map_by_role

Arrays = tuple[jax.Array, ...]

_CONTEXT = 5

# The usual factors of 10 both ways take twice the steps here: five points leave the two parameters of a sigmoid nearly
# interchangeable. The least damping keeps their 2x2 system solvable in float32.
_NUM_STEPS = 10
_START_DAMPING, _LEAST_DAMPING = 0.03, 1e-4
_RAISE_DAMPING, _LOWER_DAMPING = 8.0, 0.5

# Growth faster than this per snapshot cannot be told from an outlier at the end by five points, and would be forecast
# as hundreds of times the whole movement so far; decay faster than this is over after one snapshot.
_RATES = (-3.0, 1.0)
# No curve grows by more than this power of e from the last point to the horizon: what is far away is forecast from a
# slower one.
_MAX_GROWTH = 5.0


@dataclasses.dataclass(frozen=True, eq=False)
class _Curve:
    """A curve `scale * shape(t, *parameters) + offset`, for `t` in snapshots after the first one.

    Least squares knows `scale` and `offset` once it knows the parameters, so `shape` is free to leave out any factor
    and any term without `t`. The shapes below do so to be well conditioned, without poles or overflow, all over the
    intervals of their parameters; where a limit of the curve is the straight line, the interval contains it.

    Attributes:
      shape: an elementwise function of `t` and the nonlinear parameters, of which there are one or two.
      guesses: for each parameter the first guesses, increasing. The first and the last one bound it.
      clock: for a curve that grows without limit, in what its only parameter is a rate: a function of `t`.
    """

    shape: Callable[..., jax.Array]
    guesses: tuple[NDArray[np.float64], ...]
    clock: Callable[[jax.Array], jax.Array] | None = None

    def intervals(self, time: jax.Array) -> tuple[tuple[Any, Any], ...]:
        """What bounds each parameter in a forecast for a time."""
        intervals = [(float(guesses[0]), float(guesses[-1])) for guesses in self.guesses]
        if self.clock is None:
            return tuple(intervals)
        ((low, high),) = intervals
        ahead = self.clock(time) - self.clock(jnp.asarray(_CONTEXT - 1, time.dtype))
        return ((low, jnp.minimum(high, _MAX_GROWTH / jnp.maximum(ahead, 1))),)


def _exponential(t: jax.Array, rate: jax.Array) -> jax.Array:
    # (exp(rate * t) - 1) / rate, which is t at rate 0.
    exponent = rate * t
    is_small = jnp.abs(exponent) < 0.05
    safe = jnp.where(is_small, 1.0, exponent)
    series = 1 + exponent / 2 * (1 + exponent / 3 * (1 + exponent / 4 * (1 + exponent / 5)))
    return t * jnp.where(is_small, series, jnp.expm1(safe) / safe)


def _power(t: jax.Array, exponent: jax.Array) -> jax.Array:
    # (t + 1) ** exponent, which is log(t + 1) at exponent 0.
    return _exponential(jnp.log1p(t), exponent)


def _sigmoid(t: jax.Array, steepness: jax.Array, remaining: jax.Array) -> jax.Array:
    # sigmoid(steepness * (t - midpoint)), less its value at t = 2 and over a factor without t. In place of the
    # midpoint, which five points on one tail do not determine, stands the share of the rise that remains at t = 2.
    decay = jnp.expm1(steepness * (2 - t))
    return -decay / (1 + remaining * decay)


def _michaelis_menten(t: jax.Array, bend: jax.Array) -> jax.Array:
    # t / (b + t) with half-saturation time b = (1 - bend) / bend snapshots; a straight line at bend 0.
    return t / (1 - bend + bend * t)


def _x_exp_x(t: jax.Array, rate: jax.Array) -> jax.Array:
    return t * jnp.exp(rate * t)


_CURVES = {
    "exponential": _Curve(_exponential, (np.linspace(*_RATES, 33),), clock=lambda t: t),
    "power": _Curve(_power, (np.linspace(-4, 4, 33),), clock=jnp.log1p),
    "sigmoid": _Curve(_sigmoid, (np.geomspace(0.1, 4, 10), np.linspace(0.01, 0.99, 11))),
    "michaelis_menten": _Curve(_michaelis_menten, (np.linspace(0, 0.95, 33),)),
    "x_exp_x": _Curve(_x_exp_x, (np.linspace(*_RATES, 33),), clock=lambda t: t),
}
_DEGREES = {"linear": 1, "quadratic": 2}

CURVES = (*_DEGREES, *_CURVES)


@dataclasses.dataclass(frozen=True, repr=False)
class CurveFit:
    """Fits a curve to the last five snapshots of every weight and follows it.

    Each weight is fitted on its own, by least squares, to its values at `t = 0, 1, 2, 3, 4` snapshots, and the curve is
    evaluated at `t = 4 + horizon`. The kinds are those that Jang et al. compare their network with; each has an offset,
    which makes the fits equivariant to shifts and scalings of a weight:

    - `"linear"`: `a t + c`;
    - `"quadratic"`: `a t^2 + b t + c`;
    - `"exponential"`: `a exp(b t) + c`, with `b` in [-3, 1] per snapshot;
    - `"power"`: `a (t + 1)^b + c`, with `b` in [-4, 4];
    - `"sigmoid"`: `a / (1 + exp(-b (t - m))) + c`, with `b` in [0.1, 4] per snapshot, and `m` such that 1 % to 99 %
      of the rise is over at `t = 2`;
    - `"michaelis_menten"`: `a t / (b + t) + c`, with `b` at least 1/19 snapshot;
    - `"x_exp_x"`: `a t exp(b t) + c`, with `b` in [-3, 1] per snapshot.

    The first two are solved in closed form. For the others `a` and `c` are eliminated (variable projection) and the
    nonlinear parameters found by a search over fixed guesses followed by a few Levenberg-Marquardt steps, in
    float32 (float64 for a float64 leaf).

    An exponential and a power curve, and `"x_exp_x"`, are also bounded by the horizon: their factor grows at most
    `e^5`-fold from the last snapshot to the forecast.

    Leaves of every role are fitted. A weight that did not move, or whose forecast would not be finite, keeps its last
    value, and so does a leaf that is not of a real floating-point type.

    Attributes:
      kind: which curve.
      chunk_size: how many weights are fitted at a time. The closed forms need no chunks and don't read it.

    Raises:
      ValueError: if `kind` is unknown or `chunk_size` is not a positive int.

    Examples:
      >>> import jax.numpy as jnp
      >>> from wnn_jax.nowcasters import CurveFit
      >>> history = [{"w": jnp.array(t**2 / 8)} for t in range(5)]
      >>> CurveFit("quadratic")(history, {"w": "bias"}, horizon=4)["w"].item()
      8.0

    References:
      Jang et al., "Learning to Boost Training by Periodic Nowcasting Near Future Weights", ICML 2023.
    """

    kind: str
    _: dataclasses.KW_ONLY
    chunk_size: int = 2**16

    # Not annotated, and so no fields: they are the same for all curves.
    context = _CONTEXT
    default_horizon = 5
    takes_horizon = True
    roles = ROLES

    def __post_init__(self):
        check_choice("kind", self.kind, CURVES, "the curve to fit")
        chunk_size = check_int("chunk_size", self.chunk_size, "how many weights to fit at a time", minimum=1)
        object.__setattr__(self, "chunk_size", chunk_size)

    def __repr__(self) -> str:
        return summarize_nowcaster(self, kind=self.kind)

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any = None) -> Any:
        """Predicts the parameters; see `Nowcaster`.

        Args:
          history: five trees like the parameters, oldest first, evenly spaced.
          roles: a tree like the parameters with a role name at each leaf.
          horizon: how many snapshots after the last one to predict, an int >= 1, or an array with one number, which
            is brought into that range; `None` is 5.

        Returns:
          The predicted parameters: the same tree, shapes and dtypes.

        Raises:
          ValueError: if `history` does not have five snapshots, or `horizon` is out of its range.
        """
        horizon = self.default_horizon if horizon is None else horizon
        if not isinstance(horizon, jax.Array):
            horizon = check_int("horizon", horizon, "how many snapshots ahead to forecast", minimum=1)
        time = _CONTEXT - 1 + clip_horizon(horizon)

        def predict(role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
            del role
            if self.kind in _DEGREES:
                # Sums of five terms need no chunks, and without them the compiler makes one pass of the whole jump.
                return [self._predict(leaf, None, time) for leaf in leaves]
            return LeafMap(self._predict, self.chunk_size)(leaves, time)

        return map_by_role(history, roles, predict, context=_CONTEXT, handled=ROLES)

    def _predict(self, values: Arrays, statistics: None, time: jax.Array) -> jax.Array:
        del statistics
        dtype = values[-1].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            return values[-1]
        compute_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
        time = time.astype(compute_dtype)
        first = values[0].astype(compute_dtype)
        moves = tuple(value.astype(compute_dtype) - first for value in values)
        if self.kind in _DEGREES:
            move = _fit_polynomial(_DEGREES[self.kind], moves, time)
        else:
            move = _fit_curve(_CURVES[self.kind], moves, time)
        return finite_or_last(first + move, values)


def _fit_polynomial(degree: int, moves: Arrays, time: jax.Array) -> jax.Array:
    """Evaluates the least-squares line or parabola through `moves` at `time`."""
    # Orthogonal polynomials on the five points, whose squared norms are 5, 10 and 14.
    now = time - 2
    prediction = jnp.zeros_like(moves[0])
    for t, move in enumerate(moves):
        weight = 1 / 5 + (t - 2) * now / 10
        if degree == 2:
            weight += ((t - 2) ** 2 - 2) * (now**2 - 2) / 14
        prediction += weight * move
    return prediction


class _Evaluation(NamedTuple):
    """How good parameters of a curve are, and what is better nearby.

    Attributes:
      prediction: the curve's value at the time to be predicted.
      loss: the squared residual.
      slopes: by each parameter, how much of the residual lies along the unit vector of its column of the Jacobian; 0
        for a parameter that is pushed against the end of its interval.
      sizes: the norms of the columns.
      cosine: of the angle between the columns of two parameters.
    """

    prediction: jax.Array
    loss: jax.Array
    slopes: Arrays
    sizes: Arrays
    cosine: jax.Array


@functools.partial(jax.jit, static_argnames="curve")
def _fit_curve(curve: _Curve, moves: Arrays, time: jax.Array) -> jax.Array:
    """Evaluates the least-squares `curve` through `moves` at `time`.

    Variable projection (Golub and Pereyra, 1973) with Kaufman's simpler Jacobian (1975). The points are a tuple of five
    arrays, not one array, so that nothing here is a reduction: XLA then makes a single loop of an evaluation.
    """
    span = functools.reduce(jnp.maximum, moves) - functools.reduce(jnp.minimum, moves)
    mean, y = _center(tuple(move / jnp.where(span > 0, span, 1) for move in moves))
    times = [jnp.asarray(t, span.dtype) for t in range(_CONTEXT)]

    intervals = curve.intervals(time)

    def evaluate(parameters: Arrays) -> _Evaluation:
        shape_mean, shape = _center(tuple(curve.shape(t, *parameters) for t in times))
        shape_norm = _norm(shape)
        unit = tuple(s / shape_norm for s in shape)
        amplitude = _dot(unit, y)
        residual = _without(y, unit)
        rise = (curve.shape(time, *parameters) - shape_mean) / shape_norm
        units: list[Arrays] = []
        sizes: list[jax.Array] = []
        slopes: list[jax.Array] = []
        for k, (low, high) in enumerate(intervals):
            tangents = tuple(jnp.full_like(p, j == k) for j, p in enumerate(parameters))
            derivative = tuple(jax.jvp(functools.partial(curve.shape, t), parameters, tangents)[1] for t in times)
            column = tuple(c * (amplitude / shape_norm) for c in _without(_center(derivative)[1], unit))
            size = _norm(column)
            size = jnp.where(size > 0, size, 1)
            slope = _dot(column, residual) / size
            # A parameter that is pushed against the end of its interval would spoil the step of the other one.
            is_free = jnp.where(slope > 0, parameters[k] < high, parameters[k] > low)
            units.append(tuple(jnp.where(is_free, c / size, 0) for c in column))
            sizes.append(size)
            slopes.append(jnp.where(is_free, slope, 0))
        cosine = _dot(*units) if len(units) == 2 else jnp.zeros_like(span)
        loss = _dot(residual, residual)
        return _Evaluation(mean + amplitude * rise, loss, tuple(slopes), tuple(sizes), cosine)

    def improve(_: Any, carry: tuple[Arrays, _Evaluation, jax.Array]) -> tuple[Arrays, _Evaluation, jax.Array]:
        parameters, best, damping = carry
        trial = _step(intervals, parameters, best, damping)
        evaluation = evaluate(trial)
        is_better = evaluation.loss < best.loss
        damping = damping * jnp.where(is_better, _LOWER_DAMPING, _RAISE_DAMPING)
        parameters, best = jax.tree.map(
            functools.partial(jnp.where, is_better), (trial, evaluation), (parameters, best)
        )
        return parameters, best, jnp.maximum(damping, _LEAST_DAMPING)

    guess = tuple(
        jnp.clip(guess, low, high) for guess, (low, high) in zip(_best_guess(curve, y), intervals, strict=True)
    )
    # The first pass evaluates the guess itself: one evaluation in the program instead of two, to compile sooner.
    zero = jnp.zeros_like(span)
    zeros, ones = (tuple(zero + value for _ in guess) for value in (0, 1))
    nothing = _Evaluation(prediction=mean + y[-1], loss=zero + jnp.inf, slopes=zeros, sizes=ones, cosine=zero)
    carry = (guess, nothing, zero + _START_DAMPING)
    return span * jax.lax.fori_loop(0, 1 + _NUM_STEPS, improve, carry)[1].prediction


def _best_guess(curve: _Curve, y: Arrays) -> Arrays:
    """The best of fixed parameters: the curve whose shape has the largest share in the data."""
    guesses = [jnp.asarray(grid.reshape(-1), y[0].dtype) for grid in np.meshgrid(*curve.guesses)]
    _, shape = _center(tuple(curve.shape(jnp.asarray(t, y[0].dtype), *guesses) for t in range(_CONTEXT)))
    unit = jnp.stack([s / _norm(shape) for s in shape], axis=-1)
    shares = jnp.tensordot(unit, jnp.stack(y), axes=1, precision=jax.lax.Precision.HIGHEST)
    best = jnp.argmax(jnp.abs(shares), axis=0)
    # Where mesh axes are explicit a gather must be told what becomes of them.
    sharding = jax.typeof(best).sharding
    return tuple(guess.at[best].get(out_sharding=None if sharding.mesh.empty else sharding) for guess in guesses)


def _step(intervals: Sequence[tuple[Any, Any]], parameters: Arrays, at: _Evaluation, damping: jax.Array) -> Arrays:
    """Takes a Levenberg-Marquardt step from `parameters`, inside their intervals."""
    diagonal = 1 + damping
    if len(parameters) == 1:
        steps = (at.slopes[0] / diagonal,)
    else:
        determinant = diagonal**2 - at.cosine**2
        steps = tuple((diagonal * at.slopes[k] - at.cosine * at.slopes[1 - k]) / determinant for k in range(2))
    return tuple(
        jnp.clip(p + step / size, low, high)
        for p, step, size, (low, high) in zip(parameters, steps, at.sizes, intervals, strict=True)
    )


def _center(points: Arrays) -> tuple[jax.Array, Arrays]:
    mean = functools.reduce(jnp.add, points) / len(points)
    return mean, tuple(p - mean for p in points)


def _dot(a: Arrays, b: Arrays) -> jax.Array:
    return functools.reduce(jnp.add, (x * y for x, y in zip(a, b, strict=True)))


def _norm(points: Arrays) -> jax.Array:
    return jnp.sqrt(_dot(points, points))


def _without(points: Arrays, unit: Arrays) -> Arrays:
    """What is left of `points` at a right angle to `unit`."""
    share = _dot(points, unit)
    return tuple(p - share * u for p, u in zip(points, unit, strict=True))
