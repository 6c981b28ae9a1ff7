"""Errors that the user can mend: shown as one message, without a traceback."""

import contextlib
import re
import sys
from collections.abc import Generator, Iterable, Mapping
from importlib import metadata
from typing import Any, TypeVar

Value = TypeVar("Value")


class UsageError(ValueError):
    """An option has a value that cannot be used."""


@contextlib.contextmanager
def one_line_errors() -> Generator[None]:
    """End the program with one line, and no traceback, at a `UsageError` or an interrupt."""
    try:
        yield
    except UsageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept, and the same command goes on from there.")


def check_extra(extra: str) -> None:
    """Refuse to go on without the packages of an extra, by a `UsageError` that names the missing ones."""
    requirement = re.compile(rf"([\w.-]+).*; extra == '{extra}'")
    requirements = [line for package in metadata.distributions(name="wnn-jax") for line in package.requires or ()]
    names = dict.fromkeys(match[1] for match in map(requirement.fullmatch, requirements) if match)
    missing = [name for name in names if not any(metadata.distributions(name=name))]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}; install with: pip install 'wnn-jax[{extra}]'")


def look_up(table: Mapping[str, Value], name: str, what: str) -> Value:
    """Return the entry of a name. An unknown name is a `UsageError` that says `what` it is and lists the names."""
    if name not in table:
        raise UsageError(f"{what} {name!r} is not known; choose from {', '.join(table)}.")
    return table[name]


def check_options(options: Any, *, positive: Iterable[str]) -> None:
    """Refuse options of a command line that have to be positive and are not, by a `UsageError`. `None` is accepted."""
    for name in positive:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be positive.")
