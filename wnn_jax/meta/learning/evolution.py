"""An evolution strategy for what is judged by whole trainings: antithetic, validated, and resumable."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.training.checkpoints import load_state, save_state

# Arrays in a tree: what is searched for.
Solution = Any

# A pair whose losses differ by more tells no more than one that differs by this, in nats of the logarithm.
_MAX_DIFFERENCE = 0.1
_CONFIDENCE = 0.95


class Gain(NamedTuple):
    """How much lower the logarithm of the loss is than that of a reference, over several runs.

    Attributes:
      mean: over the runs.
      low: the lower end of its 95 % confidence interval.
      high: the upper end.
      runs: how many there are.
    """

    mean: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, gains: Sequence[float] | np.ndarray) -> "Gain":
        """From the gains of at least two single runs, by Student's t."""
        from scipy import stats

        mean, error = float(np.mean(gains)), float(np.std(gains, ddof=1)) / math.sqrt(len(gains))
        reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(gains) - 1)) * error
        return cls(mean, mean - reach, mean + reach, len(gains))


class Objective(Protocol):
    """What is to be found a good solution of."""

    def losses(self, generation: int, members: Sequence[Solution]) -> np.ndarray:
        """The logarithms of the members' losses in a generation.

        Args:
          generation: its number, which says what is trained.
          members: the first half, and then those on the other side of the mean. A pair, one of each, trains the same.

        Returns:
          An array of as many losses, not finite after a divergence.
        """
        ...

    def validate(self, solution: Solution) -> Gain:
        """How much better than the reference a solution is, on runs that are always the same."""
        ...


class Row(NamedTuple):
    """What is known after a generation.

    Attributes:
      generation: how many there were.
      trainings: of members, so far.
      spread: the root mean square of half the differences of the pairs.
      norm: of the mean's distance from where it began.
      validation: of the mean, where it was validated.
    """

    generation: int
    trainings: int
    spread: float
    norm: float
    validation: Gain | None


class Found(NamedTuple):
    """What a search has come to.

    Attributes:
      rows: of all generations.
      mean: the latest.
      best: the mean that was best in a validation, or the start where none was better than the reference.
      validation: of the best; of the start, 0 by definition.
    """

    rows: list[Row]
    mean: Solution
    best: Solution
    validation: Gain


@dataclasses.dataclass(frozen=True)
class Search:
    """OpenAI-ES: pairs of members on the two sides of a mean, which Adam moves along an estimate of the gradient.

    The reference that losses are compared with is the same for the two of a pair, and cancels.

    Attributes:
      num_pairs: in a generation.
      std: of the members around the mean.
      learning_rate: of Adam, decayed to zero.
      generations: how many there are.
      validate_every: generations between validations.
      seed: decides the members.

    References:
      Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning, 2017.
    """

    num_pairs: int
    std: float
    learning_rate: float
    generations: int
    validate_every: int = 1
    seed: int = 0

    def run(
        self,
        objective: Objective,
        start: Solution,
        file: Path,
        *,
        report: Callable[[Found], None] = lambda found: None,
        deadline: float | None = None,
    ) -> Found:
        """Searches, or goes on from a file, to the same solution bit for bit.

        Args:
          objective: what is minimised. The start is its reference.
          start: the first mean.
          file: where the state is kept, written anew after every generation.
          report: called after every generation.
          deadline: value of `time.monotonic()` after which no further generation is begun.

        Raises:
          UsageError: if the file is damaged.
        """
        # Belongs to an extra, and only the search needs it.
        from evosax.algorithms import Open_ES
        from evosax.core.fitness_shaping import identity_fitness_shaping_fn

        schedule = optax.cosine_decay_schedule(self.learning_rate, self.generations)
        strategy = Open_ES(
            2 * self.num_pairs,
            start,
            optimizer=optax.adam(schedule, b1=0.8),
            std_schedule=optax.constant_schedule(self.std),
            fitness_shaping_fn=identity_fitness_shaping_fn,
        )
        settings = strategy.default_params
        key = jax.random.key(self.seed)
        with _evosax():
            state = strategy.init(key, start, settings)
        found = Found([], start, start, Gain(0.0, 0.0, 0.0, 0))
        if file.exists():
            state, found = _read(file, state, found)
        while len(found.rows) < self.generations and not (deadline is not None and time.monotonic() >= deadline):
            generation = len(found.rows)
            ask_key, tell_key = jax.random.split(jax.random.fold_in(key, generation))
            with _evosax():
                population, state = strategy.ask(ask_key, state, settings)
            members = [jax.tree.map(lambda leaf, i=i: leaf[i], population) for i in range(2 * self.num_pairs)]
            first, second = objective.losses(generation, members).reshape(2, -1)
            half = differences(first, second, _MAX_DIFFERENCE) / 2
            fitness = np.concatenate([half, -half]).astype(np.float32)
            with _evosax():
                state, _ = strategy.tell(tell_key, population, fitness, state, settings)
            found = self._next(found, objective, strategy.get_mean(state), half, start)
            _write(file, state, found)
            report(found)
        return found

    def _next(self, found: Found, objective: Objective, mean: Solution, half: np.ndarray, start: Solution) -> Found:
        """What the search has come to after one more generation, with a validation where one is due."""
        generation = len(found.rows) + 1
        is_due = generation % self.validate_every == 0 or generation == self.generations
        validation = objective.validate(mean) if is_due else None
        row = Row(
            generation,
            generation * 2 * self.num_pairs,
            float(np.sqrt(np.mean(half**2))),
            float(optax.tree.norm(optax.tree.sub(mean, start))),
            validation,
        )
        found = found._replace(rows=[*found.rows, row], mean=mean)
        if validation is not None and validation.mean > found.validation.mean:
            found = found._replace(best=mean, validation=validation)
        return found


def differences(first: np.ndarray, second: np.ndarray, bound: float) -> np.ndarray:
    """How much larger some losses are than others, within a bound.

    Args:
      first: losses. One that is not finite is larger than all that are, and as large as another such one.
      second: as many.
      bound: the largest difference, in either direction.
    """
    first, second = (np.where(np.isfinite(losses), losses, math.inf) for losses in (first, second))
    with np.errstate(invalid="ignore"):  # Where neither is finite.
        return np.nan_to_num(np.clip(first - second, -bound, bound), nan=0.0)


def _evosax() -> contextlib.AbstractContextManager[Any]:
    """Lets a vector be added to a matrix, as evosax does, whatever the user's setting is."""
    return jax.numpy_rank_promotion("allow")


def _write(file: Path, state: Any, found: Found) -> None:
    log = {"rows": found.rows, "validation": found.validation}
    save_state(file, (state, found.mean, found.best), log)


def _read(file: Path, state: Any, found: Found) -> tuple[Any, Found]:
    try:
        (state, mean, best), log = load_state(file, (state, found.mean, found.best))
    except UsageError as error:
        raise UsageError(f"{error} Remove it: the search begins anew.") from error
    rows = [Row(*row[:-1], validation=None if row[-1] is None else Gain(*row[-1])) for row in log["rows"]]
    return state, Found(rows, mean, best, Gain(*log["validation"]))
