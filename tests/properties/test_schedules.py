"""Training runs in which everything changes: `nowcast` agrees with a plain model at every step."""

import copy
import functools
import itertools
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import wnn_jax
from tests.properties.nowcast_model import NEVER, TABLE_SIZE, Model, Settings, nowcaster_of
from tests.properties.strategies import Tree, generators, num_examples

# Only single weights are checked exactly for being misplaced.
_LAYOUTS = {
    "points": {"kernel": (1, 1), "bias": (1,), "scale": ()},
    "tensors": {"kernel": (5, 4), "bias": (4,), "nothing": (0, 2)},
}
_MASKED = "embedding"


class Config(NamedTuple):
    """The settings that a step is compiled for."""

    nowcaster: str
    layout: str
    dtype: str = "float32"
    is_masked: bool = False


_CONFIGS = (
    Config("drift", "tensors"),
    Config("ahead-5", "points"),
    Config("linear", "tensors"),
    Config("wild-3", "points"),
    Config("far-drift", "points", is_masked=True),
    Config("ahead-1", "tensors", dtype="bfloat16"),
    Config("wild-6", "tensors", is_masked=True),
    Config("ahead-2", "tensors", dtype="bfloat16", is_masked=True),
    Config("slow-drift", "tensors"),
    Config("drift", "tensors", dtype="bfloat16"),
)
# Nowcasters that can take over a history from one another.
_KINDS = (("ahead-5", "linear"), ("ahead-2", "wild-2"), ("drift", "slow-drift", "far-drift"))
_SUCCESSORS = {name: kind[index - 1] for kind in _KINDS for index, name in enumerate(kind)}


def _tables(values: list[float]) -> st.SearchStrategy[np.ndarray]:
    varied = generators().map(lambda rng: rng.choice(values, TABLE_SIZE))
    return st.one_of(st.just(np.full(TABLE_SIZE, values[0])), varied).map(lambda table: table.astype(np.float32))


_SETTINGS = st.builds(
    Settings,
    st.sampled_from([2, 1, 3, 5, 9]).map(np.int32),
    # In the middle of a training run, a later start is a pause.
    st.sampled_from([0, 0, 3, 10, 60]).map(np.int32),
    st.one_of(st.just(NEVER), st.just(NEVER), st.integers(11, 200)).map(np.int32),
    _tables([5.0, 1.0, 2.0, 40.0, 0.0, -3.0, 2.6, 1e6, np.nan]),
    _tables([1.0, 1.0, 1.0, 0.5, 2.0, 0.0, -0.5]),
)


