from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax


def test_leafwise_passes_each_leaf_with_its_role_and_the_horizon():
    def shift(history: Any, role: str, horizon: Any) -> Any:
        assert len(history) == 3
        return history[0] + horizon if role == "dense" else history[-1] - horizon

    nowcaster = wnn_jax.leafwise(shift, context=3)
    history = [{"a": jnp.full([2, 2], i), "b": jnp.full([2], 10.0 * i)} for i in (1.0, 2.0, 3.0)]
    prediction = nowcaster(history, {"a": "dense", "b": "bias"}, 5)
    np.testing.assert_array_equal(prediction["a"], np.full([2, 2], 6.0))
    np.testing.assert_array_equal(prediction["b"], np.full([2], 25.0))
    assert isinstance(nowcaster, wnn_jax.Nowcaster)
    assert nowcaster.context == 3


def test_leafwise_leaves_other_roles_alone_and_keeps_dtypes():
    nowcaster = wnn_jax.leafwise(lambda history, role, horizon: jnp.float32(9.0), context=1, roles=["bias"])
    history = [{"scale": jnp.ones([], jnp.bfloat16), "bias": jnp.ones([], jnp.bfloat16)}]
    prediction = nowcaster(history, {"scale": "norm", "bias": "bias"}, None)
    assert (prediction["scale"], prediction["bias"]) == (1.0, 9.0)
    assert prediction["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["linear", "power"])
def test_histories_may_be_numpy_arrays(name: str):
    history = [np.arange(4.0) * step for step in range(5)]
    assert history[0].dtype == np.float64
    nowcaster: Any = wnn_jax.load(name)
    np.testing.assert_allclose(nowcaster(history, "bias", None), np.arange(4.0) * 9, rtol=1e-5)


def test_wrong_number_of_snapshots():
    with pytest.raises(ValueError, match="history has 4 snapshots but this nowcaster has context=5"):
        wnn_jax.leafwise(lambda history, role, horizon: history[-1])([jnp.ones(2)] * 4, "bias", None)


@pytest.mark.parametrize("context", [0, -1, 2.0, True])
def test_bad_context(context: Any):
    with pytest.raises(ValueError, match=rf"context={context!r} must be an int >= 1: the number of snapshots"):
        wnn_jax.leafwise(lambda history, role, horizon: history[-1], context=context)


def test_unknown_role():
    with pytest.raises(ValueError, match=r"roles=\['attention'\] are unknown; choose from conv, dense"):
        wnn_jax.leafwise(lambda history, role, horizon: history[-1], roles=["attention", "conv"])
