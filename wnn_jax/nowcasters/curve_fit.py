"""Least-squares curve fits of every weight's history."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wnn_jax._checks import check_choice, check_int
from wnn_jax._horizon import clip_horizon
from wnn_jax._nowcaster import LeafHistory, summarize_nowcaster
from wnn_jax._roles import ROLES
from wnn_jax._trees import choose
from wnn_jax.nowcasters._leaves import CONTEXT, LeafMap, finite_or_last, map_by_role

# Five points leave the two parameters of a sigmoid nearly interchangeable: the usual damping factors of 10 both ways
# would take twice the steps. The least damping keeps the 2x2 system solvable in float32.
_NUM_STEPS = 10
_START_DAMPING, _LEAST_DAMPING = 0.03, 1e-4
_RAISE_DAMPING, _LOWER_DAMPING = 8.0, 0.5

# Five points cannot tell growth faster than this per snapshot from an outlier at the end, and would forecast hundreds
# of times the whole movement so far. Decay faster than this is over after one snapshot.
_RATES = np.linspace(-3.0, 1.0, 33)
# No curve grows by more than this power of e from the last point to the forecast.
_MAX_GROWTH = 5.0


def _exponential(t: jax.Array, rate: jax.Array) -> jax.Array:
    # (exp(rate * t) - 1) / rate, which is t at rate 0.
    exponent = rate * t
    is_small = jnp.abs(exponent) < 0.05
    safe = jnp.where(is_small, 1.0, exponent)
    series = 1 + exponent / 2 * (1 + exponent / 3 * (1 + exponent / 4 * (1 + exponent / 5)))
    return t * jnp.where(is_small, series, jnp.expm1(safe) / safe)


def _sigmoid(t: jax.Array, steepness: jax.Array, remaining: jax.Array) -> jax.Array:
    # sigmoid(steepness * (t - midpoint)), less its value at t = 2 and over a factor without t. Five points on one tail
    # do not determine the midpoint. The share of the rise that remains at t = 2 takes its place.
    decay = jnp.expm1(steepness * (2 - t))
    return -decay / (1 + remaining * decay)


class _Curve(NamedTuple):
    """A curve `scale * shape(t, *parameters) + offset`, for `t` in snapshots after the first one.

    Least squares knows `scale` and `offset` once it knows the parameters. So the shapes leave out factors and terms
    without `t`, to have neither poles nor overflow and to contain the straight line where it is a limit of the curve.

    Attributes:
      shape: an elementwise function of `t` and one or two nonlinear parameters.
      guesses: increasing first guesses of each parameter. The first and the last guess bound it.
      clock: for a curve that grows without limit, a function of `t` that its only parameter, a rate, multiplies.
    """

    shape: Callable[..., jax.Array]
    guesses: tuple[np.ndarray, ...]
    clock: Callable[[jax.Array], jax.Array] | None = None


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
    """Fits a curve to the last five snapshots of every weight and follows it.

    Each weight is fitted on its own by least squares to its values at `t = 0, 1, 2, 3, 4` snapshots. The forecast is
    the curve at `t = 4 + horizon`. The kinds are those that Jang et al. compare their network with. Each has an offset,
    so that shifting or scaling a weight shifts or scales its forecast:

    - `"linear"`: `a t + c`;
    - `"quadratic"`: `a t^2 + b t + c`;
    - `"exponential"`: `a exp(b t) + c`, with `b` in [-3, 1] per snapshot;
    - `"power"`: `a (t + 1)^b + c`, with `b` in [-4, 4];
    - `"sigmoid"`: `a / (1 + exp(-b (t - m))) + c`, with `b` in [0.1, 4] per snapshot, and `m` such that 1 % to 99 %
      of the rise is over at `t = 2`;
    - `"michaelis_menten"`: `a t / (b + t) + c`, with `b` at least 1/19 snapshot;
    - `"x_exp_x"`: `a t exp(b t) + c`, with `b` in [-3, 1] per snapshot.

    The first two have closed forms. For the others, `a` and `c` are eliminated (variable projection). A search over
    fixed guesses and a few Levenberg-Marquardt steps find the nonlinear parameters, in float32 or the wider dtype of
    the leaf. Exponential and power curves and `"x_exp_x"` are also bounded by the horizon: their factor grows at most
    `e^5`-fold from the last snapshot to the forecast.

    Leaves of every role are fitted. A weight keeps its last value if it did not move or if its forecast is not finite.
    A leaf that is not of a real floating-point type stays as it is.

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

    # Not annotated, and so no fields: they are the same for all curves.
    context = CONTEXT
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
        """Forecasts a tree of parameters; see `Nowcaster`.

        Args:
          history: five trees like the parameters, oldest first, evenly spaced.
          roles: a tree like the parameters with a role name at each leaf.
          horizon: how many snapshots ahead, an int >= 1, or an array with one number, which is clipped to that range;
            `None` is 5.

        Returns:
          The forecast: the tree, shapes and dtypes of the parameters.

        Raises:
          ValueError: if `history` does not have five snapshots, or `horizon` is out of its range.
        """
        horizon = self.default_horizon if horizon is None else horizon
        if not isinstance(horizon, jax.Array):
            horizon = check_int("horizon", horizon, "how many snapshots ahead to forecast", minimum=1)
        time = CONTEXT - 1 + clip_horizon(horizon)

        def predict(role: str, leaves: list[LeafHistory]) -> list[jax.Array]:
            del role
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
    """Evaluates the least-squares line or parabola through `moves` at `time`."""
    # Orthogonal polynomials on the five points have the squared norms 5, 10 and 14.
    now = time - 2
    prediction = jnp.zeros_like(moves[0])
    for t, move in enumerate(moves):
        weight = 1 / 5 + (t - 2) * now / 10
        if _DEGREES[kind] == 2:
            weight += ((t - 2) ** 2 - 2) * (now**2 - 2) / 14
        prediction += weight * move
    return prediction


