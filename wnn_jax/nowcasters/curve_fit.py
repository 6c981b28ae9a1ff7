"""Least-squares curve fits of every weight's history."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_choice, check_int
from wnn_jax._roles import ROLES
from wnn_jax._trees import choose
from wnn_jax._window import LeafHistory, short_repr
from wnn_jax.nowcasters._leaves import CONTEXT, LeafMap, finite_or_last, known_horizon, map_by_role

# The usual damping factors of 10 both ways would take twice the steps. The least damping keeps the 2x2 system solvable
# in float32.
_NUM_STEPS = 10
_START_DAMPING, _LEAST_DAMPING = 0.03, 1e-4
_RAISE_DAMPING, _LOWER_DAMPING = 8.0, 0.5

# Five points cannot tell faster growth from an outlier at the end. Faster decay is over after one snapshot.
_RATES = np.linspace(-3.0, 1.0, 33)
# No curve grows by more than this power of e from the last point to the forecast.
_MAX_GROWTH = 5.0


def _exponential(t: jax.Array, rate: jax.Array) -> jax.Array:
    """Return `(exp(rate * t) - 1) / rate`, which is `t` at rate 0."""
    exponent = rate * t
    is_small = jnp.abs(exponent) < 0.05
    safe = jnp.where(is_small, 1.0, exponent)
    series = 1 + exponent / 2 * (1 + exponent / 3 * (1 + exponent / 4 * (1 + exponent / 5)))
    return t * jnp.where(is_small, series, jnp.expm1(safe) / safe)


def _sigmoid(t: jax.Array, steepness: jax.Array, remaining: jax.Array) -> jax.Array:
    """Return a sigmoid, less its value at `t = 2` and over a factor without `t`."""
    # Five points on one tail do not determine the midpoint. The share of the rise that remains at t = 2 replaces it.
    decay = jnp.expm1(steepness * (2 - t))
    return -decay / (1 + remaining * decay)


class _Curve(NamedTuple):
    """A curve `scale * shape(t, *parameters) + offset`, for `t` in snapshots after the first one.

    Least squares knows `scale` and `offset` once it knows the parameters. So the shapes leave out factors and terms
    without `t`, to have neither poles nor overflow and to contain the straight line if it is a limit of the curve.
    """

    shape: Callable[..., jax.Array]
    guesses: tuple[np.ndarray, ...]
    """Increasing first guesses of each parameter. The first and the last guess bound it."""
    clock: Callable[[jax.Array], jax.Array] | None = None
    """For a curve that grows without limit: the function of `t` that its only parameter, a rate, multiplies."""


_CURVES = {
    "exponential": _Curve(_exponential, (_RATES,), clock=lambda t: t),
    # (t + 1) ** exponent, which is log(t + 1) at exponent 0.
    "power": _Curve(lambda t, exponent: _exponential(jnp.log1p(t), exponent), (np.linspace(-4, 4, 33),), jnp.log1p),
    "sigmoid": _Curve(_sigmoid, (np.geomspace(0.1, 4, 10), np.linspace(0.01, 0.99, 11))),
    # t / (b + t) with half-saturation time b = (1 - bend) / bend snapshots; a straight line at bend 0.
    "michaelis_menten": _Curve(lambda t, bend: t / (1 - bend + bend * t), (np.linspace(0, 0.95, 33),)),
    "x_exp_x": _Curve(lambda t, rate: t * jnp.exp(rate * t), (_RATES,), clock=lambda t: t),
}
_DEGREES = {"linear": 1, "quadratic": 2}

CURVES = (*_DEGREES, *_CURVES)


@dataclasses.dataclass(frozen=True, repr=False)
class CurveFit:
    """Fit a curve to the last five snapshots of every weight and follow it.

    Each weight is fitted on its own by least squares to its values at `t = 0, 1, 2, 3, 4` snapshots. The forecast is
    the curve at `t = 4 + horizon`. Each kind has an offset, so that shifting or scaling a weight shifts or scales its
    forecast:

    - `"linear"`: `a t + c`;
    - `"quadratic"`: `a t^2 + b t + c`;
    - `"exponential"`: `a exp(b t) + c`, with `b` in [-3, 1] per snapshot;
    - `"power"`: `a (t + 1)^b + c`, with `b` in [-4, 4];
    - `"sigmoid"`: `a / (1 + exp(-b (t - m))) + c`, with `b` in [0.1, 4] per snapshot, and `m` such that 1 % to 99 %
      of the rise is over at `t = 2`;
    - `"michaelis_menten"`: `a t / (b + t) + c`, with `b` at least 1/19 snapshot;
    - `"x_exp_x"`: `a t exp(b t) + c`, with `b` in [-3, 1] per snapshot.

    The factors of exponential and power curves and of `"x_exp_x"` also grow at most `e^5`-fold from the last snapshot
    to the forecast. A weight keeps its last value if it did not move, if its forecast is not finite, or if its leaf is
    not of a real floating-point type.

    Attributes:
      kind: the curve.
      chunk_size: how many weights are fitted at a time. The closed forms need no chunks and ignore it.

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

    # Not annotated, and so no fields.
    context = CONTEXT
    default_horizon = 5
    takes_horizon = True
    roles = ROLES

    def __post_init__(self):
        check_choice("kind", self.kind, CURVES, "the curve to fit")
        chunk_size = check_int("chunk_size", self.chunk_size, "how many weights to fit at a time", minimum=1)
        object.__setattr__(self, "chunk_size", chunk_size)

    def __repr__(self) -> str:
        return short_repr(self, kind=self.kind)

    def __call__(self, history: Sequence[Any], roles: Any, horizon: Any = None) -> Any:
        """Forecast a tree of parameters; see `Nowcaster`. A horizon that is an array is clipped to 1 and more."""
        time = CONTEXT - 1 + known_horizon(horizon, self.default_horizon)

        def predict(_: str, leaves: list[LeafHistory]) -> list[jax.Array]:
            if self.kind in _DEGREES:
                # Without chunks XLA makes one pass of the whole jump.
                return [self._predict(leaf, time) for leaf in leaves]
            return LeafMap(self._predict, self.chunk_size)(leaves, time)

        return map_by_role(history, roles, predict, handled=ROLES)

    def _predict(self, values: LeafHistory, time: jax.Array) -> jax.Array:
        dtype = values[-1].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            return values[-1]
        compute_dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
        first = values[0].astype(compute_dtype)
        moves = tuple(value.astype(compute_dtype) - first for value in values)
        fit = _fit_polynomial if self.kind in _DEGREES else _fit_curve
        return finite_or_last(first + fit(self.kind, moves, time.astype(compute_dtype)), values)


