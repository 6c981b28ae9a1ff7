"""What holds for every class of nowcasters that can be saved."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests.helpers import assert_dots_are_precise, network_params
from wnn_jax._roles import ROLES
from wnn_jax._store import fingerprint
from wnn_jax.nowcasters import CLASSES, CURVES, WNN, CurveFit, Drift
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster
from wnn_jax.nowcasters.wnn import TwoStreamNetwork


def make(name: str, seed: int = 0) -> Any:
    if name in ("CurveFit", "Drift"):
        return CurveFit("sigmoid") if name == "CurveFit" else Drift(gain=0.01)
    cls: Any = CLASSES[name]
    sizes = {"WNN": {}, "NiNo": {"width": 8}}.get(name, {"width": 8, "num_hidden": 2})
    return cls.init(jax.random.key(seed), **sizes)


@pytest.fixture(scope="module", params=CLASSES)
def nowcaster(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def test_classes_are_exported_under_their_names():
    assert {name: getattr(wnn_jax.nowcasters, name) for name in CLASSES} == CLASSES


def test_they_can_be_saved_and_loaded(nowcaster: Any, tmp_path: Path):
    wnn_jax.save(nowcaster, tmp_path / "it.npz")
    loaded: Any = wnn_jax.load(tmp_path / "it.npz")
    assert type(loaded) is type(nowcaster)
    assert loaded.roles == nowcaster.roles
    assert isinstance(nowcaster.roles, tuple)
    assert set(nowcaster.roles) <= set(ROLES)
    assert fingerprint(loaded) == fingerprint(nowcaster) == fingerprint(make(type(nowcaster).__name__))
    assert len(fingerprint(nowcaster)) == 64
    assert set(fingerprint(nowcaster)) <= set("0123456789abcdef")


# repr


def test_a_repr_is_one_short_line(nowcaster: Any):
    text = repr(nowcaster)
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(getattr(nowcaster, "params", ())))
    assert text.startswith(f"{type(nowcaster).__name__}(")
    if not isinstance(nowcaster, Drift):
        assert text.endswith(f"{num_weights:,} weights, context={nowcaster.context})")
    assert "\n" not in text
    assert len(text) < 120


def momentum(history: Any, role: str, horizon: Any) -> jax.Array:
    return 2 * history[-1] - history[-2]


def test_a_repr_tells_what_differs():
    assert repr(CurveFit("power")) == "CurveFit(kind='power', 0 weights, context=5)"
    assert repr(Drift(gain=0.01)).startswith("Drift(spectral=True, memory=0.1, gain=0.01, ")
    assert repr(wnn_jax.leafwise(momentum, context=2)) == "Leafwise(fn='momentum', 0 weights, context=2)"


# Fingerprints


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"CurveFit", "Drift"}))
def test_networks_are_drawn_from_their_key(name: str):
    assert fingerprint(make(name, seed=1)) != fingerprint(make(name))


def test_the_order_of_the_weights_and_the_record_are_no_part_of_a_fingerprint(wnn: WNN):
    assert fingerprint(WNN({role: wnn.params[role] for role in reversed(wnn.roles)})) == fingerprint(wnn)
    assert fingerprint(WNN(wnn.params, record={"steps": 3})) == fingerprint(wnn)
    # Nor need it be one that can be saved.
    assert fingerprint(WNN(wnn.params, record={"loss": jnp.zeros(2)})) == fingerprint(wnn)


def test_everything_else_is_part_of_a_fingerprint(wnn: WNN, wnn_plus: wnn_jax.nowcasters.WNNPlus):
    one_weight = jax.tree.map(jnp.copy, dict(wnn.params))
    one_weight["conv"]["output"]["bias"] = one_weight["conv"]["output"]["bias"] + 1e-6
    others = [
        wnn,
        WNN(one_weight),
        WNN({"conv": wnn.params["dense"], "dense": wnn.params["conv"], "bias": wnn.params["bias"]}),
        WNN({"dense": wnn.params["dense"]}),
        WNN(wnn.params, published_bias=True),
        WNN(wnn.params, chunk_size=64),
        wnn_plus,
        type(wnn_plus)(wnn_plus.params, default_horizon=6),
        *(CurveFit(kind) for kind in CURVES),
        CurveFit("linear", chunk_size=1),
        Drift(),
        Drift(spectral=False),
        Drift(snapshot_every=3),
    ]
    assert len({fingerprint(nowcaster) for nowcaster in others}) == len(others)


def test_code_has_no_fingerprint():
    with pytest.raises(
        ValueError, match=r"cannot be given a fingerprint: its class is none of WNN.*leafwise\) is code"
    ):
        fingerprint(wnn_jax.leafwise(momentum, context=2))
    other: Any = type("WNN", (WNN,), {})  # A file could not tell it from the class of this name.
    with pytest.raises(ValueError, match="its class is none of"):
        fingerprint(other.init(jax.random.key(0)))


# Precision


def test_matrix_products_of_a_forecast_are_of_the_highest_precision(nowcaster: Any):
    params = network_params()
    roles = wnn_jax.default_roles(params)
    if isinstance(nowcaster, Drift):
        settings: Any = {"memory": 31.0, "snapshot_every": 10}
        assert_dots_are_precise(lambda mean: nowcaster.jump(mean, params, roles, **settings), params)
    else:
        assert_dots_are_precise(lambda *history: nowcaster(history, roles, None), *[params] * nowcaster.context)


def test_those_of_a_network_in_training_too(wnn: WNN, nowcaster: Any):
    if isinstance(nowcaster, MultiHorizonNowcaster):
        history = tuple(np.arange(4, dtype=np.float32) * t for t in range(5))
        statistics = nowcaster.statistics(history)
        assert_dots_are_precise(lambda *h: nowcaster.changes(h, statistics, jnp.array(0)), *history)
    elif isinstance(nowcaster, WNN):
        network = TwoStreamNetwork()
        assert_dots_are_precise(lambda x: network.apply({"params": wnn.params["conv"]}, x), jnp.zeros((4, 5)))
