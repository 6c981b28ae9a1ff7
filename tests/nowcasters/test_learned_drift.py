import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import wnn_jax
from tests.helpers import (
    COLLECTIVES,
    Step,
    assert_dots_are_precise,
    assert_trees_close,
    assert_trees_equal,
    random_leaves,
    train,
)
from wnn_jax._nowcaster import Motion, is_drift
from wnn_jax._store import fingerprint
from wnn_jax.nowcasters import Drift, LearnedDrift

# Of every role, and of ranks 0 to 4.
SHAPES: dict[str, Any] = {
    "Conv_0": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "LayerNorm_0": {"scale": (8,)},
    "Dense_0": {"kernel": (8, 5), "bias": (5,)},
    "Embed_0": {"embedding": (11, 8)},
    "temperature": (),
}
PARAMS = random_leaves(
    jax.tree.map(lambda shape: np.zeros(shape), SHAPES, is_leaf=lambda node: isinstance(node, tuple)), seed=1
)
ROLES = wnn_jax.default_roles(PARAMS)
ALL = LearnedDrift.roles
TARGET = random_leaves(PARAMS, seed=2)


def gradient(params: Any) -> Any:
    """Of a quadratic of very different curvatures."""
    return jax.tree.map(lambda param, target: jnp.exp(3 * jnp.sin(9 * target)) * (param - target), params, TARGET)


def train_with(nowcaster: Any, num_steps: int = 60) -> list[Step]:
    tx = optax.chain(optax.adam(1e-2), wnn_jax.nowcast(nowcaster))
    return train(tx, PARAMS, num_steps, gradient=gradient)


def motion(num_means: int = 3, *, scale: float = 1.0, step: int = 500, num_steps: int | None = None) -> Motion:
    displacement, *means = (
        jax.tree.map(lambda leaf: 1e-3 * scale * leaf, random_leaves(PARAMS, seed=3 + i)) for i in range(1 + num_means)
    )
    params = jax.tree.map(lambda leaf: scale * leaf, PARAMS)
    return Motion(tuple(means), displacement, params, jnp.int32(step), 10, num_steps)


def jump_of(nowcaster: Any, motion: Motion) -> Any:
    return jax.jit(lambda motion: nowcaster(motion, ROLES))(motion)


def random_drift(num_means: int = 3, **rule: Any) -> LearnedDrift:
    """Of which no weight of the network is zero."""
    nowcaster = LearnedDrift.init(jax.random.key(0), num_means=num_means, **rule)
    return dataclasses.replace(nowcaster, params=random_leaves(nowcaster.params, seed=0))


def with_outputs(names: Any, *outputs: float, **rule: Any) -> LearnedDrift:
    """One whose network chooses the same for every tensor of some roles, and for all others what the rule does."""
    nowcaster = LearnedDrift.init(jax.random.key(0), **rule)
    kernel = np.zeros_like(nowcaster.params["linear"]["kernel"])
    for name in names:
        kernel[nowcaster.features.index(name), : len(outputs)] = outputs
    return dataclasses.replace(nowcaster, params={**nowcaster.params, "linear": {"kernel": jnp.asarray(kernel)}})


# As the rule


@pytest.mark.slow
@pytest.mark.parametrize(("num_means", "rule"), [(3, {}), (2, {"spectral": False, "gain": 0.02})])
def test_it_begins_as_the_rule_bit_for_bit(num_means: int, rule: dict[str, Any]):
    steps = train_with(LearnedDrift.init(jax.random.key(0), num_means=num_means, **rule))
    expected = train_with(Drift(**rule))
    for actual, step in zip(steps, expected, strict=True):
        assert_trees_equal(actual.params, step.params)
    assert int(steps[-1].state[1].num_nowcasts) == 5


def test_it_is_a_drift_with_the_spacing_and_the_first_memory_of_its_rule():
    nowcaster = LearnedDrift.init(jax.random.key(0), snapshot_every=7, memory=0.2)
    assert is_drift(nowcaster)
    assert nowcaster.snapshot_every == 7
    memories = nowcaster.memories(jnp.int32(1_000), 7)
    assert memories[0] == Drift(memory=0.2).memories(jnp.int32(1_000), 7)[0]
    assert [float(memory) for memory in memories] == pytest.approx([218, 78, 618])


# What the network chooses


@pytest.mark.slow_but(2)
@pytest.mark.parametrize(
    ("output", "log_factor"), [(1e6, 1.5), (-1e6, -1.5), (0.5, 1.5 * np.tanh(0.5))], ids=["most", "least", "between"]
)
def test_the_factor_is_bounded(output: float, log_factor: float):
    slow = {"spectral": False}
    expected = jax.tree.map(lambda leaf: np.float32(np.exp(log_factor)) * leaf, jump_of(Drift(**slow), motion(1)))
    assert_trees_close(jump_of(with_outputs(ALL, output, **slow), motion()), expected, atol=1e-8)


@pytest.mark.slow
def test_no_share_of_the_orthogonalised_direction_leaves_the_mean():
    jump = jump_of(with_outputs(ALL, 0.0, -1.0), motion())
    assert_trees_close(jump, jump_of(Drift(spectral=False), motion(1)), atol=1e-8)