def _fit_polynomial(kind: str, moves: LeafHistory, time: jax.Array) -> jax.Array:
    """Evaluate the least-squares line or parabola through `moves` at `time`."""
    # Orthogonal polynomials on the five points have the squared norms 5, 10 and 14.
    now = time - 2
    prediction = jnp.zeros_like(moves[0])
    for t, move in enumerate(moves):
        weight = 1 / 5 + (t - 2) * now / 10
        if _DEGREES[kind] == 2:
            weight += ((t - 2) ** 2 - 2) * (now**2 - 2) / 14
        prediction += weight * move
    return prediction


@functools.partial(jax.jit, static_argnames="kind")
def _fit_curve(kind: str, moves: LeafHistory, time: jax.Array) -> jax.Array:
    """Evaluate the least-squares curve through `moves` at `time`.

    Variable projection (Golub and Pereyra, 1973) with Kaufman's simpler Jacobian (1975), and Levenberg-Marquardt steps.
    The points are five arrays, so that nothing here is a reduction. One loop per evaluation is ten times faster.
    """
    shape, guesses, clock = _CURVES[kind]
    span = functools.reduce(jnp.maximum, moves) - functools.reduce(jnp.minimum, moves)
    mean, y = _center(tuple(move / jnp.where(span > 0, span, 1) for move in moves))
    times = [jnp.asarray(t, span.dtype) for t in range(CONTEXT)]
    bounds: list[tuple[Any, Any]] = [(float(grid[0]), float(grid[-1])) for grid in guesses]
    if clock is not None:
        ((low, high),) = bounds
        bounds = [(low, jnp.minimum(high, _MAX_GROWTH / jnp.maximum(clock(time) - clock(times[-1]), 1)))]

    def clip(parameters: Sequence[jax.Array]) -> LeafHistory:
        return tuple(jnp.clip(p, low, high) for p, (low, high) in zip(parameters, bounds, strict=True))

    def evaluate(parameters: LeafHistory) -> tuple[jax.Array, jax.Array, LeafHistory, LeafHistory, jax.Array]:
        """Return the value at `time`, the squared residual, and the slopes, sizes and cosine of Jacobian columns."""
        shape_mean, centered = _center(tuple(shape(t, *parameters) for t in times))
        shape_norm = jnp.sqrt(_dot(centered, centered))
        unit = tuple(point / shape_norm for point in centered)
        amplitude = _dot(unit, y)
        residual = _without(y, unit)
        rise = (shape(time, *parameters) - shape_mean) / shape_norm
        columns, sizes, slopes = [], [], []
        for k, (low, high) in enumerate(bounds):
            tangents = tuple(jnp.full_like(p, j == k) for j, p in enumerate(parameters))
            derivative = tuple(jax.jvp(functools.partial(shape, t), parameters, tangents)[1] for t in times)
            column = tuple(c * (amplitude / shape_norm) for c in _without(_center(derivative)[1], unit))
            size = jnp.sqrt(_dot(column, column))
            size = jnp.where(size > 0, size, 1)
            slope = _dot(column, residual) / size
            # A parameter at the end of its interval would spoil the step of the other one.
            is_free = jnp.where(slope > 0, parameters[k] < high, parameters[k] > low)
            columns.append(tuple(jnp.where(is_free, c / size, 0) for c in column))
            sizes.append(size)
            slopes.append(jnp.where(is_free, slope, 0))
        cosine = _dot(*columns) if len(columns) == 2 else jnp.zeros_like(span)
        return mean + amplitude * rise, _dot(residual, residual), tuple(slopes), tuple(sizes), cosine

    def improve(_: Any, carry: tuple[LeafHistory, Any, jax.Array]) -> tuple[LeafHistory, Any, jax.Array]:
        parameters, best, damping = carry
        _, loss, slopes, sizes, cosine = best
        diagonal = 1 + damping
        steps = [slope / diagonal for slope in slopes]
        if len(parameters) == 2:
            determinant = diagonal**2 - cosine**2
            steps = [(diagonal * slopes[k] - cosine * slopes[1 - k]) / determinant for k in (0, 1)]
        trial = clip([p + step / size for p, step, size in zip(parameters, steps, sizes, strict=True)])
        evaluation = evaluate(trial)
        is_better = evaluation[1] < loss
        damping = damping * jnp.where(is_better, _LOWER_DAMPING, _RAISE_DAMPING)
        return *choose(is_better, (trial, evaluation), (parameters, best)), jnp.maximum(damping, _LEAST_DAMPING)

    guess = clip(_best_guess(shape, guesses, y))
    # The first step evaluates the guess itself: one evaluation in the program instead of two.
    zero = jnp.zeros_like(span)
    zeros, ones = (zero,) * len(guess), (zero + 1,) * len(guess)
    carry = (guess, (mean + y[-1], zero + jnp.inf, zeros, ones, zero), zero + _START_DAMPING)
    return span * jax.lax.fori_loop(0, 1 + _NUM_STEPS, improve, carry)[1][0]


