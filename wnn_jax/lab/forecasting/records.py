"""Records: JSON files that carry a checksum of their own content, and are read as what a dataclass says."""

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from wnn_jax._files import replace_on_success
from wnn_jax.lab.errors import UsageError
from wnn_jax.lab.training.keys import describe_differences, run_key

Record = TypeVar("Record")

_CHECKSUM = "checksum"


def write_record(path: Path, record: Any) -> None:
    """Writes a record, whole or not at all.

    Args:
      path: of the file.
      record: a dataclass of what JSON has. Figures that are not finite become `null`.
    """
    content: dict[str, Any] = json.loads(msgspec.json.encode(record))
    with replace_on_success(path) as temporary:
        temporary.write_text(json.dumps({**content, _CHECKSUM: run_key(content)}) + "\n")


def load_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object that nothing is known of.

    Args:
      path: of the file.
      remedy: what to do about a damaged file, for the message.

    Raises:
      UsageError: if the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({_one_line(error)})", remedy) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object", remedy)
    return content


def check_record(path: Path, content: dict[str, Any], kind: type[Record], remedy: str) -> Record:
    """The record that a JSON object is.

    Args:
      path: of its file, for the message.
      content: what `load_json` returned.
      kind: the dataclass.
      remedy: what to do about a damaged file, for the message.

    Raises:
      UsageError: if the checksum is not that of the content, or the content has not exactly the keys of the dataclass,
        with values of their types that it accepts.
    """
    content = dict(content)
    if content.pop(_CHECKSUM, None) != run_key(content):
        raise _damaged(path, "its checksum is not that of its content", remedy)
    try:
        record = msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise _damaged(path, _one_line(error), remedy) from error
    differences = describe_differences(content, json.loads(msgspec.json.encode(record)))
    if differences:
        names = ", ".join(difference.partition(" was ")[0] for difference in differences)
        raise _damaged(path, f"unknown or missing: {names}", remedy)
    return record


def _damaged(path: Path, problem: str, remedy: str) -> UsageError:
    return UsageError(f"{path} is damaged: {problem}. {remedy}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
