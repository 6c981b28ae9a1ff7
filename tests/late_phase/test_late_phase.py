import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers import assert_trees_close, assert_trees_equal
from wnn_jax import averaging, metrics, nowcast
from wnn_jax.late_phase import (
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


gradient = jax.grad(loss)


def batches(start: int, stop: int) -> jax.Array:
    return jnp.stack([jax.random.normal(jax.random.key(index), [8, 4]) for index in range(start, stop)])


def split(num_members: int = NUM_MEMBERS, noise_scale: float = 0.1) -> SplitParams:
    return split_members(make_params(), MASK, jax.random.key(1), noise_scale, num_members=num_members)


def sgd() -> Any:
    return optax.sgd(0.1, momentum=0.9, nesterov=True)


OPTIMIZERS = pytest.mark.parametrize("make_tx", [sgd, lambda: optax.adam(0.05)], ids=["sgd", "adam"])


def fit(tx: Any, gradient: Any, params: Any, state: Any, batches: Any) -> Any:
    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(gradient(params, state, batch), state, params)
        return optax.apply_updates(params, updates), state

    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


def train_plain(tx: Any, num_steps: int) -> Any:
    params = make_params()
    return fit(tx, lambda params, _, batch: gradient(params, batch), params, tx.init(params), batches(0, num_steps))


def train_cycle(tx: Any, params: Any, state: Any, num_steps: int, first: int = 0) -> Any:
    def of_member(params: Any, state: Any, batch: Any) -> Any:
        return gradient(select_member(params, state.member), batch)

    return fit(tx, of_member, params, state, batches(first, first + num_steps))


def train_parallel(tx: Any, params: Any, state: Any, num_steps: int) -> Any:
    def of_all(params: Any, state: Any, batches: Any) -> Any:
        members = jnp.arange(params.num_members)
        return jax.vmap(lambda k, batch: gradient(select_member(params, k), batch))(members, batches)

    return fit(tx, of_all, params, state, batches(0, num_steps).reshape(-1, params.num_members, 8, 4))


def member_of(split: SplitParams, member: int) -> Any:
    """The late-phase weights of a member."""
    return jax.tree.map(lambda leaf: leaf[member], split.members)


@pytest.mark.parametrize(("size", "dtype"), [(1.0, jnp.float32), (1e-5, jnp.float16), (1e3, jnp.float16)])
def test_noise_is_a_share_of_the_weights(size: float, dtype: Any):
    """The squares of narrow weights are 0 or infinite in their own dtype."""
    params = jax.tree.map(lambda leaf: (size * jnp.ones_like(leaf)).astype(dtype), make_params())
    many = split_members(params, MASK, jax.random.key(0), 0.5, num_members=4000)
    assert many.members["norm"]["scale"].dtype == dtype
    deviation = np.std(np.asarray(many.members["norm"]["scale"], np.float64) / size)
    assert deviation == pytest.approx(0.5, rel=0.05)
    assert_trees_equal(select_member(many, 7)["Dense_0"], params["Dense_0"])


@pytest.mark.parametrize("scale", [1.0, 1 / NUM_MEMBERS])
def test_both_schedules_are_equal(scale: float):
    """So moments of members whose turn it is not stay."""
    params = split()
    results: list[Any] = []
    schedules: list[Any] = [("cycle", train_cycle), ("parallel", train_parallel)]
    for schedule, run in schedules:
        tx: Any = late_phase(sgd(), optax.adam(0.05), NUM_MEMBERS, scale, schedule=schedule)
        results.append(run(tx, params, tx.init(params), 4 * NUM_MEMBERS))
    (cycle, cycle_state), (parallel, parallel_state) = results
    assert_trees_close(cycle, parallel)
    assert_trees_close(cycle_state.base, parallel_state.base)
    assert_trees_close(cycle_state.members, parallel_state.members)
    assert cycle_state.member == 0


def test_a_cycle_by_hand():
    params = split()
    tx: Any = late_phase(optax.sgd(0.1), optax.sgd(0.2), NUM_MEMBERS, 0.5)
    trained, state = train_cycle(tx, params, tx.init(params), NUM_MEMBERS)
    gradients = [gradient(select_member(params, k), batch) for k, batch in enumerate(batches(0, NUM_MEMBERS))]
    total = optax.tree.add(*[tree["Dense_0"] for tree in gradients])
    assert_trees_close(trained.base["Dense_0"], optax.tree.add_scale(params.base["Dense_0"], -0.1 * 0.5, total))
    for k, tree in enumerate(gradients):
        expected = optax.tree.add_scale(member_of(params, k)["norm"], -0.2, tree["norm"])
        assert_trees_close(member_of(trained, k)["norm"], expected)
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.gradient))


