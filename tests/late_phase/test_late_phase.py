import functools
from typing import Any, cast

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import assert_trees_close, assert_trees_equal
from wnn_jax import averaging, metrics, nowcast
from wnn_jax.late_phase import (
    LatePhaseState,
    RankOne,
    SplitParams,
    average_members,
    ensemble_predict,
    late_phase,
    migrate_state,
    module_mask,
    norm_mask,
    rank_one_mask,
    select_member,
    split_members,
)

MASK = {"Dense_0": {"kernel": False, "bias": False}, "norm": {"scale": True, "bias": True}}
NUM_MEMBERS = 3


def make_params() -> Any:
    random = np.random.default_rng(0)
    shapes = {"Dense_0": {"kernel": (4, 3), "bias": (3,)}, "norm": {"scale": (3,), "bias": (3,)}}
    return {
        layer: {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in leaves.items()}
        for layer, leaves in shapes.items()
    }


def apply(params: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return x * params["norm"]["scale"][None] + params["norm"]["bias"][None]


def loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean((apply(params, batch) - batch[:, :3]) ** 2)


def batch(index: int) -> jax.Array:
    return jax.random.normal(jax.random.key(index), [8, 4])


def split(num_members: int = NUM_MEMBERS, noise_scale: float = 0.1) -> SplitParams:
    return split_members(make_params(), MASK, jax.random.key(1), noise_scale, num_members=num_members)


def sgd() -> Any:
    return optax.sgd(0.1, momentum=0.9, nesterov=True)


def train_cycle(tx: Any, params: SplitParams, state: LatePhaseState, num_steps: int) -> Any:
    @jax.jit
    def step(params: SplitParams, state: LatePhaseState, batch: jax.Array) -> Any:
        gradient = jax.grad(loss)(select_member(params, state.member), batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(num_steps):
        params, state = step(params, state, batch(index))
    return params, state


def train_parallel(tx: Any, params: SplitParams, state: LatePhaseState, num_cycles: int) -> Any:
    @jax.jit
    def step(params: SplitParams, state: LatePhaseState, batches: jax.Array) -> Any:
        members = jnp.arange(params.num_members)
        gradients = jax.vmap(lambda k, batch: jax.grad(loss)(select_member(params, k), batch))(members, batches)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    number = params.num_members
    for cycle in range(num_cycles):
        batches = jnp.stack([batch(cycle * number + k) for k in range(number)])
        params, state = step(params, state, batches)
    return params, state


def test_members_are_the_parameters_and_noise():
    params = make_params()
    exact = split(noise_scale=0.0)
    for member in range(NUM_MEMBERS):
        assert_trees_equal(select_member(exact, member), params)
    many = split_members(params, MASK, jax.random.key(0), 0.5, num_members=4000)
    deviation = np.std(many.members["norm"]["scale"] - params["norm"]["scale"][None])
    assert deviation == pytest.approx(0.5 * np.sqrt(np.mean(params["norm"]["scale"] ** 2)), rel=0.05)
    assert_trees_equal(select_member(many, 7)["Dense_0"], params["Dense_0"])


@pytest.mark.parametrize("size", [1e-5, 1e3])
def test_noise_is_a_share_of_narrow_weights(size: float):
    """Their squares are 0 or infinite in their own dtype."""
    params = jax.tree.map(lambda leaf: (size * jnp.ones_like(leaf)).astype(jnp.float16), make_params())
    members = split_members(params, MASK, jax.random.key(0), 0.5, num_members=400).members["norm"]["scale"]
    assert members.dtype == jnp.float16
    assert np.std(np.asarray(members, np.float64) / size) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("scale", [1.0, 1 / NUM_MEMBERS])
def test_both_schedules_are_equal(scale: float):
    params = split()
    results: list[Any] = []
    schedules: list[Any] = [("cycle", train_cycle, 4 * NUM_MEMBERS), ("parallel", train_parallel, 4)]
    for schedule, run, number in schedules:
        tx: Any = late_phase(sgd(), optax.adam(0.05), NUM_MEMBERS, scale, schedule=schedule)
        results.append(run(tx, params, tx.init(params), number))
    (cycle, cycle_state), (parallel, parallel_state) = results
    assert_trees_close(cycle, parallel)
    assert_trees_close(cycle_state.base, parallel_state.base)
    assert_trees_close(cycle_state.members, parallel_state.members)
    assert cycle_state.member == 0


def test_a_cycle_by_hand():
    params = split()
    tx: Any = late_phase(optax.sgd(0.1), optax.sgd(0.2), NUM_MEMBERS, 0.5)
    trained, state = train_cycle(tx, params, tx.init(params), NUM_MEMBERS)
    gradients = [jax.grad(loss)(select_member(params, k), batch(k)) for k in range(NUM_MEMBERS)]
    for name in ("kernel", "bias"):
        total = sum(gradient["Dense_0"][name] for gradient in gradients)
        np.testing.assert_allclose(
            trained.base["Dense_0"][name], params.base["Dense_0"][name] - 0.1 * 0.5 * total, rtol=1e-5, atol=1e-6
        )
    for name in ("scale", "bias"):
        for k, gradient in enumerate(gradients):
            expected = params.members["norm"][name][k] - 0.2 * gradient["norm"][name]
            np.testing.assert_allclose(trained.members["norm"][name][k], expected, rtol=1e-5, atol=1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.gradient))


def test_members_whose_turn_it_is_not_stay():
    params = split()
    tx: Any = late_phase(sgd(), sgd(), NUM_MEMBERS)
    moving, state = train_cycle(tx, params, tx.init(params), 2 * NUM_MEMBERS)
    after, later = train_cycle(tx, moving, state, 1)
    assert state.member == 0
    assert later.member == 1
    for k in range(NUM_MEMBERS):
        same = [
            bool((new[k] == old[k]).all())
            for tree, other in ((after.members, moving.members), (later.members, state.members))
            for new, old in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
        ]
        assert all(same) if k > 0 else not any(same)
    assert_trees_equal(after.base, moving.base)


@pytest.mark.parametrize("schedule", ["cycle", "parallel"])
@pytest.mark.parametrize("make_tx", [sgd, lambda: optax.adam(0.05)], ids=["sgd", "adam"])
def test_one_member_is_plain_training(schedule: Any, make_tx: Any):
    tx: Any = late_phase(make_tx(), make_tx(), 1, schedule=schedule)
    params = split(1, 0.0)
    run = train_cycle if schedule == "cycle" else train_parallel
    trained, _ = run(tx, params, tx.init(params), 7)
    assert_trees_close(select_member(trained, 0), train_plain(make_tx(), 7)[0], rtol=1e-6, atol=1e-6)


def train_plain(tx: Any, num_steps: int) -> Any:
    @jax.jit
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = tx.init(params)
    for index in range(num_steps):
        params, state = step(params, state, batch(index))
    return params, state


@pytest.mark.parametrize("make_tx", [sgd, lambda: optax.adam(0.05)], ids=["sgd", "adam"])
def test_the_state_migrates_in_the_middle_of_a_training(make_tx: Any):
    params, plain_state = train_plain(make_tx(), 4)
    members = split_members(params, MASK, jax.random.key(0), num_members=1)
    tx: Any = late_phase(make_tx(), make_tx(), 1)
    state = jax.jit(lambda plain, members: migrate_state(plain, tx, members))(plain_state, members)

    @jax.jit
    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(select_member(params, state.member), batch), state, params)
        return optax.apply_updates(params, updates), state

    for index in range(4, 9):
        members, state = step(members, state, batch(index))
    assert_trees_close(select_member(members, 0), train_plain(make_tx(), 9)[0], rtol=1e-6, atol=1e-6)


