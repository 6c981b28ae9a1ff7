"""Exporting a trained nowcaster with its record."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wnn_jax
from wnn_jax._files import replace_on_success
from wnn_jax._store import fingerprint
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.output import load_rows

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained nowcaster and its record: `NAME.npz` and `NAME.json`."""

    nowcaster: Path
    """File of the nowcaster, `nowcaster.npz` in the output folder of `train`."""
    name: str
    """Name to give it, in lower case with hyphens."""
    output: Path = Path("params")
    """Folder to write to. What is in this repository's `params/` is bundled."""
    evaluation: tuple[Path, ...] = ()
    """`summary.csv` of evaluations of this very nowcaster, to put the scores of its methods into the record."""
    default_horizon: int | None = None
    """Snapshots ahead that it forecasts where none is asked for. Default: as it was trained."""


def export(options: Export) -> Path:
    """Exports a nowcaster.

    Returns:
      The path of the nowcaster.

    Raises:
      UsageError: if an option cannot be used, or scores are those of another nowcaster.
    """
    if not _NAME.fullmatch(options.name):
        raise UsageError(f"--name {options.name!r} must be of lower-case letters, digits and single hyphens.")
    try:
        nowcaster: Any = wnn_jax.load(options.nowcaster)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--nowcaster {options.nowcaster} cannot be used: {error}") from error
    settings = {field.name for field in dataclasses.fields(nowcaster)}
    if "record" not in settings:
        raise UsageError(
            f"--nowcaster {options.nowcaster} is a {type(nowcaster).__name__}, which has no record: it is not trained."
        )
    record: dict[str, Any] = {"name": options.name, "class": type(nowcaster).__name__, **nowcaster.record}
    changes: dict[str, Any] = {}
    if options.default_horizon is not None:
        if "default_horizon" not in settings:
            raise UsageError(f"--default-horizon {options.default_horizon}: a {type(nowcaster).__name__} takes none.")
        changes["default_horizon"] = record["default_horizon"] = options.default_horizon
    if options.evaluation:
        record["scores"] = _scores(options.evaluation, options.nowcaster, fingerprint(nowcaster))
    try:
        exported = dataclasses.replace(nowcaster, record=record, **changes)
    except ValueError as error:
        raise UsageError(f"--default-horizon: {error}") from error
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}.npz"
    wnn_jax.save(exported, path)
    with replace_on_success(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _scores(evaluations: Sequence[Path], file: Path, expected: str) -> dict[str, dict[str, float]]:
    """The figures of a nowcaster's methods.

    A method is the name of the nowcaster's file, with `@SCALE`, `~HORIZON` or a schedule such as `+cosine` behind it.

    Args:
      evaluations: tables with the columns `method` and `fingerprint`.
      file: of the nowcaster.
      expected: the nowcaster's fingerprint.

    Returns:
      Method -> figure -> value.
    """
    scores: dict[str, dict[str, float]] = {}
    methods: set[str] = set()
    for path in evaluations:
        for row in _rows(path):
            method = row["method"]
            methods.add(method)
            if not re.match(rf"{re.escape(file.stem)}([@~+]|$)", method):
                continue
            actual = row.get("fingerprint", "unknown")
            if actual != expected:
                raise UsageError(
                    f"--evaluation {path}: the nowcaster of the method {method!r} has the fingerprint {actual}, but that of "
                    f"--nowcaster {file} is {expected}. Evaluate this nowcaster again."
                )
            scores.setdefault(method, {}).update(_figures(row))
    if not scores:
        raise UsageError(f"--evaluation has no method of {file.stem!r}, only: {', '.join(sorted(methods))}.")
    return scores


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        rows = load_rows(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--evaluation {path} cannot be read: {error}") from error
    if not rows or not all("method" in row for row in rows):
        raise UsageError(f"--evaluation {path} is no table of methods; give the `summary.csv` of an evaluation.")
    return rows


def _figures(row: dict[str, str]) -> dict[str, float]:
    """The columns that are numbers."""
    figures: dict[str, float] = {}
    for name, value in row.items():
        try:
            figures[name] = float(value)
        except ValueError:  # The name of the method, of a reading, or a fingerprint.
            continue
    return figures
