"""Files that are damaged or missing: one line that names the file says so, or it changes nothing."""

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
from tests.properties.lab_cases import FILES, Files
from tests.properties.strategies import damaged, num_examples
from wnn_jax.nowcasters import Drift


def _nowcaster_file(nowcaster: Any) -> Files:
    def read(folder: Path) -> dict[str, Any]:
        loaded: Any = wnn_jax.load(folder / "nowcaster.npz")
        settings = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
        weights = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(dict(settings.pop("params", {})))]
        return {"class": type(loaded), "settings": settings, "weights": weights}

    return Files(lambda folder: wnn_jax.save(nowcaster(), folder / "nowcaster.npz"), read, (ValueError, OSError))


_FILES = {
    "rule": _nowcaster_file(lambda: Drift(gain=0.04, max_rows=None)),
    "network": _nowcaster_file(lambda: wnn_jax.load("wnn")),
    **FILES,
}


@functools.cache
def _written(name: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files, and what they hold."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _FILES[name].write(folder)
        # A lock file holds nothing.
        files = {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}
        return files, dict(_FILES[name].read(folder))


@pytest.mark.parametrize("name", _FILES)
@hypothesis.settings(max_examples=num_examples(5))
@hypothesis.given(data=st.data())
def test_damage_is_noticed_or_harmless(name: str, data: st.DataObject):
    files, expected = _written(name)
    chosen = data.draw(st.sampled_from(sorted(files)))
    content = data.draw(st.one_of(damaged(files[chosen]), st.none()))
    with tempfile.TemporaryDirectory() as folder:
        for file, whole in {**files, chosen: content}.items():
            if whole is not None:
                Path(folder, file).write_bytes(whole)
        message = ""
        try:
            found = _FILES[name].read(Path(folder))
        except _FILES[name].errors as error:
            found, message = expected, str(error)
        assert not message or folder in message
        assert "\n" not in message
        # A run without its record was not finished.
        assert found.keys() == expected.keys() or content is None
        assert found == {key: expected[key] for key in found}