def test_all_members_get_the_momentum():
    _, plain_state = train_plain(sgd(), 4)
    tx: Any = late_phase(sgd(), sgd(), NUM_MEMBERS)
    state = migrate_state(plain_state, tx, split())
    for name in ("scale", "bias"):
        for k in range(NUM_MEMBERS):
            np.testing.assert_array_equal(state.members[0].trace["norm"][name][k], plain_state[0].trace["norm"][name])
    with pytest.raises(ValueError, match=r"plain has nothing at .*optimizers of the same kind"):
        migrate_state(plain_state, late_phase(optax.adam(0.1), sgd(), NUM_MEMBERS), split())


# The end


def test_the_average_of_members():
    params = split()
    average, stats = average_members(params)
    assert stats is None
    assert_trees_equal(average["Dense_0"], params.base["Dense_0"])
    np.testing.assert_allclose(average["norm"]["scale"], params.members["norm"]["scale"].mean(axis=0), rtol=1e-6)


def test_averages_of_members_are_like_the_parameters():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, largest, jnp.bfloat16), make_params())
    members = split_members(params, MASK, jax.random.key(0), num_members=3)
    assert_trees_equal(average_members(members)[0], params)
    # The statistics of layers with narrow weights are wide.
    average, _ = average_members(members, {"norm": {"mean": jnp.zeros([3, 3]), "var": jnp.ones([3, 3])}})
    assert jax.tree.map(jnp.result_type, average) == jax.tree.map(jnp.result_type, params)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.BatchNorm(use_running_average=True, epsilon=1e-3)
        return Block()(norm(nn.Dense(3)(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x)


def test_affine_maps_are_averaged():
    """The last layer being linear, the average network makes the members' mean output where only one layer differs."""
    network = Network()
    variables = network.init(jax.random.key(0), jnp.zeros([1, 4]))
    params = variables["params"]
    mask = jax.tree.map(lambda _: False, params)
    mask["Block_0"]["BatchNorm_0"] = {"scale": True, "bias": True}
    members = split_members(params, mask, jax.random.key(1), 1.0, num_members=4)
    keys = jax.random.split(jax.random.key(2), 4)
    stats = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (4, *leaf.shape)), variables["batch_stats"])
    inner = stats["Block_0"]["BatchNorm_0"]
    inner["mean"] = jax.vmap(lambda key: jax.random.normal(key, [3]))(keys)
    inner["var"] = jax.vmap(lambda key: jax.random.uniform(key, [3]) + 0.1)(keys)

    inputs = jax.random.normal(jax.random.key(3), [5, 4])

    def apply_member(k: Any, stats: Any) -> Any:
        return network.apply({"params": select_member(members, k), "batch_stats": stats}, inputs)

    outputs = jax.vmap(apply_member)(jnp.arange(4), stats)
    average, mean_stats = average_members(members, stats, epsilon=1e-3)
    found: Any = network.apply({"params": average, "batch_stats": mean_stats}, inputs)
    np.testing.assert_allclose(found, np.mean(outputs, axis=0), rtol=1e-4, atol=1e-5)
    naive: Any = network.apply({"params": average_members(members)[0], "batch_stats": mean_stats}, inputs)
    assert np.abs(naive - np.mean(outputs, axis=0)).max() > 0.05


