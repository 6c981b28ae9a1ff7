"""Exporting a trained nowcaster with its record."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wnn_jax
from wnn_jax._files import replace_on_success
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.evaluate import read_summary
from wnn_jax.nowcasters import WNN
from wnn_jax.nowcasters._multi_horizon import MultiHorizonNowcaster

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
    """`summary.csv` of evaluations of this file, to put the scores of its arms into the record."""
    default_horizon: int | None = None
    """Snapshots ahead that it forecasts where none is asked for. Default: as it was trained."""


def export(options: Export) -> Path:
    """Exports a nowcaster.

    Returns:
      The path of the nowcaster.

    Raises:
      UsageError: if an option cannot be used.
    """
    if not _NAME.fullmatch(options.name):
        raise UsageError(f"--name {options.name!r} must be of lower-case letters, digits and single hyphens.")
    try:
        nowcaster = wnn_jax.load(options.nowcaster)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--nowcaster {options.nowcaster} cannot be used: {error}") from error
    if not isinstance(nowcaster, (WNN, MultiHorizonNowcaster)):
        raise UsageError(
            f"--nowcaster {options.nowcaster} is a {type(nowcaster).__name__}, which nothing was trained for."
        )
    record: dict[str, Any] = {"name": options.name, "class": type(nowcaster).__name__, **nowcaster.record}
    changes: dict[str, Any] = {}
    if options.default_horizon is not None:
        if not isinstance(nowcaster, MultiHorizonNowcaster):
            raise UsageError(f"--default-horizon {options.default_horizon}: a {type(nowcaster).__name__} takes none.")
        changes["default_horizon"] = record["default_horizon"] = options.default_horizon
    if options.evaluation:
        record["scores"] = _scores(options.evaluation, options.nowcaster.stem)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}.npz"
    try:
        wnn_jax.save(dataclasses.replace(nowcaster, record=record, **changes), path)
    except ValueError as error:
        raise UsageError(f"--default-horizon: {error}") from error
    with replace_on_success(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _scores(evaluations: Sequence[Path], stem: str) -> dict[str, dict[str, float]]:
    """What the arms of a file scored: an arm is the file's name, with `@SCALE`, `~HORIZON` or `+cosine` behind it."""
    found: dict[str, dict[str, float]] = {}
    arms: set[str] = set()
    for path in evaluations:
        for arm, figures in read_summary(path).items():
            arms.add(arm)
            if re.match(rf"{re.escape(stem)}([@~+]|$)", arm):
                found.setdefault(arm, {}).update(figures)
    if not found:
        raise UsageError(f"--evaluation has no arm of {stem!r}, only: {', '.join(sorted(arms))}.")
    return found
