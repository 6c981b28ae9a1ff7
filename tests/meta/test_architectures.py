from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wnn_jax import default_roles
from wnn_jax.meta.architectures import ARCHITECTURES, LANGUAGE_MODELS, BatchNorm, TransformerLM, max_pool

IMAGE_MODELS = sorted(set(ARCHITECTURES) - LANGUAGE_MODELS)
NUM_CLASSES = 10


def example(name: str) -> jax.Array:
    if name in LANGUAGE_MODELS:
        return jax.random.randint(jax.random.key(1), [3, 7], 0, NUM_CLASSES)
    return jax.random.normal(jax.random.key(1), [3, 16, 16, 3])


def init(name: str, inputs: jax.Array) -> Any:
    return ARCHITECTURES[name](NUM_CLASSES).init(jax.random.key(0), inputs)["params"]


@pytest.mark.parametrize("shape", [(8, 8, 1), (14, 14, 1), (16, 16, 3), (32, 32, 3)])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_images_of_any_size_become_logits(name: str, shape: tuple[int, ...]):
    model = ARCHITECTURES[name](NUM_CLASSES)
    if name == "vanilla" and shape[0] < 16:
        pytest.skip("four poolings leave nothing of fewer than 16x16 pixels")
    logits, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), jnp.zeros([2, *shape]))
    assert logits.shape == (2, NUM_CLASSES)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_parameter_is_trained(name: str):
    inputs = example(name)
    params = jax.jit(lambda: init(name, inputs))()

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits = ARCHITECTURES[name](NUM_CLASSES).apply({"params": params}, inputs)
            assert isinstance(logits, jax.Array)
            labels = jnp.arange(logits.size // NUM_CLASSES).reshape(logits.shape[:-1]) % NUM_CLASSES
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_size_suits_a_cpu(name: str):
    params = jax.eval_shape(lambda: init(name, example(name)))
    assert 2_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 120_000


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_roles_are_known(name: str):
    params = jax.eval_shape(lambda: init(name, example(name)))
    for (path, leaf), role in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(default_roles(params)), strict=True
    ):
        place = jax.tree_util.keystr(path)
        if "wte" in place or "wpe" in place:
            assert role == "embedding"
        elif "scale" in place:
            assert role == "norm"
        elif "bias" in place:
            assert role == "bias"
        else:
            assert role == ("conv" if "Conv" in place and leaf.ndim == 4 else "dense"), place


def test_batch_norm_normalises_the_batch():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), [64, 4, 4, 5])
    normalized, _ = BatchNorm().init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(normalized.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std(axis=(0, 1, 2)), 1, atol=1e-4)


def test_a_language_model_does_not_see_what_follows():
    model = TransformerLM(NUM_CLASSES)
    tokens = example("transformer-1x32")
    params = model.init(jax.random.key(0), tokens)
    logits, changed = model.apply(params, tokens), model.apply(params, tokens.at[:, 4].set(tokens[:, 4] + 1))
    assert isinstance(logits, jax.Array)
    assert isinstance(changed, jax.Array)
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    assert np.all(np.any(logits[:, 4:] != changed[:, 4:], axis=-1))


def test_max_pool_is_that_of_flax():
    import flax.linen as nn

    images = jax.random.normal(jax.random.key(0), [2, 7, 8, 3])
    np.testing.assert_array_equal(max_pool(images), nn.max_pool(images, (2, 2), strides=(2, 2)))