@pytest.mark.parametrize("schedule", ["cycle", "parallel"])
@OPTIMIZERS
def test_one_member_is_plain_training(schedule: Any, make_tx: Any):
    tx: Any = late_phase(make_tx(), make_tx(), 1, schedule=schedule)
    params = split(1, 0.0)
    run = train_cycle if schedule == "cycle" else train_parallel
    trained, _ = run(tx, params, tx.init(params), 7)
    assert_trees_close(select_member(trained, 0), train_plain(make_tx(), 7)[0], rtol=1e-6, atol=1e-6)


@OPTIMIZERS
def test_the_state_migrates_in_the_middle_of_a_training(make_tx: Any):
    params, plain_state = train_plain(make_tx(), 4)
    members = split_members(params, MASK, jax.random.key(0), num_members=1)
    tx: Any = late_phase(make_tx(), make_tx(), 1)
    state = jax.jit(lambda plain, members: migrate_state(plain, tx, members))(plain_state, members)
    members, _ = train_cycle(tx, members, state, 5, first=4)
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


def test_averages_of_members_are_like_the_parameters():
    largest = float(jnp.finfo(jnp.bfloat16).max)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, largest, jnp.bfloat16), make_params())
    members = split_members(params, MASK, jax.random.key(0), num_members=3)
    assert_trees_equal(average_members(members)[0], params)
    assert average_members(members)[1] is None
    # The statistics of layers with narrow weights are wide.
    average, _ = average_members(members, {"norm": {"mean": jnp.zeros([3, 3]), "var": jnp.ones([3, 3])}})
    assert jax.tree.map(jnp.result_type, average) == jax.tree.map(jnp.result_type, params)


@pytest.mark.parametrize("use_scale", [True, False])
def test_affine_maps_are_averaged(use_scale: bool):
    """The last layer being linear, the average network makes the members' mean output where only one layer differs."""
    norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-3)
    network = nn.Sequential([nn.Dense(3), norm(), nn.Sequential([norm(use_scale=use_scale)])])
    inputs = jax.random.normal(jax.random.key(3), [5, 4])
    variables = network.init(jax.random.key(0), inputs)
    last = functools.partial(module_mask, path="layers_2")
    members = split_members(variables["params"], last, jax.random.key(1), 1.0, num_members=4)
    stats = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (4, *leaf.shape)), variables["batch_stats"])
    random = np.random.default_rng(2)
    inner = stats["layers_2"]["layers_0"]
    inner["var"] = jnp.asarray(random.uniform(0.1, 1.1, [4, 3]), jnp.float32)
    # Without a scale, the maps of the members have no common slope.
    inner["var"] = inner["var"] if use_scale else jnp.broadcast_to(inner["var"][:1], [4, 3])
    inner["mean"] = jnp.asarray(random.normal(size=[4, 3]), jnp.float32)

    def apply_member(k: Any, stats: Any) -> Any:
        return network.apply({"params": select_member(members, k), "batch_stats": stats}, inputs)

    outputs = jax.vmap(apply_member)(jnp.arange(4), stats).mean(axis=0)
    average, mean_stats = average_members(members, stats, epsilon=1e-3)
    averaged: Any = network.apply({"params": average, "batch_stats": mean_stats}, inputs)
    np.testing.assert_allclose(averaged, outputs, rtol=1e-4, atol=1e-5)
    naive: Any = network.apply({"params": average_members(members)[0], "batch_stats": mean_stats}, inputs)
    assert not use_scale or np.abs(naive - outputs).max() > 0.05


def test_statistics_of_another_number_of_members_are_refused():
    with pytest.raises(ValueError, match=r"batch_stats has the shape \(2, 3\) at .*must be the 3 members"):
        average_members(split(), {"norm": {"mean": jnp.zeros([2, 3]), "var": jnp.ones([2, 3])}})
    with pytest.raises(ValueError, match="batch_stats has no `mean` and `var` at norm"):
        average_members(split(), {"norm": {"mean": jnp.zeros([3, 3])}})


