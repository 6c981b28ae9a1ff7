from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

from experiments.late_phase import Calibration, calibration_error, outlier_auroc
from tests.lab.toys import NormalizedRegression
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data import load_digits
from wnn_jax.lab.tasks.models import MLP
from wnn_jax.lab.training.method import Method
from wnn_jax.lab.training.stages import TrainMembers
from wnn_jax.lab.training.trainer import Trainer
from wnn_jax.late_phase import module_mask, select_member, split_members


def make_task() -> Calibration:
    noise = np.random.default_rng(0).integers(17, size=[50, 8, 8, 1], dtype=np.uint8)
    outliers = {"validation": noise[:20], "test": noise[20:]}
    return Calibration(dataset=load_digits(), model=MLP(widths=(8,)), batch_size=16, outliers=outliers)


def test_the_calibration_error_by_hand():
    probabilities = jnp.array([[0.95, 0.05], [0.91, 0.09], [0.45, 0.55], [0.0, 1.0]])
    # Of ten intervals: three predictions in (.9, 1], two of them right; and a right one in (.5, .6].
    error = calibration_error(probabilities, jnp.array([0, 1, 1, 1]), num_bins=10)
    assert error == pytest.approx((abs(2 - 0.95 - 0.91 - 1.0) + abs(1 - 0.55)) / 4)


def test_outliers_are_told_as_well_as_scikit_learn_says():
    random = np.random.default_rng(0)
    # Of few values, so that there are ties.
    ordinary, outliers = random.integers(0, 9, size=70), random.integers(-2, 7, size=50)
    expected = roc_auc_score(np.repeat([1, 0], [70, 50]), np.concatenate([ordinary, outliers]))
    assert outlier_auroc(jnp.asarray(ordinary), jnp.asarray(outliers)) == pytest.approx(expected)


@pytest.mark.slow
def test_an_ensemble_is_measured_by_its_mean_probabilities():
    task = make_task()
    params, model_state = task.init(jax.random.key(0))
    mask = module_mask(params, "Dense_0")
    members = split_members(params, mask, jax.random.key(1), 1.0, num_members=3)
    (batch,) = task.evaluation_batches("test")

    @jax.jit
    def predict_one(params: Any, images: Any) -> jax.Array:
        logits: Any = task.model.apply({"params": params}, task.dataset.preprocess(images))
        return jax.nn.softmax(logits)

    def predict(images: Any) -> np.ndarray:
        return np.mean([predict_one(select_member(members, k), images) for k in range(3)], axis=0)

    probabilities, of_outliers = predict(batch["images"]), predict(batch["outliers"])
    of_label = probabilities[np.arange(len(batch["labels"])), batch["labels"]]
    expected = {
        "accuracy": np.mean(probabilities.argmax(axis=1) == batch["labels"]),
        "loss": -np.log(of_label).mean(),
        "calibration error": calibration_error(jnp.asarray(probabilities), batch["labels"]),
        "outlier AUROC": roc_auc_score(
            np.repeat([1, 0], [len(of_label), len(of_outliers)]),
            np.concatenate([probabilities.max(axis=1), of_outliers.max(axis=1)]),
        ),
    }
    measure = jax.jit(task.measure)
    sums = measure(members, model_state, batch)
    assert set(sums) == {metric.name for metric in task.metrics} == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name][0] / sums[name][1], value, rtol=1e-4, err_msg=name)
    alike = split_members(params, mask, jax.random.key(1), num_members=3)
    plain, same = (measure(network, model_state, batch) for network in (params, alike))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), plain, same)


def with_ensemble() -> Method:
    def optimizer(learning_rate: float, num_steps: int, first_cycle: int, cycle: int) -> Any:
        return optax.sgd(learning_rate)

    stage = TrainMembers(
        optimizer, num_members=2, mask=lambda params: module_mask(params, "Dense_0"), average_every=2, ensemble=True
    )
    return Method("ensemble", lambda rate, num_steps: optimizer(rate, num_steps, num_steps, 1), stages=(stage,))


@pytest.mark.slow
def test_members_are_read_as_an_ensemble_too():
    fitted = Trainer(make_task(), with_ensemble(), learning_rate=0.3, num_steps=16, moving_averages=()).fit(0)
    assert set(fitted.test) == {"weights", "SWA", "ensemble"}
    assert fitted.test["ensemble"] != fitted.test["weights"]
    assert fitted.test["ensemble"]["loss"] == pytest.approx(fitted.test["weights"]["loss"], rel=0.1)


def test_an_ensemble_that_no_task_measures_is_refused():
    with pytest.raises(
        UsageError, match="ensemble=True: NormalizedRegression cannot measure an ensemble; train a task"
    ):
        with_ensemble().stages[0].start(NormalizedRegression(), cast(Any, None), 0.3, 2, 0)
