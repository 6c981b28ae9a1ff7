"""What `nowcast` takes and refuses: dtypes, roles, arguments and trees of parameters; and its metrics."""

import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from tests.helpers import WINDOWS, assert_trees_equal, last_plus_one, network_params, ones_like, train

JUMP = 2.0  # of `last_plus_one`, where the ordinary update is 1


# Dtypes.


@pytest.mark.slow_but(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_frozen_weight_stays_put(wnn: wnn_jax.nowcasters.WNN, dtype: Any):
    # A new network forecasts no change for a weight that did not move; a trained one, whose biases are not 0, does.
    biased = wnn_jax.nowcasters.WNN(jax.tree.map(lambda leaf: leaf + 0.1, wnn.params))
    is_frozen = jnp.arange(16) % 2 == 0
    params = {"Dense_0": {"bias": jnp.linspace(-1e-3, 1e-3, 16, dtype=dtype)}}
    tx = optax.chain(optax.sgd(0.1), wnn_jax.nowcast(biased, snapshot_every=1))
    steps = train(
        tx,
        params,
        5,
        gradient=lambda tree: jax.tree.map(lambda p: jnp.where(is_frozen, 0, p - 1).astype(dtype), tree),
    )
    assert steps[-1].state[1].num_nowcasts == 1

    start, before, after = (tree["Dense_0"]["bias"] for tree in (params, steps[3].params, steps[4].params))
    assert (after == start)[is_frozen].all()
    assert (after != before)[~is_frozen].all()
    prediction = biased([params] * 5, wnn_jax.default_roles(params))["Dense_0"]["bias"]
    assert (prediction != start).any(), "the network held the weights by itself"


@pytest.mark.slow_but(2)
@pytest.mark.parametrize("nowcaster", WINDOWS, indirect=True)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_are_those_of_the_parameters(nowcaster: str | wnn_jax.Nowcaster, dtype: Any):
    tx = optax.chain(optax.sgd(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=1))
    steps = train(tx, network_params(dtype), 6)
    for step in steps:
        for tree in (step.updates, step.params, step.state[1].history):
            assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    assert steps[-1].state[1].num_nowcasts == 1


@pytest.mark.slow_but(3)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("update_dtype", ["same", "float32"])
def test_parameters_arrive_at_the_forecast(dtype: Any, update_dtype: str):
    random = np.random.default_rng(2)
    params = {"w": jnp.asarray(random.normal(size=4000), dtype)}
    factor = jnp.asarray(random.uniform(0.5, 4, size=4000))
    forecast = wnn_jax.leafwise(lambda history, role, horizon: history[-1] * factor, context=1)
    half = jax.tree.map(lambda leaf: leaf / 2, params)
    update = {"w": half["w"].astype(dtype if update_dtype == "same" else update_dtype)}
    tx = wnn_jax.nowcast(forecast, snapshot_every=1, horizon=100)
    (step,) = train(tx, half, 1, gradient=lambda _: update)

    def ordinal(x: jax.Array) -> np.ndarray:
        """Neighbouring floats of one sign have neighbouring ordinals."""
        return np.asarray(x).view(f"int{8 * x.dtype.itemsize}").astype(np.int64)

    miss = np.abs(ordinal(step.params["w"]) - ordinal((params["w"] * factor).astype(dtype)))
    if update["w"].dtype == dtype:
        assert miss.max() <= 1
        assert (miss > 0).mean() < 0.2
    else:
        # The difference of two narrow floats is exact in a wider one.
        assert miss.max() == 0


# Roles.


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (None, {"kernel": JUMP, "bias": 1}),
        ({"kernel": "norm", "bias": "dense"}, {"kernel": 1, "bias": JUMP}),
        (lambda params: dict.fromkeys(params, "dense"), {"kernel": JUMP, "bias": JUMP}),
    ],
)
def test_a_leaf_jumps_if_its_role_is_the_nowcasters(roles: Any, expected: dict[str, float]):
    only_dense = wnn_jax.leafwise(lambda history, role, horizon: history[-1] + 1, context=2, roles=["dense"])
    params = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
    steps = train(wnn_jax.nowcast(only_dense, snapshot_every=1, roles=roles), params, 2, gradient=ones_like)
    assert_trees_equal(steps[1].updates, {name: jnp.full_like(p, expected[name]) for name, p in params.items()})


