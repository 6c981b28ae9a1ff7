"""Files that are damaged or missing: this is noticed with one line that names the file, or it changes nothing."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import wnn_jax
from tests.properties import lab_cases
from tests.properties.lab_cases import Subject
from tests.properties.strategies import damaged, num_examples
from wnn_jax.nowcasters import WNN, CurveFit, Drift


def _nowcaster_file(make: Any) -> Subject:
    def read(folder: Path) -> dict[str, Any]:
        nowcaster: Any = wnn_jax.load(folder / "nowcaster.npz")
        settings = {field.name: getattr(nowcaster, field.name) for field in dataclasses.fields(nowcaster)}
        weights = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(dict(settings.pop("params", {})))]
        return {"class": type(nowcaster), "settings": settings, "weights": weights}

    return Subject(lambda folder: wnn_jax.save(make(), folder / "nowcaster.npz"), read, (ValueError, FileNotFoundError))


_SUBJECTS = {
    "curve fit": _nowcaster_file(lambda: CurveFit("sigmoid", chunk_size=100)),
    "drift": _nowcaster_file(lambda: Drift(gain=0.04, max_rows=None)),
    "network": _nowcaster_file(lambda: WNN.init(jax.random.key(0), ("bias",))),
    **lab_cases.SUBJECTS,
}


@functools.cache
def _whole(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a subject, and what they hold."""
    with tempfile.TemporaryDirectory() as folder:
        _SUBJECTS[name].write(Path(folder))
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}, dict(
            _SUBJECTS[name].read(Path(folder))
        )


@pytest.mark.parametrize("name", _SUBJECTS)
@hypothesis.settings(max_examples=num_examples(3))
@hypothesis.given(data=st.data())
def test_damage_is_noticed_or_harmless(name: str, data: st.DataObject):
    (files, expected), subject = _whole(name), _SUBJECTS[name]
    chosen = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(st.one_of(damaged(files[chosen]), st.none()))
    with tempfile.TemporaryDirectory() as folder:
        for file, whole in {**files, chosen: content}.items():
            if whole is not None:
                (Path(folder) / file).write_bytes(whole)
        try:
            found = subject.read(Path(folder))
        except subject.error as error:
            message = str(error)
            assert folder in message
            assert "\n" not in message
        else:
            # A run whose record is missing was not finished.
            missing = expected.keys() - found.keys()
            assert not missing or content is None
            assert found == {key: value for key, value in expected.items() if key not in missing}
