from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal
from wnn_jax.averaging import update_batch_stats


class Network(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(nn.Dense(4)(x))
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(2)(nn.relu(x)))


def make(momentum: float) -> tuple[Network, Any]:
    network = Network(momentum)
    return network, network.init(jax.random.key(0), jnp.zeros([1, 3]), train=False)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_they_are_the_means_of_those_of_the_batches(momentum: float):
    network, variables = make(momentum)
    before = jax.tree.map(jnp.copy, variables)
    random = np.random.default_rng(0)
    batches = [jnp.asarray(random.normal(2, 3, (size, 3)), jnp.float32) for size in (20, 20, 10)]
    updated = update_batch_stats(network.apply, variables, iter(batches), train=True)
    dense = variables["params"]["Dense_0"]
    outputs = [np.asarray(batch @ dense["kernel"] + dense["bias"][None]) for batch in batches]
    for name, statistic in (("mean", np.mean), ("var", np.var)):
        expected = np.average([statistic(output, axis=0) for output in outputs], axis=0, weights=[20, 20, 10])
        np.testing.assert_allclose(updated["batch_stats"]["BatchNorm_0"][name], expected, rtol=1e-3)
    assert_trees_equal(variables, before)
    assert_trees_equal(updated["params"], variables["params"])


def test_what_gives_no_statistics_is_refused():
    network, variables = make(0.9)
    batches = [jnp.ones([4, 3])]
    with pytest.raises(ValueError, match="batches is empty"):
        update_batch_stats(network.apply, variables, [], train=True)
    with pytest.raises(ValueError, match=r"variables has the collections \['params'\], and no batch_stats"):
        update_batch_stats(network.apply, {"params": variables["params"]}, batches, train=True)
    with pytest.raises(ValueError, match=r"leaves batch_stats as they are with the options {'train': False}"):
        update_batch_stats(network.apply, variables, batches, train=False)