def _event(method: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw the name of a method of `Training`, and its arguments."""
    return st.tuples(st.just(method), st.fixed_dictionaries(arguments))


_EVENTS = st.one_of(
    _event("train", num_steps=st.just(1), rng=generators(), factor=st.sampled_from([1.0, 0.0, 0.5, 0.9, -1.0, 3.0])),
    _event("change_the_settings", settings=_SETTINGS),
    _event("change_the_nowcaster"),
    _event("restore", index=st.integers(0, 10)),
    _event("edit", by=st.sampled_from([1e3, 1e-4])),
    _event("go_back_without_the_state"),
    _event("train", num_steps=st.just(1), rng=generators(), broken=st.sampled_from(["kernel", "bias"])),
)
_SEGMENTS = _event(
    "train",
    num_steps=st.integers(10, 25),
    rng=generators(),
    size=st.sampled_from([0.03, 1e-3, 0.3]),
    resting=st.sampled_from([None, "kernel", "bias"]),
)


@pytest.mark.slow_but(4)
@pytest.mark.parametrize("config", _CONFIGS, ids=lambda config: "-".join(map(str, config)))
@hypothesis.settings(max_examples=num_examples(0.2))
@hypothesis.given(
    settings=_SETTINGS,
    rng=generators(),
    schedule=st.lists(st.tuples(_EVENTS, _SEGMENTS), min_size=5, max_size=10),
)
def test_every_step_is_as_documented(config: Config, settings: Settings, rng: np.random.Generator, schedule: Any):
    training = Training(config, settings, rng)
    for method, arguments in itertools.chain.from_iterable(schedule):
        getattr(training, method)(**arguments)


class Training:
    """A training run, and its model."""

    def __init__(self, config: Config, settings: Settings, rng: np.random.Generator) -> None:
        shapes = _LAYOUTS[config.layout] | ({_MASKED: (3,)} if config.is_masked else {})
        self.config, self.settings, self.names = config, settings, list(_LAYOUTS[config.layout])
        self.params = {name: rng.normal(0, 0.5, shape).astype(config.dtype) for name, shape in shapes.items()}
        self.state = _transformation(config, settings).init(jax.tree.map(jnp.asarray, self.params))
        self.model = Model(config.nowcaster, config.layout)
        # The content of a checkpoint, and the model of that time.
        self.moments = [(self.params, self.state, copy.deepcopy(self.model))]

    def train(
        self,
        num_steps: int,
        rng: np.random.Generator,
        size: float = 0.1,
        resting: str | None = None,
        broken: str | None = None,
        factor: float = 1.0,
    ) -> None:
        """Take steps of a direction and noise. The next transformation multiplies updates by `factor`."""
        directions = {name: rng.normal(size=leaf.shape) for name, leaf in self.params.items()}
        for _ in range(num_steps):
            updates = {name: size * (leaf + rng.normal(size=leaf.shape)) for name, leaf in directions.items()}
            updates |= {name: np.zeros_like(leaf) for name, leaf in updates.items() if name == resting}
            updates |= {name: np.full_like(leaf, np.nan) for name, leaf in updates.items() if name == broken}
            self._step({name: leaf.astype(self.config.dtype) for name, leaf in updates.items()}, factor)
        self.moments.append((self.params, jax.device_get(self.state), copy.deepcopy(self.model)))

    def restore(self, index: int) -> None:
        self.params, self.state, model = self.moments[index % len(self.moments)]
        self.model = copy.deepcopy(model)
        self.model.nowcaster = self.config.nowcaster

    def edit(self, by: float) -> None:
        self.params = {name: (leaf + by).astype(leaf.dtype) for name, leaf in self.params.items()}

    def go_back_without_the_state(self) -> None:
        self.params = self.moments[0][0]

    def change_the_settings(self, settings: Settings) -> None:
        self.settings = settings

    def change_the_nowcaster(self) -> None:
        self.model.nowcaster = _SUCCESSORS.get(self.config.nowcaster, self.config.nowcaster)
        self.config = self.config._replace(nowcaster=self.model.nowcaster)

    def _step(self, updates: Tree, factor: float) -> None:
        step = _compiled_step(self.config)
        actual, self.state, metrics = step(self.params, self.state, updates, self.settings)
        actual, metrics = jax.device_get((actual, metrics))
        if self.config.is_masked:
            assert actual[_MASKED].tobytes() == updates[_MASKED].tobytes()
        params, before, after = ({name: tree[name] for name in self.names} for tree in (self.params, updates, actual))
        with np.errstate(all="ignore"):
            self.model.check_step(self.settings, params, before, after, metrics)
            self.params = {
                name: (leaf + (factor * actual[name]).astype(leaf.dtype)).astype(leaf.dtype)
                for name, leaf in self.params.items()
            }


def _transformation(config: Config, settings: Settings) -> Any:
    def look_up(table: Any) -> Any:
        return lambda index: table[jnp.clip(index, 0, TABLE_SIZE - 1)]

    tx = wnn_jax.nowcast(
        nowcaster_of(config.nowcaster),
        snapshot_every=settings.snapshot_every,
        start=settings.start,
        stop=settings.stop,
        horizon=look_up(settings.horizons) if "drift" not in config.nowcaster else None,
        scale=look_up(settings.scales),
    )
    mask: Any = {name: name != _MASKED for name in (*_LAYOUTS[config.layout], _MASKED)}
    return optax.masked(tx, mask) if config.is_masked else tx


@functools.cache
def _compiled_step(config: Config) -> Any:
    @jax.jit
    def step(params: Any, state: Any, updates: Any, settings: Settings) -> Any:
        updates, state = _transformation(config, settings).update(updates, state, params)
        return updates, state, wnn_jax.metrics(state)

    return step
