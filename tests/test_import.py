import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import wnn_jax

# Of the extras, or of what these bring: nobody should need them, or wait for them, to train.
OPTIONAL = (
    "tensorflow",
    "torch",
    "h5py",
    "orbax",
    "matplotlib",
    "tensorflow_datasets",
    "sklearn",
    "PIL",
    "haiku",
    "equinox",
)

PUBLIC = (
    "nowcast",
    "NowcastState",
    "Nowcaster",
    "leafwise",
    "load",
    "save",
    "available",
    "default_roles",
    "nowcasters",
    "nowcasters.WNN",
    "nowcasters.CurveFit",
    "convert",
    "convert.keras_wnn",
)


def public(name: str) -> Any:
    found = wnn_jax
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.fixture(scope="module")
def imported_modules() -> set[str]:
    """The top-level modules that `import wnn_jax` leaves in a fresh interpreter."""
    script = "import json, sys, wnn_jax; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return {name.split(".")[0] for name in json.loads(output)}


@pytest.mark.parametrize("module", OPTIONAL)
def test_import_brings_no_optional_dependency(imported_modules: set[str], module: str):
    assert "wnn_jax" in imported_modules
    assert module not in imported_modules


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str):
    documented = inspect.getdoc(public(name))
    assert documented
    assert not documented.startswith(f"{name.split('.')[-1]}("), "made by dataclass or NamedTuple"


@pytest.mark.parametrize("method", [wnn_jax.nowcasters.WNN.init, wnn_jax.nowcasters.WNN.__call__])
def test_public_methods_are_documented(method: Any):
    assert inspect.getdoc(method)


def test_nothing_else_is_public():
    names = {name for name in vars(wnn_jax) if not name.startswith("_")}
    assert names == {name for name in PUBLIC if "." not in name}