class _Evaluation(NamedTuple):
    """A curve with given parameters, and how to improve them.

    Attributes:
      prediction: `[n]`, its value at the time to forecast.
      loss: `[n]`, the squared residual.
      slopes: `[parameters, n]`, the products of the residual and the unit vectors of the columns of the Jacobian.
      sizes: `[parameters, n]`, the norms of the columns.
      cosine: `[n]`, of the angle between the columns of two parameters.
    """

    prediction: jax.Array
    loss: jax.Array
    slopes: jax.Array
    sizes: jax.Array
    cosine: jax.Array


@functools.partial(jax.jit, static_argnames="kind")
def _fit_curve(kind: str, moves: LeafHistory, time: jax.Array) -> jax.Array:
    """Evaluates the least-squares curve through `moves`, arrays `[n]`, at `time`.

    Variable projection (Golub and Pereyra, 1973) with Kaufman's simpler Jacobian (1975), by Levenberg-Marquardt steps.
    """
    shape, grids, clock = _CURVES[kind]
    points = jnp.stack(moves)
    span = jnp.max(points, axis=0) - jnp.min(points, axis=0)
    points = points / jnp.where(span > 0, span, 1)[None]
    mean, y = points.mean(axis=0), _center(points)
    times = jnp.arange(CONTEXT, dtype=span.dtype)
    low, high = (jnp.array([[grid[end]] for grid in grids], span.dtype) for end in (0, -1))
    if clock is not None:
        high = jnp.minimum(high, _MAX_GROWTH / jnp.maximum(clock(time) - clock(times[-1]), 1))

    def curve(parameters: jax.Array) -> jax.Array:
        return shape(times[:, None], *(parameter[None] for parameter in parameters))

    def evaluate(parameters: jax.Array) -> _Evaluation:
        values, derivatives = curve(parameters), []
        norm = _norm(_center(values))
        unit = _center(values) / norm[None]
        amplitude = _dot(unit, y)
        residual = y - amplitude[None] * unit
        prediction = mean + amplitude * (shape(time, *parameters) - values.mean(axis=0)) / norm
        for index in range(len(grids)):
            tangent = jnp.zeros_like(parameters).at[index].set(1)
            derivatives.append(_center(jax.jvp(curve, (parameters,), (tangent,))[1]))
        columns = [(d - _dot(d, unit)[None] * unit) * (amplitude / norm)[None] for d in derivatives]
        sizes = jnp.stack([_norm(column) for column in columns])
        sizes = jnp.where(sizes > 0, sizes, 1)
        slopes = jnp.stack([_dot(column, residual) for column in columns]) / sizes
        # A parameter that is pushed against the end of its interval would spoil the step of the other one.
        is_free = jnp.where(slopes > 0, parameters < high, parameters > low)
        cosine = _dot(columns[0], columns[-1]) / (sizes[0] * sizes[-1])
        cosine = jnp.where(is_free.all(axis=0) & (len(grids) == 2), cosine, 0)
        return _Evaluation(prediction, _dot(residual, residual), jnp.where(is_free, slopes, 0), sizes, cosine)

    def improve(_: Any, carry: tuple[jax.Array, _Evaluation, jax.Array]) -> tuple[jax.Array, _Evaluation, jax.Array]:
        parameters, best, damping = carry
        diagonal = 1 + damping
        steps = (diagonal[None] * best.slopes - best.cosine[None] * best.slopes[::-1]) / best.sizes
        trial = jnp.clip(parameters + steps / (diagonal**2 - best.cosine**2)[None], low, high)
        evaluation = evaluate(trial)
        is_better = evaluation.loss < best.loss
        damping = jnp.maximum(damping * jnp.where(is_better, _LOWER_DAMPING, _RAISE_DAMPING), _LEAST_DAMPING)
        return (*choose(is_better, (trial, evaluation), (parameters, best)), damping)

    guesses = jnp.stack([jnp.asarray(grid.reshape(-1), span.dtype) for grid in np.meshgrid(*grids)])
    shapes = _center(curve(guesses))
    shares = jnp.tensordot(shapes / _norm(shapes)[None], y, axes=(0, 0), precision=jax.lax.Precision.HIGHEST)
    best = jnp.argmax(jnp.abs(shares), axis=0)
    # Where mesh axes are explicit, a gather must be told the sharding of its result.
    sharding = jax.typeof(best).sharding
    out = None if sharding.mesh.empty else sharding
    guess = jnp.clip(jnp.stack([guess.at[best].get(out_sharding=out) for guess in guesses]), low, high)
    # The first step evaluates the guess itself: one evaluation in the program instead of two.
    zero = jnp.zeros_like(span)
    nothing = _Evaluation(points[-1], zero + jnp.inf, jnp.zeros_like(guess), jnp.ones_like(guess), zero)
    return span * jax.lax.fori_loop(0, 1 + _NUM_STEPS, improve, (guess, nothing, zero + _START_DAMPING))[1].prediction


def _center(points: jax.Array) -> jax.Array:
    return points - points.mean(axis=0, keepdims=True)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).sum(axis=0)


def _norm(points: jax.Array) -> jax.Array:
    return jnp.sqrt(_dot(points, points))
