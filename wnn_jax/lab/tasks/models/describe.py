"""What is to be known of a network from outside."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn


def takes_train(model: nn.Module) -> bool:
    """Whether the network behaves differently in training, and takes a keyword `train` that says so."""
    return "train" in inspect.signature(model.__call__).parameters


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The class and the attributes of a network, of what JSON has."""
    fields = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
    return {"class": type(model).__name__} | {name: _as_json(getattr(model, name)) for name in fields}


def _as_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Sequence):
        return [_as_json(item) for item in value]
    return repr(value)