def test_statistics_of_another_number_of_members_are_refused():
    with pytest.raises(ValueError, match=r"batch_stats has the shape \(2, 3\) at .*must be the 3 members"):
        average_members(split(), {"norm": {"mean": jnp.zeros([2, 3]), "var": jnp.ones([2, 3])}})
    with pytest.raises(ValueError, match="batch_stats has no `mean` and `var` at norm"):
        average_members(split(), {"norm": {"mean": jnp.zeros([3, 3])}})


def test_the_ensemble_predicts_the_mean():
    params, inputs = split(), batch(0)
    expected = np.mean([apply(select_member(params, k), inputs) for k in range(NUM_MEMBERS)], axis=0)
    np.testing.assert_allclose(ensemble_predict(apply, params, inputs), expected, rtol=1e-5, atol=1e-6)


def test_members_of_the_ensemble_have_statistics_of_their_own():
    params, inputs, shifts = split(), batch(0), jnp.arange(float(NUM_MEMBERS))

    def apply_shifted(params: Any, inputs: jax.Array, shift: jax.Array) -> jax.Array:
        return apply(params, inputs) * shift

    expected = np.mean([apply(select_member(params, k), inputs) * shifts[k] for k in range(NUM_MEMBERS)], axis=0)
    found = ensemble_predict(apply_shifted, params, inputs, shifts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def decayed_mean(leaves: Any, decay: float = 0.9) -> Any:
    weights = decay ** np.arange(len(leaves), dtype=np.float32)[::-1]
    return np.tensordot(weights / weights.sum(), np.stack(leaves), axes=1)


@pytest.mark.parametrize(
    ("make", "read", "mean"),
    [
        (averaging.uniform, averaging.uniform_eval_params, lambda leaves: np.mean(leaves, axis=0)),
        (lambda: averaging.ema(0.9), averaging.ema_eval_params, decayed_mean),
    ],
    ids=["uniform", "ema"],
)
def test_members_are_averaged_along_the_training(make: Any, read: Any, mean: Any):
    """SWA and EMA of the members: of shared weights and of every member's own, and of all members in the end."""
    params = split()
    tx: Any = optax.chain(late_phase(sgd(), sgd(), NUM_MEMBERS), make())
    state, trained = tx.init(params), []
    for index in range(4):
        gradient = jax.grad(loss)(select_member(cast(Any, params), state[0].member), batch(index))
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trained.append(params)
    expected: Any = jax.tree.map(lambda *leaves: mean(leaves), *trained)
    assert_trees_close(read(state, params), expected, rtol=1e-5, atol=1e-6)
    average, _ = average_members(read(state, params))
    np.testing.assert_allclose(average["norm"]["scale"], expected.members["norm"]["scale"].mean(axis=0), rtol=1e-5)


def test_the_mask_of_normalisation_layers():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(2)(nn.LayerNorm()(nn.Dense(3)(x)))

    params = Model().init(jax.random.key(0), jnp.zeros([1, 4]))["params"]
    assert norm_mask(params) == {
        "Dense_0": {"kernel": False, "bias": False},
        "Dense_1": {"kernel": False, "bias": False},
        "LayerNorm_0": {"scale": True, "bias": True},
    }
    assert split_members(params, norm_mask, jax.random.key(0), num_members=2).num_members == 2


def test_the_mask_of_a_module():
    params = {"body": make_params(), "head": {"kernel": jnp.ones([3, 2])}}
    assert module_mask(params, "head") == {"body": jax.tree.map(lambda _: False, MASK), "head": {"kernel": True}}
    assert module_mask(params, "body/norm")["body"] == MASK
    with pytest.raises(ValueError, match=r"path='nor' is no module of params; choose from body/Dense_0, .*, head\."):
        module_mask(params, "nor")


# Factors of rank 1


class Factored(nn.Module):
    """A network that multiplies what comes into its layers and what goes out by factors, or does not."""

    @nn.compact
    def __call__(self, x: jax.Array, factors: Any = None) -> jax.Array:
        x = nn.relu(_multiplied(nn.Conv(3, (2, 2)), x, factors and factors["Conv_0"]["kernel"]))
        return _multiplied(nn.Dense(2, use_bias=False), x.mean(axis=(1, 2)), factors and factors["Dense_0"]["kernel"])


def _multiplied(layer: nn.Module, x: jax.Array, factors: RankOne | None) -> jax.Array:
    if factors is None:
        return layer(x)
    inputs, outputs = (factor.reshape([1] * (x.ndim - 1) + [-1]) for factor in factors)
    bias = layer(jnp.zeros_like(x))
    return (layer(x * inputs) - bias) * outputs + bias


def factored(num_members: int = NUM_MEMBERS, noise_scale: float = 0.5) -> tuple[Any, SplitParams]:
    params = Factored().init(jax.random.key(0), jnp.zeros([1, 4, 4, 2]))["params"]
    return params, split_members(params, rank_one_mask, jax.random.key(1), noise_scale, num_members=num_members)


def test_factors_begin_as_the_network_that_is_there():
    params, members = factored(noise_scale=0.0)
    assert jax.tree.map(jnp.shape, members.members) == {
        "Conv_0": {"bias": optax.MaskedNode(), "kernel": RankOne((NUM_MEMBERS, 2), (NUM_MEMBERS, 3))},
        "Dense_0": {"kernel": RankOne((NUM_MEMBERS, 3), (NUM_MEMBERS, 2))},
    }
    assert_trees_equal(members.base, params)
    assert_trees_equal(select_member(members, 1), params)
    assert_trees_equal(average_members(members)[0], params)


def test_folded_factors_are_those_of_inputs_and_outputs():
    """Exactly, where the numbers are such that float32 rounds none of the products and sums."""
    params, members = factored()
    params, split = jax.tree.map(lambda leaf: jnp.round(4 * leaf), (params, members))
    images = jnp.round(3 * jax.random.normal(jax.random.key(2), [4, 4, 4, 2]))
    for member in range(NUM_MEMBERS):
        factors = jax.tree.map(lambda leaf, member=member: leaf[member], split.members)
        expected = Factored().apply({"params": params}, images, factors)
        np.testing.assert_array_equal(Factored().apply({"params": select_member(split, member)}, images), expected)
    mean = jax.tree.map(lambda leaf: jnp.round(leaf.mean(axis=0)), members.members)
    average, _ = average_members(SplitParams(params, jax.tree.map(lambda leaf: leaf[None], mean)))
    expected = Factored().apply({"params": params}, images, mean)
    np.testing.assert_array_equal(Factored().apply({"params": average}, images), expected)


@pytest.mark.parametrize("schedule", ["cycle", "parallel"])
def test_factors_and_kernels_take_the_steps_of_their_own_gradients(schedule: Any):
    params, members = factored()
    images = jax.random.normal(jax.random.key(3), [NUM_MEMBERS, 4, 4, 4, 2])

    def loss(params: Any, images: jax.Array, factors: Any = None) -> jax.Array:
        outputs: Any = Factored().apply({"params": params}, images, factors)
        return jnp.sum(outputs**2)

    tx: Any = late_phase(optax.sgd(0.1), optax.sgd(0.2), NUM_MEMBERS, schedule=schedule)
    state: Any = tx.init(members)
    trained: Any = members
    update, differentiate = jax.jit(tx.update), jax.jit(jax.grad(loss))
    gradients = [differentiate(select_member(members, k), images[k]) for k in range(NUM_MEMBERS)]
    for gradient in gradients if schedule == "cycle" else [jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)]:
        updates, state = update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 2)))
    total = jax.tree.map(jnp.zeros_like, params)
    for k in range(NUM_MEMBERS):
        factors = jax.tree.map(lambda leaf, k=k: leaf[k], members.members)
        of_params, of_factors = differentiate(params, images[k], factors)
        total = optax.tree.add(total, of_params)
        moved = jax.tree.map(lambda factor, slope: factor - 0.2 * slope, factors, of_factors)
        assert_trees_close(jax.tree.map(lambda leaf, k=k: leaf[k], trained.members), moved)
    assert_trees_close(trained.base, optax.tree.add_scale(params, -0.1, total))


