"""Helpers of several test files: weights, short training runs, published files, comparisons."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wnn_jax
from wnn_jax._drift import DriftHistory

# The nowcasters of the fixture `nowcaster`, by the kind of their history.
WINDOWS = ("linear", pytest.param("wnn_plus", marks=pytest.mark.slow))
DRIFTS = ("drift", "slow-drift")

# Operations of a compiled program that communicate between devices.
COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")

Transform = Callable[[Callable[..., Any]], Callable[..., Any]]


class Step(NamedTuple):
    """What one training step left behind."""

    updates: Any
    params: Any
    state: Any


@contextlib.contextmanager
def all_optimizations() -> Generator[None]:
    """Compile as users do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def identity(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


def train(
    tx: Any,
    params: Any,
    num_steps: int,
    *,
    gradient: Callable[[Any], Any] | None = None,
    state: Any = None,
    transform: Transform = identity,
) -> list[Step]:
    """Trains on `gradient(params)` (default: `pull_to_one`) and returns every step.

    `transform` is applied to both `init` and the step: `jax.vmap` trains a batch of parameters.
    """
    compiled_step = compile_step(tx, pull_to_one if gradient is None else gradient, transform)
    state = transform(tx.init)(params) if state is None else state
    steps = []
    for _ in range(num_steps):
        last = compiled_step(params, state)
        params, state = last.params, last.state
        steps.append(last)
    return steps


@functools.cache  # Runs of one optimizer share a program.
def compile_step(tx: Any, gradient: Callable[[Any], Any], transform: Transform) -> Any:
    return jax.jit(transform(make_step(tx, gradient)))


def make_step(tx: Any, gradient: Callable[[Any], Any]) -> Callable[[Any, Any], Step]:
    def step(params: Any, state: Any) -> Step:
        updates, state = tx.update(gradient(params), state, params)
        return Step(updates, optax.apply_updates(params, updates), state)

    return step


def abstract_run(tx: Any, make_params: Callable[[], Any], shardings: Any) -> Any:
    """Shapes, dtypes and shardings of parameters and state, from which a new process restores a run."""
    params = jax.eval_shape(make_params)
    state = jax.eval_shape(tx.init, params)
    mesh = jax.tree.leaves(shardings)[0].mesh
    state_shardings = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state,
        shardings,
        transform_non_params=lambda _: jax.NamedSharding(mesh, jax.P()),
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        {"params": params, "state": state},
        {"params": shardings, "state": state_shardings},
    )


def pull_to_one(params: Any) -> Any:
    """The gradient of half the squared distance to one."""
    return jax.tree.map(lambda param: param - 1, params)


def ones_like(params: Any) -> Any:
    """An update by one for every weight."""
    return jax.tree.map(jnp.ones_like, params)


def last_plus_one(context: int = 5) -> wnn_jax.Nowcaster:
    return wnn_jax.leafwise(lambda history, role, horizon: history[-1] + 1, context=context)


def bounded(forecast: Any, window: Sequence[Any], horizon: int) -> Any:
    """The forecast after the bound: no weight moves further than the horizon times its range in the window."""

    def bound(predicted: jax.Array, *snapshots: jax.Array) -> jax.Array:
        reach = horizon * np.ptp(np.stack(snapshots), axis=0)
        return jnp.clip(predicted, snapshots[-1] - reach, snapshots[-1] + reach)

    return jax.tree.map(bound, forecast, *window)


@dataclasses.dataclass(frozen=True)
class HalfMemory(wnn_jax.nowcasters.Drift):
    """A drift by the running mean times `max_gain`, which forgets one half at every visit."""

    spectral: bool = False
    gain: float = 1e9
    max_gain: float = 1.0
    reach: float = 1e30
    snapshot_every: int = 2

    def memory_after(self, num_steps: Any, snapshot_every: Any) -> Any:
        return 2 * snapshot_every + 0 * num_steps


def num_jumps(nowcaster: Any, num_snapshots: int) -> int:
    """How often a nowcaster, or the nowcaster of this name, jumps in so many visits."""
    nowcaster = wnn_jax.load(nowcaster) if isinstance(nowcaster, str) else nowcaster
    is_drift = isinstance(nowcaster, wnn_jax.nowcasters.Drift)
    return max(num_snapshots - 1, 0) if is_drift else num_snapshots // nowcaster.context


def history_trees(history: Any) -> list[Any]:
    """The trees like the parameters that a history is made of."""
    return list(history) if isinstance(history, DriftHistory) else list(history.snapshots)


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bits(tree: Any) -> list[bytes]:
    """The bytes of all leaves, which tell 0 from -0."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def network_params(dtype: Any = jnp.float32) -> Any:
    """Parameters of one small layer: two ranks, two roles."""
    random = np.random.default_rng(1)
    shapes = {"kernel": (3, 4, 8), "bias": (8,)}
    return {"Conv_0": {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}}


def random_leaves(template: Any, seed: int) -> Any:
    """Parameters of a network, all random, biases too: zeros from `init` would hide a misuse."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), template)


def random_history(shape: tuple[int, ...], dtype: Any = jnp.float32, *, seed: int = 0) -> list[jax.Array]:
    """Five snapshots of one leaf: random walks with steps of very different lengths."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 1, (5, *shape)) * 10.0 ** rng.uniform(-5, 0, shape)
    return list(jnp.asarray(rng.normal(0, 1, shape) + np.cumsum(steps, axis=0), dtype))


def published_file(name: str) -> Path:
    """A file of weights or outputs of published code. Tests are skipped where it is missing."""
    path = Path(__file__).parents[2] / "shared" / "reference" / name
    if not path.exists():
        pytest.skip(f"{name}, of published code, is not shipped with this repository and not here")
    return path


def published_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of a published file of outputs."""
    with np.load(published_file(name)) as file:
        return dict(file)


def assert_close(actual: Any, expected: Any, *, rtol: float = 1e-5) -> None:
    """Close relative to the largest magnitude.

    A forecast is a sum with the weight itself, so that its error is a rounding error of the weights. The forecast may
    be near zero by chance.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max(initial=0))


def assert_trees_equal(actual: Any, expected: Any) -> None:
    def assert_equal(one: Any, other: Any) -> None:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(one, other)

    jax.tree.map(assert_equal, actual, expected)


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    def assert_leaves_close(one: Any, other: Any) -> None:
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=rtol, atol=atol)

    jax.tree.map(assert_leaves_close, actual, expected)


def assert_dots_are_precise(fn: Callable[..., Any], *args: Any) -> None:
    """There are matrix products in a function, and all are of the highest precision."""
    dots = [equation for equation in equations(jax.make_jaxpr(fn)(*args)) if equation.primitive.name == "dot_general"]
    assert dots
    highest = jax.lax.Precision.HIGHEST
    assert {dot.params["precision"] for dot in dots} == {(highest, highest)}


def equations(node: Any) -> Iterator[Any]:
    """All equations of a jaxpr, and of those in their parameters: of loops, branches and calls."""
    node = getattr(node, "jaxpr", node)
    if hasattr(node, "eqns"):
        for equation in node.eqns:
            yield equation
            yield from equations(tuple(equation.params.values()))
    elif isinstance(node, (tuple, list)):
        for element in node:
            yield from equations(element)