def _best_guess(shape: Any, grids: Sequence[np.ndarray], y: LeafHistory) -> LeafHistory:
    """Return the guesses whose shape has the largest share in the data."""
    guesses = [jnp.asarray(grid.reshape(-1), y[0].dtype) for grid in np.meshgrid(*grids)]
    centered = _center(tuple(shape(jnp.asarray(t, y[0].dtype), *guesses) for t in range(CONTEXT)))[1]
    unit = jnp.stack(centered, axis=-1) / jnp.sqrt(_dot(centered, centered))[:, None]
    shares = jnp.tensordot(unit, jnp.stack(y), axes=1, precision=jax.lax.Precision.HIGHEST)
    best = jnp.argmax(jnp.abs(shares), axis=0)
    # If mesh axes are explicit, a gather must be told the sharding of its result.
    sharding = jax.typeof(best).sharding
    return tuple(guess.at[best].get(out_sharding=None if sharding.mesh.empty else sharding) for guess in guesses)


def _center(points: LeafHistory) -> tuple[jax.Array, LeafHistory]:
    mean = functools.reduce(jnp.add, points) / len(points)
    return mean, tuple(p - mean for p in points)


def _dot(a: LeafHistory, b: LeafHistory) -> jax.Array:
    return functools.reduce(jnp.add, (x * y for x, y in zip(a, b, strict=True)))


def _without(points: LeafHistory, unit: LeafHistory) -> LeafHistory:
    """Return the part of `points` that is orthogonal to `unit`."""
    share = _dot(points, unit)
    return tuple(p - share * u for p, u in zip(points, unit, strict=True))
