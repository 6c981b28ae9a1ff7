"""What a compact history costs in accuracy: errors of forecasts from it, on trajectories that were held out.

    python -m benchmarks.history --collection small pooled | tee benchmarks/history.txt

Collections are made by `wnn-jax collect`. An error is the sum of absolute errors 5 snapshots ahead, as a
share of that of forecasting no change. `int8`, with one scale per tensor and snapshot, is no option of `nowcast`; it is
here to show what it would cost.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import wnn_jax
from wnn_jax._roles import ROLES
from wnn_jax._window import WindowRule
from wnn_jax.lab.forecasting.forecast_errors import forecast_errors
from wnn_jax.lab.forecasting.trajectories import load_trajectories
from wnn_jax.lab.training.keys import made_by

_HORIZON = 5
_FORMATS = ("full", "bfloat16", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class FromCompact:
    """A nowcaster that sees a history as it comes back from a compact one."""

    nowcaster: Any
    kept_as: str
    context = 5
    takes_horizon = True

    def __call__(self, history: Any, roles: Any, horizon: Any) -> Any:
        """Forecasts a tree of parameters."""
        *kept, last = history
        if self.kept_as == "int8":
            kept = [kept[0], *(jax.tree.map(_through_int8, kept[0], snapshot) for snapshot in kept[1:])]
        elif self.kept_as != "full":
            window = WindowRule(self, dtype=self.kept_as)
            snapshots = window.init(last).snapshots
            for slot, snapshot in enumerate(kept):
                snapshots = window.write(snapshots, jnp.int32(slot), snapshot)
            kept = window.read(snapshots)
        return self.nowcaster([*kept, last], roles, horizon if self.nowcaster.takes_horizon else None)


def _through_int8(first: jax.Array, snapshot: jax.Array) -> jax.Array:
    difference = snapshot - first
    scale = jnp.max(jnp.abs(difference)) / 127 + 1e-30
    return first + jnp.round(difference / scale) * scale


def main(collection: tuple[Path, ...], num_runs: int = 14) -> None:
    """Prints the table.

    Args:
      collection: folders of trajectories.
      num_runs: how many held-out runs to read.
    """
    runs = [run for run in load_trajectories(collection) if run.split != "train"][:num_runs]
    print(", ".join(f"{name} {value}" for name, value in made_by().items()))
    print(f"{len(runs)} held-out runs\n")
    print(f"{'nowcaster':>16}  {'role':>9}  " + "  ".join(f"{name:>8}" for name in _FORMATS))
    for name in ("pooled-linear", "wnn-plus", "wnn"):
        errors: dict[str, dict[str, float]] = {role: {} for role in (*ROLES, "all")}
        for kept_as in _FORMATS:
            sums = {role: [0.0, 0.0] for role in errors}
            for rows in forecast_errors(kept_as, FromCompact(wnn_jax.load(name), kept_as), 1.0, runs):
                for row in rows:
                    for role in (row["role"], "all") if row["horizon"] == _HORIZON else ():
                        sums[role][0] += row["error"]
                        sums[role][1] += row["no_change"]
            for role, (error, no_change) in sums.items():
                errors[role][kept_as] = error / no_change
        for role, of_role in errors.items():
            print(f"{name:>16}  {role:>9}  " + "  ".join(f"{of_role[kept]:8.4f}" for kept in _FORMATS), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