# Bad arguments.


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("stop", [2, 3], "must be greater than start=3; pass stop=None"),
        ("history_memory_kind", ["device", "disk", 1], "must be 'pinned_host': .* or None"),
        ("history_dtype", [jnp.int8, bool, "four", jnp.complex64, 16], "must be a floating-point dtype, such as jnp"),
        ("average", [1.0, -0.1, float("nan"), True, "0.9"], "must be a finite float >= 0 and < 1"),
    ],
)
def test_arguments_out_of_their_range_are_refused(name: str, values: Sequence[Any], message: str):
    for value in values:
        arguments: Any = {"snapshot_every": 1, "start": 3 if "start=3" in message else 0, name: value}
        with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))} {message}"):
            wnn_jax.nowcast("linear", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nowcaster": "linear"}, r"snapshot_every=None: CurveFit forecasts from a window .* no spac.*num_steps // 30"),
        ({"horizon": 10}, r"horizon=10 was given, but Drift .* has no horizon. Leave horizon out"),
        ({"nowcaster": "wnn", "horizon": 10, "snapshot_every": 1}, r"horizon=10 .* WNN takes none.*Leave horizon out"),
        ({"average": 0.9}, r"average=0\.9 was given, but Drift goes by a drift"),
    ],
)
def test_arguments_that_do_not_fit_the_nowcaster_are_refused(arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        wnn_jax.nowcast(**arguments)


NOT_CALLABLE = types.SimpleNamespace(context=5)


@pytest.mark.parametrize(
    "value",
    [3, None, lambda *_: None, NOT_CALLABLE, wnn_jax.nowcasters.Drift, wnn_jax.nowcasters.WNN],
)
def test_what_is_no_nowcaster_is_refused(value: Any):
    with pytest.raises(ValueError, match=rf"nowcaster={re.escape(repr(value))} is not a nowcaster.*Drift.*leafwise"):
        wnn_jax.nowcast(value, snapshot_every=1)


@pytest.mark.slow_but(5)
@pytest.mark.parametrize("nowcaster", ["linear", "drift"])
@pytest.mark.parametrize(
    ("num_steps", "start", "stop"), [(10, 0, None), (49, 0, None), (1000, 0, 30), (100, 55, None), (100, 33, 72)]
)
def test_a_training_without_a_jump_is_refused_with_a_spacing_that_has_one(
    nowcaster: str, num_steps: int, start: int, stop: int | None
):
    def build(snapshot_every: int) -> Any:
        return wnn_jax.nowcast(nowcaster, snapshot_every=snapshot_every, num_steps=num_steps, start=start, stop=stop)

    with pytest.raises(ValueError, match=rf"snapshot_every=50 is too large for num_steps={num_steps}: .*") as refusal:
        build(50)
    (spacing,) = map(int, re.findall(r"Pass a spacing of at most (\d+), or train for longer\.$", str(refusal.value)))
    steps = train(build(spacing), {"w": jnp.zeros([])}, num_steps, gradient=ones_like)
    assert steps[-1].state.num_nowcasts >= 1
    # And it is about as large as it can be.
    with pytest.raises(ValueError, match="is too large"):
        build(2 * spacing)


@pytest.mark.parametrize(("nowcaster", "shortest"), [("linear", 5), ("drift", 2)])
def test_a_training_run_too_short_for_any_jump_is_refused(nowcaster: str, shortest: int):
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=1, num_steps=shortest)
    assert train(tx, {"w": jnp.zeros([])}, shortest, gradient=ones_like)[-1].state.num_nowcasts == 1
    with pytest.raises(
        ValueError, match=rf"num_steps={shortest - 1}: .* from 0 to {shortest - 1}. Train for longer\.$"
    ):
        wnn_jax.nowcast(nowcaster, snapshot_every=1, num_steps=shortest - 1)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.complex64, jnp.bool_])
def test_parameters_that_are_not_real_floats_are_named(dtype: Any):
    params = {"layer": {"w": jnp.zeros(2), "table": jnp.zeros(2, dtype)}}
    message = rf"dtype {jnp.dtype(dtype)} at \['layer'\]\['table'\].*optax.masked or optax.partition"
    with pytest.raises(ValueError, match=message):
        wnn_jax.nowcast(snapshot_every=1).init(params)


def test_update_needs_params():
    tx = wnn_jax.nowcast(snapshot_every=1)
    params = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match="params") as optax_error:
        optax.chain(optax.scale_by_trust_ratio()).update(params, (optax.EmptyState(),))
    with pytest.raises(ValueError, match=re.escape(str(optax_error.value))):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    ("predict", "returned"),
    [
        (lambda tree: {"w": tree["w"][:1]}, r"\{'w': \(1,\)\}"),
        (lambda tree: {"w": tree["w"][None]}, r"\{'w': \(1, 2\)\}"),
        (lambda tree: tree["w"], r"\(2,\)"),
    ],
)
def test_a_nowcaster_that_returns_another_tree_is_refused(predict: Callable[[Any], Any], returned: str):
    class Changed:
        context = 5

        def __call__(self, history: Sequence[Any], roles: Any, horizon: Any) -> Any:
            return predict(history[-1])

    with pytest.raises(ValueError, match=rf"returned the shapes {returned}.*shapes \{{'w': \(2,\)\}}.*like the param"):
        train(wnn_jax.nowcast(Changed(), snapshot_every=1), {"w": jnp.zeros(2)}, 1)


# Trees of other makes.


