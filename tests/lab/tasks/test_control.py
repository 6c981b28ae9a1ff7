from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wnn_jax.lab.tasks.control import EPISODE_LENGTH, PendulumControl
from wnn_jax.lab.tasks.models import MLP


def make_task(**changes: Any) -> PendulumControl:
    small: dict[str, Any] = {"actor": MLP(1, (4,)), "critic": MLP(1, (4,)), "batch_size": 8, "num_exploration_steps": 2}
    return PendulumControl(**(small | changes))


def constant(task: PendulumControl, value: float) -> tuple[Any, Any]:
    """Parameters and model state of one number only, as `init` would take seconds to compile."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), shapes)


def step_of_gymnasium(state: Any, action: Any) -> tuple[Any, float]:
    """The observation and the reward after a step of `Pendulum-v1` itself."""
    environment: Any = gymnasium.make("Pendulum-v1").unwrapped
    environment.state = np.asarray(state, np.float64)
    observation, reward, *_ = environment.step(action)
    return observation, reward


def observe(state: Any) -> np.ndarray:
    return np.array([np.cos(state[0]), np.sin(state[0]), state[1]])


def test_episodes_begin_and_end_as_those_of_pendulum_v1():
    environment: Any = gymnasium.make("Pendulum-v1")
    assert environment.spec.max_episode_steps == EPISODE_LENGTH
    expected = []
    for seed in range(200):
        environment.reset(seed=seed)
        expected.append(environment.unwrapped.state)
    actual = np.concatenate([make_task().batch(0, step)["starts"] for step in range(200)])
    assert actual.shape == (200, 2)
    for extreme in (np.min, np.max):
        np.testing.assert_allclose(extreme(actual, axis=0), extreme(expected, axis=0), rtol=0.05)


def test_the_memory_has_the_latest_transitions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnn_jax.lab.tasks.control.EPISODE_LENGTH", 3)
    task = make_task(capacity=4)
    params, model_state = jax.jit(task.init)(jax.random.key(0))
    interact = jax.jit(task._interact)
    for count in range(2, 8):
        assert model_state["num_transitions"] == count
        before, start = model_state["memory"], task.batch(0, count)["starts"][0]
        model_state = interact(params["actor"], model_state, start, jax.random.key(count))
        new = {name: leaf[count % 4] for name, leaf in model_state["memory"].items()}
        if count % 3 == 0:
            np.testing.assert_allclose(new["observations"], observe(start), rtol=1e-5)
        else:
            np.testing.assert_array_equal(new["observations"], before["next_observations"][(count - 1) % 4])
        cosine, sine, velocity = new["observations"]
        next_observation, reward = step_of_gymnasium([np.arctan2(sine, cosine), velocity], new["actions"])
        np.testing.assert_allclose(new["next_observations"], next_observation, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new["rewards"], reward, rtol=1e-4)
        others = np.arange(4) != count % 4
        for name, leaf in model_state["memory"].items():
            np.testing.assert_array_equal(leaf[others], before[name][others])


@pytest.mark.usefixtures("optimized_here")
def test_noise_returns_to_0_and_begins_there_in_every_episode():
    task = make_task(capacity=1)
    still, model_state = constant(task, 0.0)

    @jax.jit
    @jax.vmap
    def noise_after_one(count: Any, key: Any) -> Any:
        before = {**model_state, "noise": jnp.ones([1]), "num_transitions": count}
        after = task._interact(still["actor"], before, jnp.zeros([2]), key)
        return after["noise"][0], after["memory"]["actions"][0, 0]

    counts = np.repeat([EPISODE_LENGTH, EPISODE_LENGTH + 1], 1_000)
    noise, actions = noise_after_one(counts, jax.random.split(jax.random.key(0), 2_000))
    np.testing.assert_array_equal(actions, noise)
    for values, mean in zip(np.split(np.asarray(noise), 2), (0, 0.985), strict=True):
        assert values.mean() == pytest.approx(mean, abs=0.01)
        assert values.std() == pytest.approx(0.2 * 0.1**0.5, rel=0.1)


def test_the_loss_is_of_both_networks(monkeypatch: pytest.MonkeyPatch):
    # A memory of one transition, so that it is known what is drawn.
    monkeypatch.setattr("wnn_jax.lab.tasks.control._TARGET_RATE", 0.25)
    task = make_task(capacity=1)
    shapes, model_state = constant(task, 0.0)
    rng = np.random.default_rng(0)
    params, targets = (
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes) for _ in range(2)
    )
    model_state |= {"targets": targets}
    compiled = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (loss, after), gradient = compiled(params, model_state, task.batch(0, 0), jax.random.key(1))
    transition = after["memory"]

    def act(actor: Any, observations: Any) -> Any:
        outputs: Any = task.actor.apply({"params": actor}, observations)
        return 2 * jnp.tanh(outputs)

    def value(critic: Any, observations: Any, actions: Any) -> Any:
        outputs: Any = task.critic.apply({"params": critic}, jnp.concatenate([observations, actions], axis=1))
        return outputs[0, 0]

    @jax.jit
    def reference(params: Any) -> Any:
        next_observations, observations = transition["next_observations"], transition["observations"]
        next_value = value(targets["critic"], next_observations, act(targets["actor"], next_observations))
        expected = (transition["rewards"][0] + 8) / 8 + 0.95 * next_value

        def critic_loss(critic: Any) -> Any:
            return (value(critic, observations, transition["actions"]) - expected) ** 2

        def actor_loss(actor: Any) -> Any:
            return -value(params["critic"], observations, act(actor, observations))

        losses = {"critic": critic_loss, "actor": actor_loss}
        return {name: jax.value_and_grad(losses[name])(params[name]) for name in losses}

    expected = reference(params)
    np.testing.assert_allclose(loss, expected["critic"][0] + expected["actor"][0], rtol=1e-4)
    for name in ("actor", "critic"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), gradient[name], expected[name][1]
        )
    jax.tree.map(
        lambda new, old, param: np.testing.assert_allclose(new, 0.75 * old + 0.25 * param, rtol=1e-5),
        after["targets"],
        targets,
        params,
    )


def test_the_return_is_of_a_whole_episode_without_noise():
    task = make_task()
    still, _ = constant(task, 0.0)
    # They hang: an episode that is near the top again and again says more of rounding than of anything else.
    starts = np.array([[2.8, 0.5], [-3.0, 0.1]], np.float32)
    total, weight = jax.jit(task.measure)(still, {}, {"starts": starts})["return"]
    expected = 0.0
    for start in starts:
        environment: Any = gymnasium.make("Pendulum-v1")
        environment.reset(seed=0)
        environment.unwrapped.state, is_over = start.astype(np.float64), False
        while not is_over:
            _, reward, _, is_over, _ = environment.step(np.zeros(1, np.float32))
            expected += float(reward)
    assert weight == 2
    np.testing.assert_allclose(total, expected, rtol=1e-4)
