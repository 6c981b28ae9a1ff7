from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wnn_jax
from tests import reference
from tests.helpers import assert_close, random_history, random_leaves, train
from wnn_jax._roles import ROLES
from wnn_jax.nowcasters import Introspection


@pytest.fixture(scope="module")
def nowcaster() -> Introspection:
    return Introspection(random_leaves(Introspection.init(jax.random.key(0)).params, seed=0))


def test_agrees_with_the_reference(nowcaster: Introspection):
    history = random_history((3, 5, 7))[:4]
    predicted = nowcaster(history, "conv")
    expected = reference.introspection([np.asarray(snapshot, np.float64) for snapshot in history], nowcaster.params)
    assert_close(predicted, expected)
    assert np.abs(predicted - history[-1]).max() > 0.1


def test_it_has_forty_hidden_units_and_four_inputs(nowcaster: Introspection):
    assert nowcaster.params["hidden"]["kernel"].shape == (4, 40)
    assert nowcaster.params["output"]["kernel"].shape == (40, 1)


def test_all_roles_are_forecast_alike_and_chunk_by_chunk(nowcaster: Introspection):
    history = [dict.fromkeys(ROLES, snapshot) for snapshot in random_history((40,))[:4]]
    predicted = nowcaster(history, {role: role for role in ROLES})
    in_chunks = Introspection(nowcaster.params, chunk_size=16)(history, {role: role for role in ROLES})
    for role in ROLES:
        np.testing.assert_array_equal(predicted[role], predicted["conv"])
        assert_close(in_chunks[role], predicted[role], rtol=1e-6)


def test_a_forecast_is_of_the_size_of_the_moves_so_far(nowcaster: Introspection):
    history = random_history((40,))[:4]
    change = nowcaster([snapshot - history[0] for snapshot in history], "dense")
    tiny = nowcaster([1e-9 * (snapshot - history[0]) for snapshot in history], "dense")
    np.testing.assert_allclose(1e9 * tiny, change, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(nowcaster([history[0]] * 4, "dense"), history[0])


def test_low_precision_leaves_are_forecast_in_float32(nowcaster: Introspection):
    history = random_history((6,), jnp.bfloat16)[:4]
    predicted = nowcaster(history, "dense")
    in_float32 = nowcaster([snapshot.astype(jnp.float32) for snapshot in history], "dense")
    np.testing.assert_array_equal(predicted, in_float32.astype(jnp.bfloat16))


def test_a_training_jumps_at_every_eleventh_visit(nowcaster: Introspection):
    params = {"Dense_0": {"kernel": jnp.ones((3, 2))}}
    steps = train(wnn_jax.nowcast(nowcaster, snapshot_every=1), params, 23, gradient=lambda tree: tree)
    assert [t for t, step in enumerate(steps) if t and step.state.last_nowcast == t] == [10, 21]
    # The update of the eleventh step is as long as the parameters are.
    window = [*(steps[t].params for t in (0, 4, 7)), jax.tree.map(lambda leaf: 2 * leaf, steps[9].params)]
    forecast = nowcaster(window, {"Dense_0": {"kernel": "dense"}})
    np.testing.assert_allclose(steps[10].params["Dense_0"]["kernel"], forecast["Dense_0"]["kernel"], rtol=1e-6)


def test_what_cannot_be_used_is_refused(nowcaster: Introspection):
    with pytest.raises(ValueError, match="horizon=3 was given, but Introspection takes none"):
        nowcaster(random_history((4,))[:4], "conv", 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"history has 5 snapshots .* context=4"):
        nowcaster(random_history((4,)), "conv")
    wider: Any = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), nowcaster.params)
    others: list[Any] = [wider, nowcaster.params["hidden"], {}, jnp.zeros(3)]
    for other in others:
        with pytest.raises(ValueError, match="params are not the parameters of an IntrospectionNetwork"):
            Introspection(other)
    with pytest.raises(ValueError, match=r"chunk_size=0 must be an int >= 1"):
        Introspection(nowcaster.params, chunk_size=0)
