import numpy as np
import pytest

from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.tasks.data import batch_indices, check_batch_size


def test_recorded_results_rely_on_this_order():
    for seed, step in ((0, 0), (3, 5), (3, 7), (3, 6), (1, 1_000)):
        order = np.random.default_rng([seed, step // 3]).permutation(13).astype(np.int32)
        indices = batch_indices(seed, step, num_examples=13, batch_size=4)
        np.testing.assert_array_equal(indices, order[step % 3 * 4 : step % 3 * 4 + 4])
        assert indices.dtype == np.int32


def test_no_example_is_twice_in_an_epoch():
    epoch = np.concatenate([batch_indices(0, step, num_examples=13, batch_size=4) for step in range(3)])
    assert len(set(epoch.tolist())) == 12


def test_an_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        batch_indices(0, 0, num_examples=13, batch_size=4)[0] = 5


def test_batches_that_cannot_be_made_are_refused():
    check_batch_size(13, 13)
    with pytest.raises(UsageError, match="batch_size=14 is larger than the training set of 13 examples; choose"):
        check_batch_size(14, 13)
    with pytest.raises(UsageError, match="batch_size=0 must be positive"):
        check_batch_size(0, 13)