def test_factors_are_along_the_axes_of_equinox():
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    members = split_members(layer, rank_one_mask, jax.random.key(1), 0.5, num_members=2)
    inputs, outputs = members.members.weight
    x = jax.random.normal(jax.random.key(2), [3])
    expected = layer.weight @ (x * inputs[1]) * outputs[1] + layer.bias
    np.testing.assert_allclose(select_member(members, 1)(x), expected, rtol=1e-5)


@pytest.mark.parametrize("make_tx", [sgd, lambda: optax.adam(0.05)], ids=["sgd", "adam"])
def test_factors_have_new_moments_and_kernels_keep_theirs(make_tx: Any):
    params, members = factored()
    plain: Any = make_tx().init(params)
    _, plain = make_tx().update(params, plain, params)
    tx: Any = late_phase(make_tx(), make_tx(), NUM_MEMBERS)
    state = migrate_state(plain, tx, members)
    assert_trees_equal(state.base, plain)
    assert_trees_equal(state.members, tx.init(members).members)


def test_counts_of_schedules_go_on_for_factors():
    params, members = factored()
    make_tx = functools.partial(optax.adam, optax.constant_schedule(0.1))
    _, plain = make_tx().update(params, make_tx().init(params), params)
    state = migrate_state(plain, late_phase(make_tx(), make_tx(), NUM_MEMBERS), members)
    np.testing.assert_array_equal(state.members[0].count, 0)
    np.testing.assert_array_equal(state.members[1].count, 1)


