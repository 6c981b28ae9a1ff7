"""Curve fits, against the curves' plain formulas, NumPy's polynomials and SciPy's nonlinear least squares."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.helpers import COLLECTIVES
from wnn_jax.nowcasters.curve_fit import CURVES, CurveFit

TIMES = np.arange(5.0)
NONLINEAR = tuple(kind for kind in CURVES if kind not in ("linear", "quadratic"))
NUM_WEIGHTS = 64

# Two programs for the same fit may stop at different points of a minimum that is flat to within float32's digits.
FLATNESS = 5e-3

# `formula(t, *nonlinear parameters)`, to be scaled and shifted; the interval that CurveFit promises for each parameter;
# and where SciPy starts. The sigmoid's last parameter is its midpoint's distance from t = 2 in units of its width.
FORMULAS: dict[str, tuple[Callable[..., Any], list[tuple[float, float]], list[float]]] = {
    "exponential": (lambda t, rate: np.exp(rate * t), [(-3, 1)], [-0.5]),
    "power": (lambda t, exponent: (t + 1) ** exponent, [(-4, 4)], [0.5]),
    "sigmoid": (lambda t, b, lag: 1 / (1 + np.exp(lag - b * (t - 2))), [(0.1, 4), (-4.595, 4.595)], [1.0, 0.0]),
    "michaelis_menten": (lambda t, half: t / (half + t), [(1 / 19, 1e4)], [1.0]),
    "x_exp_x": (lambda t, rate: t * np.exp(rate * t), [(-3, 1)], [-0.5]),
}


@functools.cache
def compiled(kind: str) -> Callable[..., jax.Array]:
    """`(history [5, n], time) -> value of the curve [n]`, for times that need not be in the future."""
    return jax.jit(lambda history, time: CurveFit(kind)._predict(tuple(history), time))


def predict(kind: str, history: Any, horizon: int = 5) -> np.ndarray:
    """Predicts up to `NUM_WEIGHTS` weights, always by the same compiled program: compiling takes most of the time."""
    num_weights = np.shape(history)[1]
    padded = np.pad(np.asarray(history, np.float32), ((0, 0), (0, NUM_WEIGHTS - num_weights)))
    return np.asarray(compiled(kind)(padded, 4 + horizon))[:num_weights]


def noisy_history(num_weights: int = NUM_WEIGHTS) -> np.ndarray:
    """`[5, num_weights]` float32 weights that approach a value, drift or oscillate, as those of a network do."""
    rng = np.random.default_rng(0)
    initial, moves, slopes = rng.normal(size=(3, num_weights)) * np.array([[0.1], [0.05], [0.01]])
    rates = rng.uniform(0.1, 1.5, num_weights)
    noise = rng.normal(size=(5, num_weights)) * rng.choice([0.001, 0.01, 0.03], num_weights)[None]
    t = TIMES[:, None]
    return (initial[None] + moves[None] * (1 - np.exp(-rates[None] * t)) + slopes[None] * t + noise).astype(np.float32)


def assert_close_to_span(actual: Any, expected: Any, history: Any, tolerance: float) -> None:
    """Compares predictions in units of how far each weight has moved or is to move."""
    history = np.asarray(history, np.float64)
    span = np.maximum(np.ptp(history, axis=0), np.abs(expected - history[0]))
    np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - expected), tolerance * span + 1e-30)


def test_bad_arguments():
    assert CurveFit("power") == CurveFit("power") != CurveFit("power", chunk_size=8)
    with pytest.raises(ValueError, match=r"kind='cubic' must be one of 'linear', 'quadratic'.*'x_exp_x': the curve"):
        CurveFit("cubic")
    for chunk_size in (0, 2.0, True):
        with pytest.raises(ValueError, match=rf"chunk_size={chunk_size} must be an int >= 1: how many weights"):
            CurveFit("power", chunk_size=chunk_size)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="history has 4 snapshots"):
        CurveFit("linear")([jnp.zeros(2)] * 4, "bias", 5)
    with pytest.raises(ValueError, match="horizon=0 must be an int >= 1"):
        CurveFit("linear")([jnp.zeros(2)] * 5, "bias", 0)


@pytest.mark.parametrize(("kind", "degree"), [("linear", 1), ("quadratic", 2)])
@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_polynomials_equal_numpy(kind: str, degree: int, horizon: int):
    history = noisy_history()
    coefficients = np.polyfit(TIMES, history.astype(np.float64), degree)
    expected = np.polynomial.polynomial.polyval(4 + horizon, coefficients[::-1])
    assert_close_to_span(predict(kind, history, horizon), expected, history, 2e-5)


@pytest.mark.parametrize("kind", NONLINEAR)
@settings(max_examples=50)
@given(data=st.data(), scale=st.floats(-3, 3).filter(lambda scale: abs(scale) > 0.1), offset=st.floats(-1, 1))
def test_recovers_its_own_curve(kind: str, data: st.DataObject, scale: float, offset: float):
    formula, intervals, _ = FORMULAS[kind]
    # Away from the limits, where a curve can be told from no other: those of a straight line and of a step.
    margins = {"sigmoid": [(0.5, 3), (-3, 3)], "michaelis_menten": [(0.1, 50)]}
    limits = margins.get(kind, [(0.9 * low, 0.9 * high) for low, high in intervals])
    parameters = [data.draw(st.floats(low, high)) for low, high in limits]
    curve = np.array([formula(t, *parameters) for t in (*TIMES, 9.0)])
    if (span := np.ptp(curve[:5])) < 1e-3:
        return
    values = scale * (curve - curve[0]) / span + offset
    history = values[:5, None].astype(np.float32)
    assert_close_to_span(predict(kind, history), values[5:], history, 1e-3)


@pytest.mark.parametrize("kind", NONLINEAR)
@pytest.mark.filterwarnings("ignore:Covariance of the parameters could not be estimated")
def test_fits_as_well_as_scipy(kind: str):
    formula, intervals, start = FORMULAS[kind]
    history = noisy_history(40)
    history = (history - history[0]) / np.ptp(history, axis=0)
    fitted = np.array([predict(kind, history, t - 4) for t in range(5)])
    loss = np.linalg.norm(fitted - history, axis=0)

    def curve(t: Any, scale: float, offset: float, *parameters: float) -> Any:
        return scale * formula(t, *parameters) + offset

    low, high = zip(*((-np.inf, np.inf), (-np.inf, np.inf), *intervals), strict=True)
    scipy_loss: list[float] = []
    for weight in history.T.astype(np.float64):
        best, _ = scipy.optimize.curve_fit(
            curve, TIMES, weight, p0=[1.0, 0.0, *start], bounds=(low, high), max_nfev=10_000
        )
        scipy_loss.append(float(np.linalg.norm(curve(TIMES, *best) - weight)))
    # Losses are relative to the weight's range.
    assert np.mean(loss <= np.array(scipy_loss) + 1e-3) >= 0.95


@pytest.mark.parametrize("kind", CURVES)
def test_equivariant_to_shift_and_scale(kind: str):
    history = noisy_history()
    prediction = predict(kind, history)
    # A power of two changes no digit of any intermediate result; a shift rounds the history itself.
    np.testing.assert_array_equal(predict(kind, 2.0**20 * history), 2.0**20 * prediction)
    np.testing.assert_array_equal(predict(kind, -history), -prediction)
    history = np.round(history * 2**14) / 2**14
    assert_close_to_span(predict(kind, history + 1), predict(kind, history) + 1.0, history + 1, FLATNESS)


@pytest.mark.parametrize("kind", CURVES)
def test_extremes_fall_back_to_the_last_value(kind: str):
    largest = float(jnp.finfo(jnp.float32).max)
    extremes = [[-largest, largest, -largest, largest, 0.5 * largest], [0, 0, 0, 0, largest]]
    history = np.array(extremes, np.float32).T
    prediction = predict(kind, history)
    assert np.all(np.isfinite(prediction))
    assert prediction[0] == history[-1, 0]
    assert np.all(np.isfinite(predict(kind, history / largest, horizon=2_000_000_000)))


@pytest.mark.parametrize("kind", CURVES)
def test_non_finite_history_does_not_spread(kind: str):
    history = noisy_history(3)
    expected = predict(kind, history)
    history[2, 1] = np.nan
    prediction = predict(kind, history)
    assert prediction[1] == history[-1, 1]
    np.testing.assert_array_equal(prediction[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", CURVES)
@settings(max_examples=20)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False))
def test_frozen_weight_stays(kind: str, value: float):
    assert predict(kind, np.full((5, 1), value, np.float32))[0] == np.float32(value)


@pytest.mark.usefixtures("optimized_here")
@pytest.mark.slow_but(3)
@pytest.mark.parametrize("kind", ["linear", "quadratic", "exponential", "michaelis_menten"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(kind: str, dtype: Any):
    history = jnp.asarray(noisy_history(), dtype).at[:, 0].set(jnp.array([0, 1, 10, 100, 60_000], dtype))
    prediction = compiled(kind)(history, 9)
    assert prediction.dtype == dtype
    assert jnp.isfinite(prediction).all()
    expected = jnp.asarray(predict(kind, history)[1:], dtype)
    np.testing.assert_array_equal(prediction[1:], expected)


@pytest.mark.parametrize("kind", ["linear", "quadratic", "exponential"])
def test_float64_is_fitted_in_float64(kind: str):
    with jax.enable_x64(True):
        prediction = CurveFit(kind)([jnp.asarray(1 + 1e-9 * t, jnp.float64) for t in range(5)], "bias", 5)
        assert prediction.dtype == jnp.float64
        np.testing.assert_allclose(prediction - 1, 9e-9, rtol=0.01)


@pytest.mark.parametrize("kind", ["quadratic", "x_exp_x"])
def test_trees_shapes_and_chunks(kind: str):
    flat = noisy_history(35)
    history = [
        {"kernel": jnp.asarray(h).reshape(5, 7), "scalar": jnp.asarray(h[3]), "none": jnp.zeros((0, 3)), "step": count}
        for h, count in zip(flat, jnp.arange(5), strict=True)
    ]
    roles = {"kernel": "dense", "scalar": "norm", "none": "embedding", "step": "bias"}
    prediction = jax.jit(lambda history: CurveFit(kind, chunk_size=8)(history, roles))(history)
    assert jax.tree.map(jax.typeof, prediction) == jax.tree.map(jax.typeof, history[-1])
    expected = predict(kind, flat)
    assert_close_to_span(prediction["kernel"].reshape(-1), expected, flat, FLATNESS)
    assert_close_to_span(prediction["scalar"], expected[3], flat[:, 3], FLATNESS)
    assert prediction["step"] == 4


@pytest.mark.parametrize("kind", ["quadratic", "x_exp_x"])
def test_horizon_and_eager_calls(kind: str):
    nowcaster, history = CurveFit(kind), jnp.asarray(noisy_history())
    default = nowcaster(list(history), "conv", None)
    np.testing.assert_array_equal(default, nowcaster(list(history), "conv", 5))
    predict_ahead = jax.jit(lambda horizon: nowcaster(list(history), "dense", horizon))
    assert_close_to_span(predict_ahead(5.0), default, history, FLATNESS)
    nearest = predict_ahead(1.0)
    assert not np.array_equal(nearest, predict_ahead(2.0))
    for horizon in (0.0, -3.0, np.nan):
        np.testing.assert_array_equal(predict_ahead(horizon), nearest)


@pytest.mark.parametrize(("kind", "growth"), [("exponential", 5), ("power", 5), ("x_exp_x", 5 + np.log(11))])
def test_growth_is_bounded_by_the_horizon(kind: str, growth: float):
    """Forty snapshots ahead no curve has grown by more than e^5, of which `x` alone is another factor."""
    t = np.arange(5.0)
    history = np.stack([np.exp(t), (t + 1) ** 4, t * np.exp(t)], axis=1)
    moved = predict(kind, history, 40) - history[0]
    assert (np.abs(moved) <= 3 * np.exp(growth) * np.ptp(history, axis=0)).all()
    assert (moved > np.ptp(history, axis=0)).all()


@pytest.mark.parametrize(
    ("kind", "axis_type", "is_batched"),
    [
        ("linear", AxisType.Auto, False),
        ("quadratic", AxisType.Explicit, False),
        ("x_exp_x", AxisType.Explicit, True),
        pytest.param("sigmoid", AxisType.Explicit, False, marks=pytest.mark.slow),
        pytest.param("michaelis_menten", AxisType.Auto, True, marks=pytest.mark.slow),
    ],
)
def test_sharded_leaves_stay_where_they_are(kind: str, axis_type: AxisType, is_batched: bool):
    """Whether the rows of matrices are on 8 devices, or the weights of seeds in parallel."""
    flat = noisy_history(16 * 3)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("rows", None))
    history = [jax.device_put(snapshot.reshape(16, 3), sharding) for snapshot in flat]

    def fit(*history: jax.Array) -> jax.Array:
        return CurveFit(kind, chunk_size=4)(history, "dense", 5)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.vmap(fit) if is_batched else fit).lower(*history).compile()
        prediction = program(*history)
    assert prediction.sharding.is_equivalent_to(sharding, 2)
    assert not [name for name in COLLECTIVES if name in (program.as_text() or "")]
    assert_close_to_span(np.asarray(prediction).reshape(-1), predict(kind, flat), flat, FLATNESS)
