"""Data sets, the order of their examples, and their augmentation."""

from wnn_jax.lab.tasks.data.augmentation import Augment as Augment
from wnn_jax.lab.tasks.data.augmentation import describe_augment as describe_augment
from wnn_jax.lab.tasks.data.augmentation import random_affine as random_affine
from wnn_jax.lab.tasks.data.augmentation import random_mirror as random_mirror
from wnn_jax.lab.tasks.data.datasets import DATASETS as DATASETS
from wnn_jax.lab.tasks.data.datasets import Dataset as Dataset
from wnn_jax.lab.tasks.data.datasets import MissingDatasetError as MissingDatasetError
from wnn_jax.lab.tasks.data.datasets import Source as Source
from wnn_jax.lab.tasks.data.datasets import available_datasets as available_datasets
from wnn_jax.lab.tasks.data.datasets import check_datasets as check_datasets
from wnn_jax.lab.tasks.data.datasets import load_dataset as load_dataset
from wnn_jax.lab.tasks.data.datasets import load_images as load_images
from wnn_jax.lab.tasks.data.datasets import load_text as load_text
from wnn_jax.lab.tasks.data.images import ImageDataset as ImageDataset
from wnn_jax.lab.tasks.data.images import LabeledImages as LabeledImages
from wnn_jax.lab.tasks.data.images import load_digits as load_digits
from wnn_jax.lab.tasks.data.order import batch_indices as batch_indices
from wnn_jax.lab.tasks.data.order import check_batch_size as check_batch_size
from wnn_jax.lab.tasks.data.text import TextDataset as TextDataset
