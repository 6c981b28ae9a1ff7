"""The reference of the site lists every public name."""

import re
from pathlib import Path

import pytest

import wnn_jax
from wnn_jax import averaging, convert, late_phase, nowcasters

API = Path(__file__).parents[2] / "docs" / "api"
MODULES = {module.__name__: module for module in (wnn_jax, nowcasters, averaging, late_phase, convert)}


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_has_every_public_name_of_a_module(name: str):
    page = (API / f"{name.removeprefix('wnn_jax.')}.md").read_text()
    public = {name for name, value in vars(MODULES[name]).items() if not name.startswith("_") and callable(value)}
    assert set(re.findall(r"auto(?:class|function):: (\w+)", page)) == public
