"""Nowcasters as a command line names them."""

import re
from pathlib import Path

import wnn_jax
from wnn_jax.lab.errors import UsageError

NOWCASTER_HELP = (
    "Nowcasters: a name from wnn_jax.available(), or the path of a saved one. `@SCALE` behind it scales its jumps: "
    "`linear@0.5`, `trained/nowcaster.npz`."
)

_SPECIFICATION = re.compile(r"(?P<name>.+?)(@(?P<scale>[^@/]+))?")


def load_nowcaster(specification: str) -> tuple[str, wnn_jax.Nowcaster | wnn_jax.nowcasters.Drift, float]:
    """Loads what a command line names.

    Args:
      specification: `NAME-or-FILE[@SCALE]`.

    Returns:
      The label in tables, which has the stem of a file in place of its path, the nowcaster, and the factor of its
      jumps.

    Raises:
      UsageError: if the nowcaster cannot be loaded, or the factor is no number.
    """
    try:
        match = _SPECIFICATION.fullmatch(specification)
        if match is None:
            raise ValueError("it is not of the form NAME-or-FILE[@SCALE]")
        nowcaster = wnn_jax.load(match["name"])
        scale = _number(match["scale"] or "1")
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"the nowcaster {specification!r} cannot be used: {error}") from error
    suffix = f"@{match['scale']}" if match["scale"] else ""
    is_file = match["name"] not in wnn_jax.available()
    return f"{Path(match['name']).stem if is_file else match['name']}{suffix}", nowcaster, scale


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"@{text} is no number; give a factor such as @0.5") from None
