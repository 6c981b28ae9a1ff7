"""Nowcasters as files: load what a command line names, and export a trained nowcaster with its record."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wnn_jax
from wnn_jax._drift import Drift
from wnn_jax._files import replace_on_success
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.output import load_rows

NOWCASTER_HELP = (
    "Nowcasters: a name from wnn_jax.available(), or the path of a saved nowcaster. Add `@SCALE` to scale its jumps: "
    "`linear@0.5`, `trained/nowcaster.npz`."
)

_SPECIFICATION = re.compile(r"(.*?)(?:@([^@/]+))?", re.DOTALL)
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def load_nowcaster(specification: str) -> tuple[str, wnn_jax.Nowcaster | Drift, float]:
    """Load a nowcaster that a command line names as `NAME-or-FILE[@SCALE]`. Other names are a `UsageError`.

    Returns:
      The label in tables (a file's stem stands for its path), the nowcaster, and the factor of its jumps.
    """
    match = _SPECIFICATION.fullmatch(specification)
    assert match is not None
    name, scale = match.groups()
    label = name if name in wnn_jax.available() else Path(name).stem
    try:
        factor = float(scale or 1)
    except ValueError as error:
        raise UsageError(f"the nowcaster {specification!r} cannot be used: {error}; give NAME or NAME@0.5") from error
    try:
        nowcaster = wnn_jax.load(name)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"the nowcaster {specification!r} cannot be used: {error}") from error
    return f"{label}@{scale}" if scale else label, nowcaster, factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained nowcaster and its record: `NAME.npz` and `NAME.json`."""

    nowcaster: Path
    """File of the nowcaster, `nowcaster.npz` in the output folder of `train`."""
    name: str
    """Name of the nowcaster, in lower case with hyphens."""
    output: Path = Path("params")
    """Folder to write to. Files in the `params/` of this repository are bundled."""
    evaluation: tuple[Path, ...] = ()
    """`summary.csv` of evaluations of this nowcaster. Its scores are added to the record."""


def export(options: Export) -> Path:
    """Export a nowcaster, and return its path. Scores of another nowcaster are a `UsageError`."""
    if not _NAME.fullmatch(options.name):
        raise UsageError(f"--name {options.name!r} must be of lower-case letters, digits and single hyphens.")
    try:
        nowcaster: Any = wnn_jax.load(options.nowcaster)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--nowcaster {options.nowcaster} cannot be used: {error}") from error
    class_name = type(nowcaster).__name__
    if not hasattr(nowcaster, "record"):
        raise UsageError(f"--nowcaster {options.nowcaster} is a {class_name}, which has no record: it is not trained.")
    record: dict[str, Any] = {"name": options.name, "class": class_name, **nowcaster.record}
    if options.evaluation:
        record["scores"] = _scores(options.evaluation, options.nowcaster, fingerprint(nowcaster))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}.npz"
    wnn_jax.save(dataclasses.replace(nowcaster, record=record), path)
    with replace_on_success(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _scores(evaluations: Sequence[Path], file: Path, expected: str) -> dict[str, dict[str, float]]:
    """Read the figures of a nowcaster, method -> figure -> value, from tables of methods.

    Its methods begin with the stem of its file, alone or followed by `@SCALE`, `~HORIZON` or `+SCHEDULE`.
    """
    scores: dict[str, dict[str, float]] = {}
    methods: set[str] = set()
    for path in evaluations:
        try:
            rows = load_rows(path)
            methods |= {row["method"] for row in rows}
        except (OSError, UnicodeDecodeError, KeyError) as error:
            raise UsageError(
                f"--evaluation {path} is no table of methods ({error}); give the `summary.csv` of an evaluation."
            ) from error
        for row in rows:
            method = row["method"]
            if not re.match(rf"{re.escape(file.stem)}([@~+]|$)", method):
                continue
            actual = row.get("fingerprint", "unknown")
            if actual != expected:
                raise UsageError(
                    f"--evaluation {path}: the nowcaster of the method {method!r} has the fingerprint {actual}, but "
                    f"--nowcaster {file} has {expected}. Evaluate this nowcaster again."
                )
            for name, value in row.items():
                with contextlib.suppress(ValueError):  # A name or a fingerprint.
                    scores.setdefault(method, {})[name] = float(value)
    if not scores:
        raise UsageError(f"--evaluation has no method of {file.stem!r}, only: {', '.join(sorted(methods))}.")
    return scores
