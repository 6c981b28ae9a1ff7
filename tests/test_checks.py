"""What arguments are accepted and refused, by the checks and by all that has arguments."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import last_plus_one, network_params
from wnn_jax import averaging, late_phase
from wnn_jax._checks import check_bool, check_choice, check_float, check_float_dtype, check_int
from wnn_jax.nowcasters import WNN, CurveFit, Drift, WNNPlus

NETWORK = WNNPlus.init(jax.random.key(0), width=4, num_hidden=1)
SPLIT = late_phase.split_members(
    network_params(), {"Conv_0": {"kernel": False, "bias": True}}, jax.random.key(0), num_members=3
)


def split(**kwargs: Any) -> Any:
    mask = {"Conv_0": {"kernel": False, "bias": True}}
    return late_phase.split_members(network_params(), mask, jax.random.key(0), **{"num_members": 2} | kwargs)


def make_late_phase(**kwargs: Any) -> Any:
    options: dict[str, Any] = {"num_members": 2} | kwargs
    return late_phase.late_phase(optax.sgd(0.1), optax.sgd(0.1), **options)


def nowcast(**kwargs: Any) -> Any:
    options: dict[str, Any] = {"snapshot_every": 10} | kwargs
    return wnn_jax.nowcast(last_plus_one(), **options)


def forecast(nowcaster: Any) -> Callable[..., Any]:
    return lambda horizon: nowcaster([jnp.zeros(3)] * 5, "dense", horizon)


def make_subspace(**kwargs: Any) -> Any:
    return averaging.make_subspace([{"w": jnp.ones(3)}, {"w": jnp.zeros(3)}], **kwargs)


class Argument(NamedTuple):
    """An argument of a public function: how to give it, and some value that it may and one that it may not have."""

    make: Callable[..., Any]
    name: str
    good: int
    out_of_range: int


INTS = [
    Argument(nowcast, "snapshot_every", 3, 0),
    Argument(nowcast, "start", 3, -1),
    Argument(nowcast, "stop", 3, 0),
    Argument(lambda **kwargs: nowcast(snapshot_every=1, **kwargs), "num_steps", 7, 0),
    Argument(nowcast, "horizon", 3, 0),
    Argument(lambda **kwargs: wnn_jax.leafwise(lambda *_: jnp.zeros(1), **kwargs), "context", 3, 0),
    Argument(lambda **kwargs: wnn_jax.decaying_horizon(**{"num_nowcasts": 4} | kwargs), "num_nowcasts", 3, 0),
    Argument(lambda **kwargs: wnn_jax.decaying_horizon(4, **kwargs), "first", 3, 0),
    Argument(lambda **kwargs: wnn_jax.decaying_horizon(4, **kwargs), "last", 3, 0),
    Argument(lambda **kwargs: CurveFit("linear", **kwargs), "chunk_size", 3, 0),
    Argument(lambda **kwargs: WNN(WNN.init(jax.random.key(0), ["bias"]).params, **kwargs), "chunk_size", 3, 0),
    Argument(lambda **kwargs: WNNPlus(NETWORK.params, **kwargs), "chunk_size", 3, 0),
    Argument(lambda **kwargs: WNNPlus(NETWORK.params, **kwargs), "default_horizon", 3, 41),
    Argument(forecast(NETWORK), "horizon", 3, 41),
    Argument(forecast(CurveFit("linear")), "horizon", 3, 0),
    Argument(Drift, "snapshot_every", 3, 0),
    Argument(averaging.uniform, "start_step", 3, -1),
    Argument(averaging.uniform, "period", 3, 0),
    Argument(averaging.lawa, "size", 3, 0),
    Argument(lambda **kwargs: averaging.lawa(2, **kwargs), "period", 3, 0),
    Argument(lambda **kwargs: averaging.lawa(2, **kwargs), "start_step", 3, -1),
    Argument(averaging.WeightHistory, "period", 3, 0),
    Argument(lambda **kwargs: averaging.WeightHistory(period=1, **kwargs), "size", 3, 0),
    Argument(lambda **kwargs: averaging.WeightHistory(period=1, **kwargs), "start_step", 3, -1),
    Argument(make_subspace, "bits", 4, 3),
    Argument(split, "num_members", 3, 0),
    Argument(make_late_phase, "num_members", 3, 0),
    Argument(lambda member: late_phase.select_member(SPLIT, member), "member", 2, 3),
]
FLOATS = [
    Argument(nowcast, "scale", 1, float("inf")),  # pyright: ignore[reportArgumentType]
    Argument(Drift, "memory", 1, 0),
    Argument(Drift, "gain", 1, -1),
    Argument(Drift, "max_gain", 1, -1),
    Argument(Drift, "reach", 1, 0),
    Argument(averaging.ema, "decay", 0, 1),
    Argument(split, "noise_scale", 1, -1),
    Argument(make_late_phase, "base_gradient_scale", 1, float("-inf")),  # pyright: ignore[reportArgumentType]
    Argument(lambda **kwargs: late_phase.average_members(SPLIT, **kwargs), "epsilon", 1, -1),
]


def name_of(argument: Argument) -> str:
    return argument.name


# Numbers that are no finite floats, and numbers that are no integers.
NO_NUMBERS = [True, False, np.True_, float("nan"), np.float32("nan"), float("inf"), "3", b"3", (3,), [3], 3j]
NO_INTEGERS = [*NO_NUMBERS, 3.0, np.float32(3), np.array([3])]


@pytest.mark.parametrize("argument", INTS + FLOATS, ids=name_of)
def test_numbers_of_python_and_of_numpy_are_accepted(argument: Argument):
    floats = (float, np.float64, np.float32, np.float16) if argument in FLOATS else ()
    for of_type in (int, np.int64, np.int32, np.uint8, *floats):
        argument.make(**{argument.name: of_type(argument.good)})


@pytest.mark.parametrize("argument", INTS + FLOATS, ids=name_of)
def test_other_values_are_refused(argument: Argument):
    values, kind = (NO_INTEGERS, "(an int|one of)")
    if argument in FLOATS:
        values, kind = [*NO_NUMBERS, None, np.array([3.0])], "a finite float"
    for value in (*values, argument.out_of_range):
        with pytest.raises(ValueError, match=rf"{argument.name}={re.escape(repr(value))} must be {kind}.*: .*\.$"):
            argument.make(**{argument.name: value})


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_int("size", 0, "how many", minimum=1), "size=0 must be an int >= 1: how many."),
        (
            lambda: check_int("size", 9, "how many", minimum=1, maximum=8),
            "size=9 must be an int from 1 to 8: how many.",
        ),
        (lambda: check_float("rate", None, "how fast"), "rate=None must be a finite float: how fast."),
        (lambda: check_float("rate", 0, "how fast", above=0), "rate=0 must be a finite float > 0: how fast."),
        (
            lambda: check_float("rate", 1.0, "how fast", minimum=0, below=1),
            "rate=1.0 must be a finite float >= 0 and < 1: how fast.",
        ),
        (lambda: check_choice("kind", "c", ("a", "b"), "which one"), "kind='c' must be 'a' or 'b': which one."),
        (
            lambda: check_choice("kind", jnp.zeros(2), ("a", "b", "c"), "which one"),
            f"kind={jnp.zeros(2)!r} must be one of 'a', 'b', 'c': which one.",
        ),
        (lambda: check_choice("kind", 1, ("a",), "which one"), "kind=1 must be 'a': which one."),
        (lambda: check_bool("kind", 1, "whether"), "kind=1 must be True or False: whether."),
        *(
            (
                lambda dtype=dtype: check_float_dtype("dtype", dtype, "what in"),
                f"dtype={dtype!r} must be a floating-point dtype, such as jnp.bfloat16: what in.",
            )
            for dtype in (None, "int8", "no dtype", bool, jnp.complex64, 3)
        ),
    ],
)
def test_messages(check: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16", np.float32, jnp.dtype("float64")])
def test_floating_point_dtypes(dtype: Any):
    check_float_dtype("dtype", dtype, "what in")


def test_numbers_become_those_of_python():
    """NumPy's are no JSON, and would widen weights where 64 bits are enabled."""
    for nowcaster in (
        CurveFit("linear", chunk_size=np.int64(3)),  # pyright: ignore[reportArgumentType]
        WNNPlus(NETWORK.params, np.int32(3), np.int64(3)),  # pyright: ignore[reportArgumentType]
        Drift(gain=np.float32(0.5), snapshot_every=np.int64(3)),  # pyright: ignore[reportArgumentType]
    ):
        settings = {name: value for name, value in vars(nowcaster).items() if name != "params"}
        assert json.loads(json.dumps(settings)) == settings
    choice: Any = np.int64(4)
    assert type(check_choice("bits", choice, (2, 4), "how many")) is int
    assert type(check_float("rate", np.float32(0.5), "how fast")) is float
    with jax.enable_x64(True):
        tx: Any = averaging.ema(np.float64(0.5))  # pyright: ignore[reportArgumentType]
        params = jnp.ones(3, jnp.float32)
        _, state = tx.update(params, tx.init(params), params)
        assert state.average.dtype == jnp.float32


def test_injected_numbers():
    for value in (jnp.array(3), jnp.array(3, jnp.int16)):
        assert check_int("start", value, "when", minimum=10, or_injected=True) is value
        assert check_float("rate", value, "how fast", or_injected=True) is value
    for value in (jnp.array(3.0), jnp.array(True), jnp.array([3]), jnp.array(3j)):
        with pytest.raises(ValueError, match=r"start=.* must be an int >= 1"):
            check_int("start", value, "when", minimum=1, or_injected=True)
    for value in (jnp.array(3.0), jnp.array(3, jnp.bfloat16)):
        assert check_float("rate", value, "how fast", or_injected=True) is value
    for value, or_injected in ((jnp.array(3.0), False), (jnp.array(True), True), (jnp.array(3j), True)):
        with pytest.raises(ValueError, match=r"rate=.* must be a finite float"):
            check_float("rate", value, "how fast", or_injected=or_injected)
    with pytest.raises(ValueError, match=r"start=.* must be an int >= 1"):
        check_int("start", jnp.array(3), "when", minimum=1)
