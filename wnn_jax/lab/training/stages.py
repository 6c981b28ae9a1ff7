"""Later stages of a run: trainable weight averaging and late-phase weights."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wnn_jax import averaging
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.reparameterized import Coefficients
from wnn_jax.lab.tasks.task import Task
from wnn_jax.lab.training.evaluation_weights import EvaluationWeights, from_state
from wnn_jax.lab.training.method import StageStart, same_task
from wnn_jax.lab.training.step import TrainState, View
from wnn_jax.late_phase import (
    SplitParams,
    average_members,
    late_phase,
    migrate_state,
    norm_mask,
    select_member,
    split_members,
)


def adam_by_cosine(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Return Adam, warmed up over a fifth of the steps and decayed to 0 by a cosine."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 5, num_steps))


@dataclasses.dataclass(frozen=True)
class TrainCoefficients:
    """A last stage that trains the coefficients of checkpoints instead of the weights (TWA).

    The stage before keeps the checkpoints in its optimizer state, by `averaging.lawa`. `averaging.make_subspace`
    explains `form` and `bits`.

    References:
      Li et al., `Trainable Weight Averaging <https://arxiv.org/abs/2205.13104>`_, 2022
    """

    share: float = 0.25
    """The share of the whole run that this stage takes."""
    learning_rate: float | None = None
    """Default: the learning rate of the method."""
    optimizer: Callable[[float, int], optax.GradientTransformation] = adam_by_cosine
    """`(learning_rate, num_steps of the stage)` to the optimizer of the coefficients."""
    form: Literal["deltas", "orthonormal"] = "deltas"
    bits: int | None = None
    begin: Literal["mean", "last"] = "mean"
    """Begin with the average of the checkpoints (the paper's head stage), or with the last one (its tail stage)."""
    task: Callable[[Task], Task] = same_task
    """Changes the task of the coefficients, for example to other examples than the weights have."""

    def first_step(self, num_steps: int) -> int:
        """Return the first step of the stage."""
        return num_steps - round(self.share * num_steps)

    def start(self, task: Task, state: TrainState, learning_rate: float, num_steps: int, seed: int) -> StageStart:
        """Begin at a combination of the checkpoints."""
        del seed
        subspace = averaging.make_subspace(kept_checkpoints(state.opt_state), form=self.form, bits=self.bits)
        coefficients = Coefficients(self.task(task), subspace, state.model_state, self.begin)
        rate = learning_rate if self.learning_rate is None else self.learning_rate
        optimizer = self.optimizer(rate, num_steps - self.first_step(num_steps))
        weights = {"TWA": EvaluationWeights(lambda params, _: params)}
        return StageStart(coefficients, optimizer, *coefficients.init(jax.random.key(0)), evaluation_weights=weights)


def kept_checkpoints(opt_state: Any) -> list[Any]:
    """Return the checkpoints that `averaging.lawa` kept, oldest first. Fewer than two are a `UsageError`."""
    checkpoints, num_taken = optax.tree.get(opt_state, "checkpoints"), int(optax.tree.get(opt_state, "num_taken", 0))
    if checkpoints is None or num_taken < 2:
        raise UsageError(f"opt_state has {num_taken} checkpoints of averaging.lawa; let the stage before keep some.")
    size = len(checkpoints)
    return [checkpoints[taken % size] for taken in range(max(num_taken - size, 0), num_taken)]


class Ensemble(NamedTuple):
    """Members of late-phase weights to evaluate as an ensemble instead of as their average."""

    members: SplitParams


class MembersView(View):
    """One member of late-phase weights takes each step, and the average of all members is the network."""

    def read(self, state: TrainState) -> tuple[Any, Any]:
        """Return the member that takes the next step, with its own model state."""
        member = _member(state)
        return select_member(state.params, member), jax.tree.map(lambda leaf: leaf[member], state.model_state)

    def write(self, state: TrainState, model_state: Any) -> Any:
        """Return the model states of all members after the member's step."""
        member = _member(state)
        return jax.tree.map(lambda leaf, new: leaf.at[member].set(new), state.model_state, model_state)

    def network(self, params: Any, model_state: Any) -> tuple[Any, Any]:
        """Return the average of the members, or the ensemble. Batch normalisation is averaged as an affine map."""
        if isinstance(params, Ensemble):
            return params.members, model_state
        stats = model_state.get("batch_stats", {})
        if not jax.tree.leaves(stats):
            return average_members(params)[0], model_state
        params, stats = average_members(params, stats)
        return params, {"batch_stats": stats}


def _member(state: TrainState) -> jax.Array:
    return optax.tree.get(state.opt_state, "member")


@dataclasses.dataclass(frozen=True)
class TrainMembers:
    """A last stage that trains several members of a few weights (late-phase weights).

    References:
      von Oswald et al., `Neural networks with late-phase weights <https://arxiv.org/abs/2007.12927>`_, ICLR 2021
    """

    optimizer: Callable[[float, int, int, int], optax.GradientTransformation]
    """`(learning_rate, num_steps, first_cycle, cycle)` to the optimizer of the shared weights and of the members.

    From step `first_cycle` on it takes one step in `cycle` minibatches. It continues the state of the stage before,
    where `cycle` was 1.
    """
    first: float = 0.5
    """Where the stage begins, as a share of the run."""
    num_members: int = 5
    average_every: int | None = None
    """Steps between the weights that `SWA` averages, or `None` for no `SWA`."""
    mask: Callable[[Any], Any] = norm_mask
    """Which weights have members, or which factors; see `late_phase.split_members`."""
    ensemble: bool = False
    """Whether to evaluate the members' mean prediction too. The task must have `measures_ensembles = True`."""

    def first_step(self, num_steps: int) -> int:
        """Return the first step of the stage."""
        return round(self.first * num_steps)

    def start(self, task: Task, state: TrainState, learning_rate: float, num_steps: int, seed: int) -> StageStart:
        """Begin with equal members. An ensemble that the task cannot measure is a `UsageError`."""
        if self.ensemble and not getattr(task, "measures_ensembles", False):
            raise UsageError(
                f"ensemble=True: {type(task).__name__} cannot measure an ensemble; train a task whose "
                "measures_ensembles is True."
            )
        members = split_members(state.params, self.mask, jax.random.key(seed), num_members=self.num_members)
        own = self.optimizer(learning_rate, num_steps, self.first_step(num_steps), self.num_members)
        tx: Any = late_phase(own, own, self.num_members)
        opt_state = migrate_state(state.opt_state, tx, members)
        weights = {}
        if self.average_every is not None:
            average: Any = averaging.uniform(0, self.average_every)
            tx, opt_state = optax.chain(tx, average), (opt_state, average.init(members))
            weights["SWA"] = from_state(averaging.uniform_eval_params)
        if self.ensemble:
            weights["ensemble"] = EvaluationWeights(lambda params, _: Ensemble(params), is_average=False)
        model_state = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[None], (self.num_members, *leaf.shape)), state.model_state
        )
        return StageStart(task, tx, members, model_state, opt_state, MembersView(), weights)