@pytest.mark.parametrize(("mask", "num_before"), [(norm_mask, 1), (rank_one_mask, 0)], ids=["norm", "rank-1"])
def test_a_nowcast_goes_on_and_jumps_in_both_parts(mask: Any, num_before: int):
    def make_tx() -> Any:
        return optax.chain(sgd(), nowcast("slow-drift", snapshot_every=2))

    params, plain = train_plain(make_tx(), 5)
    members = split_members(params, mask, jax.random.key(0), num_members=2)
    tx: Any = late_phase(make_tx(), make_tx(), 2)
    state = migrate_state(plain, tx, members)
    before = metrics(state)
    np.testing.assert_array_equal(before["members/1/num_nowcasts"], num_before)
    _, state = train_cycle(tx, members, state, 2 * 5)
    after = metrics(state)
    assert not any(np.any(count) for name, count in after.items() if name.endswith("num_misplaced"))
    names = [name for name in after if name.endswith("num_nowcasts")]
    assert len(names) == 2
    assert all(np.all(after[name] > before[name]) for name in names)


# What is refused


@pytest.mark.parametrize("value", [True, False])
def test_masks_of_nothing_and_everything(value: bool):
    mask = jax.tree.map(lambda _: value, MASK)
    with pytest.raises(ValueError, match=f"mask selects {'everything' if value else 'nothing'}; select some"):
        split_members(make_params(), mask, jax.random.key(0), num_members=2)


