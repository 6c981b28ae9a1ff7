"""Control of a pendulum, learned by acting: deep deterministic policy gradients."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax.lab.tasks.models import describe_model
from wnn_jax.lab.tasks.task import Batch, EvaluationSplit, LossAndState, Metric, ModelState, Params, Sums

EPISODE_LENGTH = 200

_NUM_EVALUATION_EPISODES = 50
_DISCOUNT = 0.95  # the factor of a reward for every step that it is later
_TARGET_RATE = 0.001  # the share of the way that the target networks move to the trained ones in a step
_SPLIT_SEEDS: Mapping[EvaluationSplit, int] = {"validation": 1, "test": 2}

# The Ornstein-Uhlenbeck process: the rate of return to 0, the scale of the noise, and the time of a step.
_NOISE_REVERSION, _NOISE_SCALE, _NOISE_TIME = 0.15, 0.2, 0.1
# What the memory has of a transition.
_TRANSITION = {"observations": (3,), "actions": (1,), "rewards": (), "next_observations": (3,)}


@functools.cache
def load_pendulum() -> Any:
    """Return the physics of Gymnasium's `Pendulum-v1`, as pure functions of a state of angle and velocity, `[2]`."""
    from gymnasium.envs.phys2d.pendulum import PendulumFunctional

    return PendulumFunctional()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PendulumControl:
    """An actor learns to swing a pendulum up and keep it there, and a critic learns to judge its actions.

    The algorithm is the deep deterministic policy gradient (Lillicrap et al., ICLR 2016). Each training step is also a
    step of the environment, in which the actor acts with Ornstein-Uhlenbeck noise. Both networks learn from transitions
    drawn from a memory of the latest ones. The initial actor fills the memory before training. Episodes end after 200
    steps, and no state is terminal.

    The defaults are those of the program that Jang et al., ICML 2023, published. Rewards, from about -16 to 0, are
    learned as `(reward + 8) / 8`. Unlike that program, this one draws transitions with replacement.

    The actor maps observations `[n, 3]` to `[n, 1]`. The hyperbolic tangent makes these shares of the largest torque.
    The critic maps observations and torques `[n, 4]` to values `[n, 1]`. The memory has `capacity` transitions.
    """

    actor: nn.Module
    critic: nn.Module
    batch_size: int = 32
    capacity: int = 20_000
    num_exploration_steps: int = 1_000

    # The sum of the rewards of an episode without noise.
    metrics = (Metric("return", higher_is_better=True, format=".1f"),)

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "deep deterministic policy gradient",
            "environment": "Pendulum-v1",
            "actor": describe_model(self.actor),
            "critic": describe_model(self.critic),
            "batch_size": self.batch_size,
            "discount": _DISCOUNT,
            "target_rate": _TARGET_RATE,
            "capacity": self.capacity,
            "num_exploration_steps": self.num_exploration_steps,
            "evaluation_episodes": _NUM_EVALUATION_EPISODES,
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        actor_key, critic_key, start_key, explore_key = jax.random.split(key, 4)
        observations, actions = jnp.zeros([1, 3]), jnp.zeros([1, 1])
        params = {
            "actor": self.actor.init(actor_key, observations)["params"],
            "critic": self.critic.init(critic_key, jnp.concatenate([observations, actions], axis=-1))["params"],
        }
        model_state: ModelState = {
            "targets": params,
            "pendulum": jnp.zeros([2]),
            "noise": jnp.zeros([1]),
            "num_transitions": jnp.zeros([], jnp.int32),
            "memory": {name: jnp.zeros([self.capacity, *shape]) for name, shape in _TRANSITION.items()},
        }
        starts = jax.vmap(load_pendulum().initial)(jax.random.split(start_key, self.num_exploration_steps))
        keys = jax.random.split(explore_key, self.num_exploration_steps)
        model_state, _ = jax.lax.scan(
            lambda state, inputs: (self._interact(params["actor"], state, *inputs), None), model_state, (starts, keys)
        )
        return params, model_state

    def loss(self, params: Params, model_state: ModelState, batch: Batch, key: jax.Array) -> LossAndState:
        act_key, draw_key = jax.random.split(key)
        fixed = jax.lax.stop_gradient(params)
        model_state = self._interact(fixed["actor"], model_state, batch["starts"][0], act_key)
        num_kept = jnp.minimum(model_state["num_transitions"], self.capacity)
        drawn = jax.random.randint(draw_key, [self.batch_size], 0, num_kept)
        transitions = jax.tree.map(lambda leaf: leaf[drawn], model_state["memory"])
        observations, next_observations = transitions["observations"], transitions["next_observations"]

        targets = model_state["targets"]
        next_values = self._value(targets["critic"], next_observations, self._act(targets["actor"], next_observations))
        expected = (transitions["rewards"] + 8) / 8 + _DISCOUNT * next_values
        critic_loss = jnp.mean((self._value(params["critic"], observations, transitions["actions"]) - expected) ** 2)
        actor_loss = -jnp.mean(self._value(fixed["critic"], observations, self._act(params["actor"], observations)))

        targets = optax.incremental_update(fixed, targets, _TARGET_RATE)
        return critic_loss + actor_loss, {**model_state, "targets": targets}

    def batch(self, seed: int, step: int) -> Batch:
        # The state that the pendulum starts from if an episode begins at this step.
        return {"starts": _draw_starts([seed, step], 1)}

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[Batch]:
        yield {"starts": _draw_starts([_SPLIT_SEEDS[split]], _NUM_EVALUATION_EPISODES)}

    def measure(self, params: Params, model_state: ModelState, batch: Batch) -> Sums:
        del model_state
        returns = jax.vmap(functools.partial(self._return, params["actor"]))(batch["starts"])
        return {"return": (returns.sum(), jnp.float32(returns.size))}

    def _return(self, actor: Params, start: jax.Array) -> jax.Array:
        """Return the sum of the rewards of an episode from a state `[2]`."""
        pendulum = load_pendulum()

        def step(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            action = self._act(actor, pendulum.observation(state, None)[None])[0]
            next_state = pendulum.transition(state, action)
            return next_state, jnp.asarray(pendulum.reward(state, action, next_state, None))

        _, rewards = jax.lax.scan(step, start, length=EPISODE_LENGTH)
        return rewards.sum()

    def _interact(self, actor: Params, model_state: ModelState, start: jax.Array, key: jax.Array) -> ModelState:
        """Return the model state after a step of the environment. The first step of an episode begins at `start`."""
        pendulum = load_pendulum()
        count = model_state["num_transitions"]
        is_first = count % EPISODE_LENGTH == 0
        state = jnp.where(is_first, start, model_state["pendulum"])
        noise = jnp.where(is_first, 0, (1 - _NOISE_REVERSION * _NOISE_TIME) * model_state["noise"])
        noise += _NOISE_SCALE * _NOISE_TIME**0.5 * jax.random.normal(key, noise.shape)

        observation = pendulum.observation(state, None)
        action = self._act(actor, observation[None])[0] + noise
        action = jnp.clip(action, -pendulum.max_torque, pendulum.max_torque)
        next_state = pendulum.transition(state, action)
        transition = {
            "observations": observation,
            "actions": action,
            "rewards": pendulum.reward(state, action, next_state, None),
            "next_observations": pendulum.observation(next_state, None),
        }
        memory = jax.tree.map(
            lambda leaf, new: leaf.at[count % self.capacity].set(new), model_state["memory"], transition
        )
        changed = {"pendulum": next_state, "noise": noise, "num_transitions": count + 1, "memory": memory}
        return {**model_state, **changed}

    def _act(self, actor: Params, observations: jax.Array) -> jax.Array:
        """Return torques `[n, 1]`."""
        outputs: Any = self.actor.apply({"params": actor}, observations)
        return load_pendulum().max_torque * jnp.tanh(outputs)

    def _value(self, critic: Params, observations: jax.Array, actions: jax.Array) -> jax.Array:
        """Return the values of actions, `[n]`."""
        outputs: Any = self.critic.apply({"params": critic}, jnp.concatenate([observations, actions], axis=-1))
        return outputs[:, 0]


def _draw_starts(seed: list[int], number: int) -> np.ndarray:
    """Draw states from which episodes start as in `Pendulum-v1`, `[number, 2]` float32."""
    bounds = load_pendulum().get_default_params()
    high = np.array([bounds.high_x, bounds.high_y])
    return np.random.default_rng(seed).uniform(-high, high, [number, 2]).astype(np.float32)