@jax.tree_util.register_pytree_node_class
class Weights:
    """A node that, unlike a dict, is equal only to itself."""

    def __init__(self, w: Any) -> None:
        self.w = w

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any]) -> "Weights":
        return cls(*children)


@pytest.mark.parametrize(
    "make", [lambda w: w, lambda w: [w], lambda w: (w, None), Weights, lambda w: {"a": {}, "b": {"c": w}}]
)
def test_parameters_of_any_tree(make: Callable[[Any], Any]):
    steps = train(wnn_jax.nowcast(last_plus_one(), snapshot_every=1), make(jnp.zeros([])), 5, gradient=ones_like)
    assert jax.tree.leaves(steps[-1].params) == [6]


@pytest.mark.parametrize("params", [1.0, np.ones(3, np.float32)])
def test_parameters_that_are_not_yet_arrays_of_jax(params: Any):
    steps = train(wnn_jax.nowcast(last_plus_one(), snapshot_every=1), params, 5, gradient=ones_like)
    assert steps[-1].state.num_nowcasts == 1
    np.testing.assert_array_equal(steps[-1].params, params + 6)


def test_no_parameters_at_all():
    (step,) = train(wnn_jax.nowcast(last_plus_one(), snapshot_every=1), {}, 1)
    assert step.updates == {}


# Metrics.

PARAMS = {"encoder": jnp.array([1.0, 2.0]), "decoder": jnp.array([3.0])}
COUNTS = ("num_nowcasts", "num_rejected", "num_cut", "num_restarts", "num_misplaced")
NAMES = {*COUNTS, "steps_since_nowcast", "last_size"}


def chain(**options: Any) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.clip(10.0), wnn_jax.nowcast("linear", snapshot_every=1, **options))


def test_metrics_are_those_of_the_jumps():
    steps = train(chain(), PARAMS, 12, gradient=ones_like)
    found = [jax.tree.map(float, wnn_jax.metrics(step.state)) for step in steps]
    assert set(found[0]) == NAMES
    assert [values["num_nowcasts"] for values in found] == [0] * 4 + [1] * 5 + [2] * 3
    assert [values["steps_since_nowcast"] for values in found] == [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    # At step 5 the parameters are [6, 7, 8], and all move on by 5.
    size = np.linalg.norm([5, 5, 5]) / np.linalg.norm([6, 7, 8])
    sizes = [values["last_size"] for values in found]
    np.testing.assert_allclose(sizes, np.repeat([0.0, float(size), sizes[-1]], [4, 5, 3]), rtol=1e-6)


@pytest.mark.parametrize(("nowcaster", "scale"), [("linear", 0.5), ("slow-drift", -2.0)])
def test_the_size_of_a_jump_is_that_of_what_was_added(nowcaster: str, scale: float):
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=5, scale=scale)
    *_, last = train(tx, PARAMS, 25, gradient=ones_like)
    after = jax.tree.map(lambda param, update: param - update + 1, last.params, last.updates)
    length = {name: last.params[name] - after[name] for name in PARAMS}
    expected = optax.tree.norm(length) / optax.tree.norm(after)
    np.testing.assert_allclose(wnn_jax.metrics(last.state)["last_size"], expected, rtol=1e-5)


def test_metrics_of_several_nowcasts_have_the_places_of_their_states():
    labels = {"encoder": "fast", "decoder": "slow"}
    tx = optax.partition({"fast": chain(), "slow": chain(start=3)}, labels)
    steps = train(tx, PARAMS, 6, gradient=ones_like)
    counts = {name: int(value) for name, value in wnn_jax.metrics(steps[-1].state).items() if "num_nowcasts" in name}
    assert counts == {
        "inner_states/fast/inner_state/1/num_nowcasts": 1,
        "inner_states/slow/inner_state/1/num_nowcasts": 0,
    }
    assert len(wnn_jax.metrics(steps[-1].state)) == 2 * len(NAMES)


def test_metrics_are_made_inside_of_jit():
    tx = chain()
    traced = jax.jit(wnn_jax.metrics)(tx.init(PARAMS))
    assert {name: value.shape for name, value in traced.items()} == dict.fromkeys(NAMES, ())


def test_a_state_without_a_nowcast_is_refused():
    with pytest.raises(ValueError, match=r"opt_state of the type tuple has no state of wnn_jax.nowcast"):
        wnn_jax.metrics(optax.adam(1e-3).init(PARAMS))


@pytest.mark.parametrize(
    ("nowcaster", "scopes"), [("slow-drift", {"visit", "forecast"}), ("linear", {"record", "jump", "forecast"})]
)
def test_a_profiler_finds_named_scopes(nowcaster: str, scopes: set[str]):
    tx = wnn_jax.nowcast(nowcaster, snapshot_every=2)
    text = jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS), PARAMS).as_text(debug_info=True)
    names = {name for line in text.splitlines() if "/nowcast/" in line for name in line.split("/")}
    assert scopes <= names