def test_masks_with_other_values():
    mask = {**MASK, "Dense_0": {"kernel": "rank1", "bias": False}}
    with pytest.raises(ValueError, match="mask is 'rank1' at Dense_0/kernel; choose from True, False and 'rank-1'"):
        split_members(make_params(), mask, jax.random.key(0), num_members=2)


@pytest.mark.parametrize("shape", [(3,), (4, 2, 8)], ids=["vector", "attention"])
def test_factors_of_what_has_not_two_axes(shape: tuple[int, ...]):
    params = {"attention": {"query": {"kernel": jnp.ones(shape)}}, "head": {"kernel": jnp.ones([4, 2])}}
    mask = jax.tree.map(lambda _: "rank-1", params)
    with pytest.raises(ValueError, match=r"mask is 'rank-1' at attention/query/kernel, whose shape .* True or False"):
        split_members(params, mask, jax.random.key(0), num_members=2)


def test_masks_of_other_trees():
    with pytest.raises(ValueError, match="mask has the structure"):
        split_members(make_params(), {"norm": True}, jax.random.key(0), num_members=2)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2"])
def test_numbers_of_members(number: Any):
    with pytest.raises(ValueError, match=r"num_members=.* must be an int >= 1"):
        split_members(make_params(), MASK, jax.random.key(0), num_members=number)
    with pytest.raises(ValueError, match=r"num_members=.* must be an int >= 1"):
        late_phase(sgd(), sgd(), number)


def test_another_number_of_members_than_the_transformation_has():
    with pytest.raises(ValueError, match="params has 3 members, and num_members=2"):
        late_phase(sgd(), sgd(), 2).init(split())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("member", [-1, 3, 100])
def test_members_out_of_range(member: int):
    with pytest.raises(ValueError, match=f"member={member} must be an int from 0 to 2: there are 3 members"):
        select_member(split(), member)


@pytest.mark.parametrize("noise_scale", [-0.1, float("nan"), float("inf"), True, "1"])
def test_noise(noise_scale: Any):
    with pytest.raises(ValueError, match=r"noise_scale=.* must be a finite float >= 0"):
        split(noise_scale=noise_scale)


def test_schedules_and_missing_parameters():
    with pytest.raises(ValueError, match="schedule='both' must be 'cycle' or 'parallel'"):
        late_phase(sgd(), sgd(), 2, schedule="both")  # pyright: ignore[reportArgumentType]
    tx: Any = late_phase(sgd(), sgd(), NUM_MEMBERS)
    with pytest.raises(ValueError, match="params"):
        tx.update(make_params(), tx.init(split()))
