from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lab.tasks.conformance import abstract, assert_equal
from tests.lab.tasks.synthetic import synthetic_images, synthetic_text, use_synthetic_data
from wnn_jax import default_roles
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks import Task, load_task
from wnn_jax.lab.tasks.fine_tuning import FineTuning, LowRankFineTuning, load_params, save_params, shakespeare_half
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.language_model import LanguageModel
from wnn_jax.lab.tasks.models import MLP, TransformerLM


def make_params(base: Task) -> Any:
    """Parameters of the shapes that `init` gives them, made by NumPy: to compile an `init` takes seconds."""
    rng = np.random.default_rng(0)
    shapes, _ = jax.eval_shape(base.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.uniform(-0.1, 0.1, leaf.shape).astype(leaf.dtype), shapes)


BASE = ImageClassification(dataset=synthetic_images("mnist-14"), model=MLP(widths=(16,)), batch_size=16)
PARAMS = make_params(BASE)
TRANSFORMER = LanguageModel(
    dataset=synthetic_text(), model=TransformerLM(65, width=8, num_heads=2), batch_size=8, context_length=8
)
TRANSFORMER_PARAMS = make_params(TRANSFORMER)


def test_fine_tuning_begins_with_the_pretrained_parameters():
    task = FineTuning(BASE, PARAMS)
    for seed in range(2):
        params, model_state = task.init(jax.random.key(seed))
        assert_equal(jax.tree.map(np.asarray, task.network(params)), PARAMS)
        assert model_state == {}
    task = LowRankFineTuning(BASE, PARAMS)
    init = jax.jit(task.init)
    first, other = (init(jax.random.key(seed))[0] for seed in range(2))
    assert_equal(jax.tree.map(np.asarray, task.network(first)), PARAMS)
    assert abstract(first) == abstract(other)
    assert np.any(first["Dense_0"]["kernel"]["a"] != other["Dense_0"]["kernel"]["a"])


def test_adapters_are_added_to_dense_kernels_alone():
    task = LowRankFineTuning(TRANSFORMER, TRANSFORMER_PARAMS)
    params = make_params(task)
    expected = jax.tree.map(np.copy, TRANSFORMER_PARAMS)
    attention, adapters = "MultiHeadDotProductAttention_0", params["MultiHeadDotProductAttention_0"]
    for name in ("query", "key", "value"):
        kernel = adapters[name]["kernel"]
        # `[d_model, heads, head_dim]`, a matrix of `d_model` rows.
        expected[attention][name]["kernel"] += 2 * np.einsum("ir,rhd->ihd", kernel["a"], kernel["b"].reshape(4, 2, 4))
    out = adapters["out"]["kernel"]
    # `[heads, head_dim, d_model]`, a matrix of `d_model` columns.
    expected[attention]["out"]["kernel"] += 2 * np.einsum("hdr,ro->hdo", out["a"].reshape(2, 4, 4), out["b"])
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        expected[name]["kernel"] += 2 * params[name]["kernel"]["a"] @ params[name]["kernel"]["b"]
    # A nowcaster sees adapters as matrices.
    assert jax.tree.leaves(default_roles(params)) == ["dense"] * 2 * 7
    network = task.network(params)
    assert abstract(network) == abstract(TRANSFORMER_PARAMS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), network, expected)


def test_the_key_is_of_the_pretrained_parameters_and_of_the_adapters():
    others = jax.tree.map(lambda leaf: leaf + np.float32(0.1), PARAMS)
    kinds = (FineTuning, LowRankFineTuning)
    descriptions = [kind(BASE, params).describe() for kind in kinds for params in (PARAMS, others)]
    assert len({str(description) for description in descriptions}) == 4
    assert len({description["sha256"] for description in descriptions}) == 2


def test_halves_of_the_text_have_nothing_in_common():
    whole = synthetic_text()
    first, second = shakespeare_half("first", whole), shakespeare_half("second", whole)
    np.testing.assert_array_equal(np.concatenate([first.dataset.train, second.dataset.train]), whole.train)
    assert len(first.dataset.train) == len(second.dataset.train) == 10_000
    for half in (first, second):
        np.testing.assert_array_equal(half.dataset.validation, whole.validation)
        np.testing.assert_array_equal(half.dataset.test, whole.test)


@pytest.mark.parametrize("name", ["shakespeare-fine-tuning", "shakespeare-lora"])
def test_what_is_bundled_is_a_network_of_the_task(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_synthetic_data(monkeypatch)
    task: Any = load_task(name, tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(task.pretrained))
    assert task.base.describe() == shakespeare_half("second", synthetic_text()).describe()


def test_parameters_are_read_as_they_were_written(tmp_path: Path):
    save_params(jax.tree.map(jnp.asarray, PARAMS), tmp_path / "params")
    assert_equal(load_params(tmp_path / "params"), PARAMS)


def test_parameters_of_another_network_are_refused():
    for params in ({}, TRANSFORMER_PARAMS):
        with pytest.raises(UsageError, match="pretrained has other shapes than the task's network; give weights of a"):
            FineTuning(BASE, params)
