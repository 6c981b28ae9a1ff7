import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import wnn_jax

# Packages of the extras. Training neither needs them nor waits for their import.
_OPTIONAL = "tensorflow torch h5py orbax matplotlib tensorflow_datasets sklearn PIL haiku equinox"
_PUBLIC = """
nowcast NowcastState Nowcaster leafwise load metrics save available decaying_horizon default_roles nowcasters
nowcasters.WNN nowcasters.WNNPlus nowcasters.PooledLinear nowcasters.NiNo nowcasters.neural_graph
nowcasters.CurveFit nowcasters.Drift convert
convert.keras_wnn convert.nino convert.nino_mlp averaging late_phase
averaging.WeightHistory averaging.uniform averaging.uniform_eval_params averaging.lawa averaging.lawa_eval_params
averaging.ema averaging.ema_eval_params averaging.Subspace averaging.make_subspace averaging.init_coefficients
averaging.combine averaging.averaging_coefficients averaging.project_onto_subspace averaging.update_batch_stats
late_phase.late_phase late_phase.LatePhaseState late_phase.SplitParams late_phase.split_members
late_phase.select_member late_phase.average_members late_phase.ensemble_predict late_phase.migrate_state
late_phase.norm_mask
"""
OPTIONAL, PUBLIC = _OPTIONAL.split(), _PUBLIC.split()


def public(name: str) -> Any:
    found = wnn_jax
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.fixture(scope="module")
def imported() -> dict[str, list[str]]:
    """What `import wnn_jax` leaves in a fresh interpreter, where no test has imported any more of it."""
    script = (
        "import json, sys, wnn_jax; print(json.dumps({'modules': list(sys.modules), 'names': list(vars(wnn_jax))}))"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def test_import_brings_no_optional_dependency(imported: dict[str, list[str]]):
    packages = {name.split(".")[0] for name in imported["modules"]}
    assert "wnn_jax" in packages
    assert packages.isdisjoint(OPTIONAL)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str):
    documented = inspect.getdoc(public(name))
    assert documented
    assert not documented.startswith(f"{name.split('.')[-1]}("), "made by dataclass or NamedTuple"


@pytest.mark.parametrize("cls", ["WNN", "WNNPlus", "PooledLinear", "NiNo"])
@pytest.mark.parametrize("method", ["init", "__call__"])
def test_public_methods_are_documented(cls: str, method: str):
    assert inspect.getdoc(getattr(public(f"nowcasters.{cls}"), method))


def test_nothing_else_is_public(imported: dict[str, list[str]]):
    names = {name for name in imported["names"] if not name.startswith("_")}
    assert names == {name for name in PUBLIC if "." not in name}
