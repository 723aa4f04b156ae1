"""What goes wrong, said in three sentences: the call as it was typed, what is allowed, and how to fix it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

# No more items of a container than this go into a message.
MOST_ITEMS = 8


class ConfigurationError(ValueError):
    """A setting, a batch or a model that this package can't work with.

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
    """Describe a value without printing the numbers of tensors.

    Args:
        value: Anything.

    Returns:
        Of a tensor its shape, dtype and device, of a container its class and its first items, of a number, a flag or a
        text the value itself, and of anything else its class.

    """
    if isinstance(value, Tensor):
        # A nested tensor of strided layout has no shape.
        shape = f"{value.size(0)} of different shapes" if _lacks_shape(value) else tuple(value.shape)
        return f"Tensor(shape={shape}, dtype={value.dtype}, device={value.device})"
    if isinstance(value, np.ndarray):
        return f"ndarray(shape={value.shape}, dtype={value.dtype})"
    if isinstance(value, Mapping):
        return _call_of(value, (f"{key!r}: {describe(item)}" for key, item in value.items()), len(value))
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return _call_of(value, (f"{name}={describe(getattr(value, name))}" for name in names), len(names))
    if value is None or isinstance(value, (bool, int, float, str, range, Number, np.generic)):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return _call_of(value, (describe(item) for item in value), len(value))
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__


def listed(items: Iterable[str], most: int = MOST_ITEMS) -> str:
    """Write items in a row, and how many there are beyond the first few.

    Args:
        items: The items as they are to be shown.
        most: How many to show.

    """
    shown = list(items)
    more = len(shown) - most
    return f"{', '.join(shown[:most])} and {more} more" if more > 0 else ", ".join(shown)


def _lacks_shape(tensor: Tensor) -> bool:
    return tensor.is_nested and tensor.layout == torch.strided


def _call_of(container: object, items: Iterable[str], count: int) -> str:
    """Write a container as the call of its class: its first items, and how many more there are.

    It reads no further items: they may be batches, which take long to load.
    """
    more = [f"... {count - MOST_ITEMS} more"] if count > MOST_ITEMS else []
    return f"{type(container).__name__}({', '.join([*islice(items, MOST_ITEMS), *more])})"