def test_coefficients_mix_the_means():
    first, shorter, longer = motion().means
    mixed = jax.tree.map(lambda a, b, c: a + np.tanh(0.4) * (b - a) - np.tanh(0.2) * (c - a), first, shorter, longer)
    expected = jump_of(Drift(), motion(1)._replace(means=(mixed,)))
    assert_trees_close(jump_of(with_outputs(ALL, 0.0, 0.0, 0.4, -0.2), motion()), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_tensors_of_different_roles_go_different_ways():
    jump = jump_of(with_outputs(("conv",), 1.0, spectral=False), motion())
    expected = jump_of(Drift(spectral=False), motion(1))
    expected["Conv_0"]["kernel"] *= np.exp(1.5 * np.tanh(1.0))
    assert_trees_close(jump, expected, atol=1e-8)


# What it is told


def test_inputs_do_not_depend_on_the_scale_of_the_weights():
    nowcaster = random_drift()
    small, large = (jax.jit(lambda told: nowcaster.inputs(told, ROLES))(motion(scale=scale)) for scale in (1e-3, 1e3))
    np.testing.assert_allclose(small, large, atol=1e-4)
    assert small.shape == (len(jax.tree.leaves(PARAMS)), len(nowcaster.features))


def test_inputs_are_what_they_are_called():
    nowcaster = random_drift()
    told = motion(step=500, num_steps=2_000)
    inputs = np.asarray(jax.jit(lambda told: nowcaster.inputs(told, ROLES))(told))
    row = dict(zip(nowcaster.features, inputs[jax.tree.leaves(ROLES).index("conv")], strict=True))
    mean, shorter, displacement, param = (
        np.asarray(tree["Conv_0"]["kernel"], np.float64).ravel()
        for tree in (told.means[0], told.means[1], told.displacement, told.params)
    )
    norm = np.linalg.norm
    expected = {
        "conv": 1.0,
        "dense": 0.0,
        "log step": (np.log(501) - 6) / 3,
        "has length": 1.0,
        "progress": 0.25,
        "rank": 2.0,
        "log rows": np.log(36) / 2 - 2,
        "log columns": np.log(8) / 2 - 2,
        "alignment": displacement @ mean / norm(displacement) / norm(mean),
        "signal": np.log(norm(mean) / norm(displacement) * np.sqrt(71 / 10)),
        "speed": (np.log(norm(mean) / norm(param)) + 6) / 3,
        "alignment with shorter": shorter @ mean / norm(shorter) / norm(mean),
        "shorter beside mean": np.log(norm(shorter) / norm(mean)),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_inputs_are_finite_where_nothing_moves():
    still = jax.tree.map(jnp.zeros_like, motion())._replace(snapshot_every=10)
    nowcaster = random_drift()
    assert np.all(np.isfinite(jax.jit(lambda told: nowcaster.inputs(told, ROLES))(still)))
    assert_trees_equal(jump_of(nowcaster, still), jax.tree.map(jnp.zeros_like, PARAMS))


def test_matrix_products_are_of_the_highest_precision():
    nowcaster = random_drift(spectral=False)
    assert_dots_are_precise(lambda m: nowcaster.network_outputs(m, ROLES), motion())


def test_parameters_without_any_leaf_stay():
    empty = Motion(({}, {}, {}), {}, {}, jnp.int32(500), 10, None)
    assert random_drift()(empty, {}) == {}


def test_sharded_tensors_exchange_nothing_but_numbers():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    one = jax.device_put(jnp.linspace(-1.0, 1.0, 128).reshape(16, 8), sharding)
    trees = [{"kernel": one * factor} for factor in (1.0, 0.1, 0.2, -0.3)]
    told = Motion(tuple(trees[1:]), trees[1], trees[0], jnp.int32(500), 10, None)
    compiled = jax.jit(lambda told: random_drift()(told, {"kernel": "dense"})).lower(told).compile()
    text = compiled.as_text() or ""
    assert not [name for name in COLLECTIVES if name in text and name != "all-reduce"]
    sums = [line.split(" all-reduce(")[0].split(" = ")[1] for line in text.splitlines() if " all-reduce(" in line]
    assert sums
    assert not [shapes for shapes in sums if re.search(r"\[\d+,\d+\]", shapes)]
    assert compiled(told)["kernel"].sharding.is_equivalent_to(sharding, 2)


# Files


def test_it_can_be_saved_and_loaded(tmp_path: Path):
    nowcaster = dataclasses.replace(random_drift(2, gain=0.02), record={"generations": 3})
    wnn_jax.save(nowcaster, tmp_path / "it.npz")
    loaded: Any = wnn_jax.load(tmp_path / "it.npz")
    assert fingerprint(loaded) == fingerprint(nowcaster)
    assert (loaded.rule, loaded.num_means, loaded.record) == (nowcaster.rule, 2, {"generations": 3})
    assert_trees_equal(jump_of(loaded, motion(2)), jump_of(nowcaster, motion(2)))
    assert fingerprint(random_drift(2)) != fingerprint(nowcaster)


def test_settings_of_the_rule_are_kept_in_full():
    assert LearnedDrift.init(jax.random.key(0), gain=0.01).rule == dataclasses.asdict(Drift(gain=0.01))


def test_it_is_small():
    assert repr(LearnedDrift.init(jax.random.key(0))) == "LearnedDrift(248 weights, num_means=3)"


@pytest.mark.parametrize("num_means", [1, 4, 2.0])
def test_other_numbers_of_means_are_refused(num_means: Any):
    with pytest.raises(ValueError, match=r"num_means=.* must be 2 or 3: how many running means there are"):
        LearnedDrift.init(jax.random.key(0), num_means=num_means)


@pytest.mark.parametrize("params", [{}, {"hidden": {"kernel": jnp.zeros([4, 8])}}])
def test_parameters_of_another_network_are_refused(params: Any):
    with pytest.raises(ValueError, match=r"params are not the parameters of a DriftNetwork for num_means=3"):
        LearnedDrift(params)
