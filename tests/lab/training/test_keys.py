import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import wnn_jax
from tests.lab.toys import LinearRegression, NormalizedRegression
from wnn_jax.lab.comparing.methods import standard_methods
from wnn_jax.lab.tasks.task import Metric
from wnn_jax.lab.training.keys import describe_method, describe_task, run_key
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.optimizers import BASE_OPTIMIZERS
from wnn_jax.lab.training.stages import TrainCoefficients

REPOSITORY = Path(__file__).parents[3]
TASK = LinearRegression()


def fingerprint(optimizer: Any, **changes: Any) -> str:
    method = dataclasses.replace(Method("one", lambda learning_rate, num_steps: optimizer), **changes)
    return describe_method(method, TASK, 0.1, 100)["fingerprint"]


def nowcasting(nowcaster: Any) -> Any:
    return optax.chain(optax.adam(0.1), wnn_jax.nowcast(nowcaster, snapshot_every=5))


def test_a_nowcaster_that_is_trained_again_is_another_one() -> None:
    nowcaster: Any = wnn_jax.load("adaptive-linear")
    trained_again = dataclasses.replace(
        nowcaster, params=jax.tree.map(lambda leaf: leaf * (1 + 1e-6), nowcaster.params)
    )
    renamed = dataclasses.replace(nowcaster, record={"name": "another"})
    assert fingerprint(nowcasting(nowcaster)) == fingerprint(nowcasting(renamed))
    assert fingerprint(nowcasting(nowcaster)) != fingerprint(nowcasting(trained_again))


def test_a_recipe_that_is_changed_is_another_one() -> None:
    same = {fingerprint(optax.adam(0.1)) for _ in range(2)}
    changed = {
        fingerprint(optax.adam(0.2)),
        fingerprint(optax.adam(0.1, b2=0.99)),
        fingerprint(optax.sgd(0.1)),
        fingerprint(optax.adam(optax.cosine_decay_schedule(0.1, 100))),
        fingerprint(optax.adam(optax.cosine_decay_schedule(0.1, 200))),
        fingerprint(optax.adam(0.1), stages=(TrainCoefficients(),)),
        fingerprint(optax.adam(0.1), stages=(TrainCoefficients(bits=4),)),
    }
    assert len(same) == 1
    assert len(changed) == 7
    assert not same & changed


def test_a_task_whose_computation_changes_is_another_one() -> None:
    class Other(LinearRegression):
        def loss(self, params: Any, model_state: Any, batch: Any, key: jax.Array) -> Any:
            loss, rest = super().loss(params, model_state, batch, key)
            return 2 * loss, rest

    class OtherData(LinearRegression):
        def batch(self, seed: int, step: int) -> Any:
            inputs, targets = super().batch(seed, step)
            return inputs, targets + (step >= 1_000)

    other_metric = Metric("mse", higher_is_better=False, from_mean=lambda mean: 2 * mean)
    for task in (OtherData(), LinearRegression(metrics=(other_metric, *TASK.metrics[1:]))):
        assert describe_task(task)["fingerprint"] != describe_task(TASK)["fingerprint"]
    assert Other().describe() == TASK.describe()
    assert describe_task(TASK) == describe_task(LinearRegression())
    assert describe_task(Other())["fingerprint"] != describe_task(TASK)["fingerprint"]
    assert describe_task(NormalizedRegression())["fingerprint"] != describe_task(TASK)["fingerprint"]


def test_a_key_is_of_the_content_and_not_of_its_order() -> None:
    assert run_key({"a": 1, "b": [2.0, {"c": None}]}) == run_key({"b": [2.0, {"c": None}], "a": 1})
    assert run_key({"a": 1}) != run_key({"a": 2})


@pytest.mark.slow
def test_fingerprints_are_the_same_in_every_process() -> None:
    program = (
        "from tests.lab.training.test_keys import *\n"
        "methods = standard_methods(BASE_OPTIMIZERS['adam'])\n"
        "print(*(describe_method(method, TASK, 0.1, 100)['fingerprint'] for method in methods.values()))\n"
        "print(describe_task(NormalizedRegression())['fingerprint'], fingerprint(nowcasting('wnn')))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=REPOSITORY
    ).stdout
    fingerprints = output.split()
    methods = standard_methods(BASE_OPTIMIZERS["adam"])
    expected = [describe_method(method, TASK, 0.1, 100)["fingerprint"] for method in methods.values()]
    expected += [describe_task(NormalizedRegression())["fingerprint"], fingerprint(nowcasting("wnn"))]
    assert fingerprints == expected
    assert len(set(fingerprints)) == len(fingerprints)
