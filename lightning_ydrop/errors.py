"""What goes wrong, said in three sentences: the call as it was typed, what is allowed, and how to fix it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Number
from typing import Any

from torch import Tensor


class ConfigurationError(ValueError):
    """A setting, a batch or a model that Y-Drop cannot work with, found before the first optimiser step.

    Args:
        given: The call as it was typed, with the offending value.
        allowed: What is allowed.
        remedy: How to fix it.

    """

    def __init__(self, given: str, allowed: str, remedy: str) -> None:
        # All three go to `args`, so that the error survives pickling between processes.
        super().__init__(given, allowed, remedy)

    def __str__(self) -> str:
        return " ".join(self.args)


class NoEffectWarning(UserWarning):
    """Something that was asked for changes nothing in this model."""


def describe(value: Any) -> str:
    """Say what a value is without printing its numbers: structure, and of tensors shape, dtype and device."""
    if isinstance(value, Tensor):
        return f"Tensor(shape={tuple(value.shape)}, dtype={value.dtype}, device={value.device})"
    if isinstance(value, Mapping):
        return f"{type(value).__name__}({_listed([f'{key!r}: {describe(item)}' for key, item in value.items()])})"
    if is_dataclass(value) and not isinstance(value, type):
        named = [f"{field.name}={describe(getattr(value, field.name))}" for field in fields(value)]
        return f"{type(value).__name__}({_listed(named)})"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({_listed([describe(item) for item in value])})"
    if value is None or isinstance(value, (bool, int, float, str, Number)):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def _listed(items: Sequence[str], most: int = 8) -> str:
    """Put the first few items into one line, and say how many more there are."""
    more = [f"... {len(items) - most} more"] if len(items) > most else []
    return ", ".join([*items[:most], *more])