@pytest.mark.parametrize("stats", [None, jnp.arange(float(NUM_MEMBERS))])
def test_the_ensemble_predicts_the_mean(stats: Any):
    params, inputs = split(), batches(0, 1)[0]

    def predict(params: Any, inputs: jax.Array, shift: Any = 1.0) -> jax.Array:
        return apply(params, inputs) * shift

    factors = np.ones(NUM_MEMBERS) if stats is None else stats
    expected = np.mean([apply(select_member(params, k), inputs) * factors[k] for k in range(NUM_MEMBERS)], axis=0)
    np.testing.assert_allclose(ensemble_predict(predict, params, inputs, stats), expected, rtol=1e-5, atol=1e-6)


def test_members_are_averaged_along_the_training():
    params: Any = split()
    tx: Any = optax.chain(late_phase(sgd(), sgd(), NUM_MEMBERS), averaging.ema(0.9))
    state, trained = tx.init(params), []
    for batch in batches(0, 4):
        updates, state = tx.update(gradient(select_member(params, state[0].member), batch), state, params)
        params = optax.apply_updates(params, updates)
        trained.append(params)
    weights = 0.9 ** np.arange(4)[::-1]
    expected: Any = jax.tree.map(
        lambda *leaves: np.average(leaves, axis=0, weights=weights).astype(np.float32), *trained
    )
    assert_trees_close(averaging.ema_eval_params(state, params), expected, rtol=1e-5, atol=1e-6)


def test_the_mask_of_normalisation_layers():
    assert norm_mask(make_params()) == MASK
    members = split_members(make_params(), norm_mask, jax.random.key(0), num_members=2)
    assert members.num_members == 2
    assert_trees_equal(select_member(members, 1), make_params())


def test_the_mask_of_a_module():
    params = {"body": make_params(), "head": {"kernel": jnp.ones([3, 2])}}
    assert module_mask(params, "head") == {"body": jax.tree.map(lambda _: False, MASK), "head": {"kernel": True}}
    assert module_mask(params, "body/norm")["body"] == MASK
    with pytest.raises(ValueError, match=r"path='nor' is no module of params; choose from body/Dense_0, .*, head\."):
        module_mask(params, "nor")


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


ATTENTION = {"attention": {"query": {"kernel": jnp.ones([4, 2, 8])}}, "head": {"kernel": jnp.ones([4, 2])}}
VECTOR = {"attention": {"query": {"kernel": jnp.ones([3])}}, "head": {"kernel": jnp.ones([4, 2])}}
NO_AXES = "mask is 'rank-1' at attention/query/kernel, whose shape .* True or False"


def all_of(tree: Any, value: Any) -> Any:
    return jax.tree.map(lambda _: value, tree)


@pytest.mark.parametrize(
    ("params", "mask", "message"),
    [
        (make_params(), all_of(MASK, True), "mask selects everything; select some"),
        (make_params(), all_of(MASK, False), "mask selects nothing; select some"),
        (make_params(), {"norm": True}, "mask has the structure"),
        (make_params(), all_of(MASK, "rank1"), "mask is 'rank1' at Dense_0/.*; choose from True, False and 'rank-1'"),
        (ATTENTION, all_of(ATTENTION, "rank-1"), NO_AXES),
        (VECTOR, all_of(VECTOR, "rank-1"), NO_AXES),
    ],
)
def test_masks(params: Any, mask: Any, message: str):
    with pytest.raises(ValueError, match=message):
        split_members(params, mask, jax.random.key(0), num_members=2)


def test_members_and_schedules_that_are_not_there():
    with pytest.raises(ValueError, match="member=3 must be an int from 0 to 2: there are 3 members"):
        select_member(split(), 3)
    make_tx: Any = functools.partial(late_phase, sgd(), sgd())
    with pytest.raises(ValueError, match="params has 3 members, and num_members=2"):
        make_tx(2).init(split())
    with pytest.raises(ValueError, match="schedule='both' must be 'cycle' or 'parallel'"):
        make_tx(2, schedule="both")
    with pytest.raises(ValueError, match="params"):
        make_tx(NUM_MEMBERS).update(make_params(), make_tx(NUM_MEMBERS).init(split()))
