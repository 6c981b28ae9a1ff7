"""Results as comparisons leave them, made by hand."""

from typing import Any

from wnn_jax.lab.comparing.results import Result
from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.trainer import Evaluation

ACCURACY = Metric("accuracy", higher_is_better=True, format=".1%")
LOSS = Metric("loss", higher_is_better=False)


def result(
    method: str, seed: int, accuracies: list[float], *, rate: float = 0.1, diverged: bool = False, **scores: Any
) -> Result:
    """A run evaluated every 10 steps, whose moving average is .1 below the weights, and whose losses are 1 minus them.

    Further evaluation weights are lists too.
    """
    weights = {"weights": accuracies, "EMA": [accuracy - 0.1 for accuracy in accuracies], **scores}
    evaluations = [
        Evaluation(
            step=10 * (index + 1),
            seconds=2.0 * (index + 1),
            train_loss=1.0,
            scores={name: {"accuracy": values[index], "loss": 1 - values[index]} for name, values in weights.items()},
            num_nowcasts=0,
            num_rejected=0,
        )
        for index in range(len(accuracies))
    ]
    description = {
        "task": {"name": "toy"},
        "method": {"name": method},
        "learning_rate": rate,
        "seed": seed,
        "num_steps": 10 * len(accuracies),
        "evaluate_every": 10,
    }
    return Result(description, (ACCURACY, LOSS), evaluations, evaluations[-1].scores, diverged)
