from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wnn_jax import default_roles
from wnn_jax.lab.tasks import models
from wnn_jax.lab.tasks.models import ARCHITECTURES, TransformerLM, VanillaCNN, describe_model, train_option
from wnn_jax.lab.tasks.models.unet import SegmentationUNet, UNet

NUM_CLASSES = 10
LANGUAGE_MODELS = {name for name in ARCHITECTURES if name.startswith("transformer")}
NORMALIZED = {"vgg", "resnet", "mobilenet-v2", "shufflenet-v2", "densenet"}


def example(name: str) -> jax.Array:
    if name in LANGUAGE_MODELS:
        return jax.random.randint(jax.random.key(1), [3, 7], 0, NUM_CLASSES)
    return jax.random.normal(jax.random.key(1), [3, 16, 16, 3])


def init(model: nn.Module, *inputs: jax.Array) -> Any:
    return model.init(jax.random.key(0), *inputs, **train_option(model, train=False))


def random_variables(model: nn.Module, *inputs: jax.Array) -> Any:
    """Variables of the shapes that `init` gives them, made by NumPy: to compile an `init` takes seconds."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(model, *inputs))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(-0.3, 0.5, leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("shape", [(8, 8, 1), (14, 14, 1), (32, 32, 3)])
@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - LANGUAGE_MODELS))
def test_images_of_any_size_become_logits(name: str, shape: tuple[int, ...]):
    model = ARCHITECTURES[name](NUM_CLASSES)
    images, options = jnp.zeros([2, *shape]), train_option(model, train=False)
    logits, _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, **options))
    assert logits.shape == (2, NUM_CLASSES)


# One of each kind, of few layers. The gradient of the DenseNet has NaNs without optimisations, by a fault of XLA's on
# CPU. Slow tests have the optimisations.
QUICK = {"mlp-64", "cnn-8-16", "three-conv-8-16-16", "resnet", "transformer-1x32"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(ARCHITECTURES)]
)
def test_every_parameter_is_trained(name: str):
    model, inputs = ARCHITECTURES[name](NUM_CLASSES), example(name)

    variables = dict(random_variables(model, inputs))
    params = variables.pop("params")

    def loss(params: Any) -> jax.Array:
        logits, _ = model.apply(
            {"params": params, **variables}, inputs, **train_option(model, train=True), mutable=list(variables)
        )
        labels = jnp.arange(logits.size // NUM_CLASSES).reshape(logits.shape[:-1]) % NUM_CLASSES
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.any(leaf), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", [*sorted(ARCHITECTURES), "unet"])
def test_networks_are_small_and_their_roles_are_known(name: str):
    if name == "unet":
        model, inputs = UNet(), (jnp.zeros([2, 14, 14, 1]), jnp.zeros([2]))
    else:
        model, inputs = ARCHITECTURES[name](NUM_CLASSES), (example(name),)
    variables = jax.eval_shape(lambda: init(model, *inputs))
    assert bool(train_option(model, train=True)) == ("batch_stats" in variables) == (name in NORMALIZED)
    params = variables["params"]
    assert 2_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 120_000
    known = {"wte": "embedding", "wpe": "embedding", "scale": "norm", "bias": "bias"}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), role in zip(leaves, jax.tree.leaves(default_roles(params)), strict=True):
        place = jax.tree_util.keystr(path)
        kernel = "conv" if "Conv" in place and leaf.ndim == 4 else "dense"
        assert role == next((role for part, role in known.items() if part in place), kernel), place


@pytest.mark.parametrize(
    "model", [TransformerLM(NUM_CLASSES), models.LSTM(NUM_CLASSES, 8)], ids=["transformer", "lstm"]
)
def test_a_language_model_does_not_see_what_follows(model: nn.Module):
    tokens = example("transformer-1x32")
    variables, apply = random_variables(model, tokens), jax.jit(model.apply)
    logits: Any = apply(variables, tokens)
    changed: Any = apply(variables, tokens.at[:, 4].set(tokens[:, 4] + 1))
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    assert np.all(np.any(logits[:, 4:] != changed[:, 4:], axis=-1))


def test_batch_norm_keeps_running_statistics():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), [64, 4, 4, 1])
    model = models.ConvNorm(1, kernel=1, relu=False)
    variables = init(model, x)
    variables["params"]["Conv_0"]["kernel"] = jnp.ones([1, 1, 1, 1])
    _, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
    stats: Any = changed["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean(), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var(), rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "sizes"),
    # The stem, two convolutions in the first stage, and in each further stage two and the shortcut.
    [
        (models.ResNet(), [(16, 16, 8)] * 3 + [(8, 8, 16)] * 3 + [(4, 4, 32)] * 3),
        (models.ResNet(10, (12, 24), stem_strides=2), [(8, 8, 12)] * 3 + [(4, 4, 24)] * 3),
    ],
)
def test_every_stage_of_a_residual_network_halves_the_image(model: nn.Module, sizes: list[tuple[int, ...]]):
    def apply() -> Any:
        images = jnp.zeros([1, 16, 16, 3])
        variables = init(model, images)
        return model.apply(variables, images, train=False, capture_intermediates=True, mutable="intermediates")[1]

    outputs = jax.eval_shape(apply)["intermediates"]
    assert [value["__call__"][0].shape[1:] for name, value in outputs.items() if name.startswith("Conv")] == sizes


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="sequences of 7 tokens; set max_length=4 to as many"):
        jax.eval_shape(lambda: init(TransformerLM(NUM_CLASSES, max_length=4), example("transformer-1x32")))


def test_a_unet_makes_images_and_knows_the_time_or_makes_logits():
    segmentation = SegmentationUNet(5, (4, 8))
    logits, _ = jax.eval_shape(lambda: segmentation.init_with_output(jax.random.key(0), jnp.zeros([2, 8, 8, 1])))
    assert logits.shape == (2, 8, 8, 5)
    images = jax.random.normal(jax.random.key(0), [2, 14, 14, 1])
    times = jnp.array([3, 700])
    model = UNet((4, 8))
    variables, apply = random_variables(model, images, times), jax.jit(model.apply)
    made: Any = apply(variables, images, times)
    assert made.shape == images.shape
    other: Any = apply(variables, images, jnp.array([3, 200]))
    np.testing.assert_array_equal(other[0], made[0])
    assert not np.allclose(other[1], made[1], atol=1e-4)


def test_max_pool_is_that_of_flax():
    images = jax.random.normal(jax.random.key(0), [2, 7, 8, 3])
    np.testing.assert_array_equal(models.max_pool(images), nn.max_pool(images, (2, 2), strides=(2, 2)))


@pytest.mark.parametrize(
    ("model", "num_params"),
    # Counted by hand from the papers' descriptions: 3x3 kernels and biases, then the dense layers.
    [
        (VanillaCNN(), 28 * 8 + 73 * 16 + 145 * 32 + 289 * 32 + (2 * 2 * 32 + 1) * 64 + 65 * 10),
        (models.ThreeConv(), 28 * 16 + 145 * 32 + 289 * 32 + 33 * 10),
    ],
)
def test_models_have_the_papers_sizes(model: nn.Module, num_params: int):
    params = jax.eval_shape(lambda: init(model, jnp.zeros([2, 32, 32, 3])))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params


def test_models_are_described_by_their_attributes():
    assert describe_model(models.MLP(widths=(8, 4))) == {"class": "MLP", "num_classes": 10, "widths": [8, 4]}
    assert describe_model(models.ResNet()) != describe_model(models.ResNet(stem_strides=2))
