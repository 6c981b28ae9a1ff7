from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.pretraining import Pretrain, pretrain
from tests.lab.tasks.conformance import assert_equal
from tests.lab.tasks.synthetic import use_synthetic_data
from wnn_jax.lab.tasks.data import load_dataset
from wnn_jax.lab.tasks.fine_tuning import FineTuning, load_params, shakespeare_half


@pytest.mark.slow
def test_the_weights_at_the_end_are_those_that_fine_tuning_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_synthetic_data(monkeypatch)
    file = tmp_path / "weights.npz"
    fitted = pretrain(Pretrain(num_steps=2, output=file, data_dir=tmp_path))
    task = FineTuning(shakespeare_half("second", load_dataset("tiny_shakespeare", tmp_path)), load_params(file))
    assert_equal(jax.tree.map(np.asarray, fitted.state.params), task.pretrained)
