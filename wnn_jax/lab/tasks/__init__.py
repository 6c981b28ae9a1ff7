"""Tasks by name: what is trained, to make nowcasters and to compare methods.

A new task is a line in `TASKS`. A new kind of task is also a file in this folder, with a class that has the members of
`Task`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from wnn_jax.lab.errors import look_up
from wnn_jax.lab.tasks.control import PendulumControl
from wnn_jax.lab.tasks.data import check_datasets, load_dataset
from wnn_jax.lab.tasks.data.datasets import Augment, random_affine, random_mirror
from wnn_jax.lab.tasks.fine_tuning import PRETRAINED, FineTuning, LowRankFineTuning, load_params, shakespeare_half
from wnn_jax.lab.tasks.image_classification import ImageClassification
from wnn_jax.lab.tasks.image_regression import Denoising, Reconstruction
from wnn_jax.lab.tasks.language_model import LanguageModel, transformer_task
from wnn_jax.lab.tasks.models import LSTM, MLP, ResNet, ThreeConv, VanillaCNN
from wnn_jax.lab.tasks.models.unet import SegmentationUNet, UNet
from wnn_jax.lab.tasks.segmentation import Segmentation, compose_scenes
from wnn_jax.lab.tasks.task import Metric as Metric
from wnn_jax.lab.tasks.task import Task as Task


class Entry(NamedTuple):
    """The name of a data set, or `None`, and a function that makes a task of the data."""

    dataset: str | None
    make: Callable[[Any], Task]


def _classify(dataset: str, model: nn.Module, batch_size: int = 128, augment: Augment | None = None) -> Entry:
    options: dict[str, Any] = {"model": model, "batch_size": batch_size, "augment": augment}
    return Entry(dataset, lambda images: ImageClassification(dataset=images, **options))


def _fine_tune(kind: type[FineTuning]) -> Entry:
    return Entry("tiny_shakespeare", lambda text: kind(shakespeare_half("second", text), load_params(PRETRAINED)))


TASKS: Mapping[str, Entry] = {
    # Seconds, and no download.
    "digits-cnn": _classify("digits", VanillaCNN(features=(8, 16), hidden=(32,)), 64),
    "mnist-mlp": _classify("mnist", MLP(widths=(64,))),
    # Small enough to compare many methods. No family has a network of these widths.
    "cifar10-16-three-conv": _classify("cifar10-16", ThreeConv(features=(16, 24, 24))),
    "cifar10-16-resnet": _classify("cifar10-16", ResNet(features=(8, 16, 32)), augment=random_mirror),
    # The experiment of Jang et al., ICML 2023, and the same at a quarter of the pixels.
    "cifar10-vanilla": _classify("cifar10", VanillaCNN(), 1024, random_affine),
    "cifar10-16-vanilla": _classify("cifar10-16", VanillaCNN(), 1024, random_affine),
    # The tasks C10/16, C10/32, C100/32, FM/16 and FM/32 of Knyazev et al., ICLR 2025.
    "cifar10-three-conv": _classify("cifar10", ThreeConv(features=(16, 32, 32))),
    "cifar10-three-conv-32": _classify("cifar10", ThreeConv(features=(32, 64, 64))),
    "cifar100-three-conv-32": _classify("cifar100", ThreeConv(num_classes=100, features=(32, 64, 64))),
    "fashion-mnist-three-conv": _classify("fashion-mnist", ThreeConv(features=(16, 32, 32))),
    "fashion-mnist-three-conv-32": _classify("fashion-mnist", ThreeConv(features=(32, 64, 64))),
    "imagenet-64-resnet": _classify(
        "imagenet-64", ResNet(num_classes=1_000, features=(32, 64, 128, 256), stem_strides=2), augment=random_mirror
    ),
    # Images of 14x14 pixels through a layer of 16.
    "mnist-autoencoder": Entry(
        "mnist-14",
        lambda images: Reconstruction(dataset=images, model=MLP(14 * 14, (128, 64, 16, 64, 128)), batch_size=128),
    ),
    "mnist-diffusion": Entry("mnist-14", lambda images: Denoising(dataset=images, model=UNet(), batch_size=64)),
    "cifar10-16-diffusion": Entry(
        "cifar10-16", lambda images: Denoising(dataset=images, model=UNet((16, 32)), batch_size=16)
    ),
    "mnist-segmentation": Entry(
        "mnist",
        lambda digits: Segmentation(
            dataset=compose_scenes(digits), model=SegmentationUNet(11, (8, 16, 32)), batch_size=16
        ),
    ),
    "shakespeare-transformer": Entry("tiny_shakespeare", transformer_task),
    "shakespeare-lstm": Entry(
        "tiny_shakespeare",
        lambda text: LanguageModel(dataset=text, model=LSTM(text.vocab_size), batch_size=32, context_length=64),
    ),
    "shakespeare-fine-tuning": _fine_tune(FineTuning),
    "shakespeare-lora": _fine_tune(LowRankFineTuning),
    # The experiment of Jang et al., ICML 2023. The first layer of their critic is two, for observations and actions.
    "pendulum-ddpg": Entry(None, lambda _: PendulumControl(actor=MLP(1, (64, 32, 16)), critic=MLP(1, (64, 32, 16)))),
}


@functools.cache
def load_task(name: str, data_dir: Path) -> Task:
    """Make a task by its name, once per process. An unknown name or a missing data set is a `UsageError`."""
    dataset, make = look_up(TASKS, name, "the task")
    return make(None if dataset is None else load_dataset(dataset, data_dir))


def load_tasks(names: Sequence[str], data_dir: Path) -> dict[str, Task]:
    """Make several tasks by their names. All missing data sets are listed at once, before any is loaded."""
    datasets = [look_up(TASKS, name, "the task").dataset for name in names]
    check_datasets(filter(None, datasets), data_dir)
    return {name: load_task(name, data_dir) for name in names}
