"""What objects hold, described so that it can be compared with what they hold later."""

import functools
import logging
import sys
import weakref
from collections import deque
from collections.abc import Container, Iterator, Mapping, Set
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.modules import classes_of_users
from lightning_ydrop.models.snapshot import OF_EVERY_MODULE

PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# What their objects hold changes while a network trains, out of sight.
OF_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")
# Attributes that lead to what changes while a network trains, out of sight.
OF_TRAINING = frozenset({"_trainer", "_fabric", "trainer", "fabric"})
# Of the attributes that every module has, those that a forward pass depends on.
OF_A_FORWARD = ("training", "_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")
# Of the objects and arrays in one comparison: each takes about a microsecond. Numbers in a collection take less.
MOST_ITEMS, MOST_BYTES = 1000, 2**14
NUMBERS_FOR_ONE = 8


class NotComparable(Exception):
    """What forward reads can't be compared with what it was. The message says why."""


class Same:
    """An object that is compared by identity. To hold it keeps its place in memory from another."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Describer:
    """Describes objects for a comparison, one after the other, and each only once.

    Numbers and text count by value, collections by their items, other objects by identity, attributes and what stands
    in the bodies of their classes. Of tensors only the identity counts, and so it does of modules that are compared
    elsewhere.

    Args:
        known: Modules and classes that are compared elsewhere, by their `id`.

    """

    def __init__(self, known: Container[int] = ()) -> None:
        self._known = known
        self._seen: set[int] = set()
        self._items = 0

    def __call__(self, value: Any) -> object:
        """Describe an object.

        Raises:
            NotComparable: If it holds too much, or something that does not show what it holds.

        """
        if isinstance(value, PLAIN):
            return type(value), value
        known = isinstance(value, (Tensor, ModuleType, logging.Logger)) or id(value) in self._seen
        if known or id(value) in self._known or _holds_nothing(value):
            return Same(value)
        self._seen.add(id(value))
        self._count(1)
        if isinstance(value, (list, tuple, deque)):
            self._count(len(value) // NUMBERS_FOR_ONE)
            return type(value), [self(item) for item in value]
        if isinstance(value, Set):
            self._count(len(value) // NUMBERS_FOR_ONE)
            return type(value), frozenset(value), [self(item) for item in value if not isinstance(item, PLAIN)]
        if isinstance(value, type):
            return Same(value), [
                (name, self(item))
                for base in classes_of_users(value)
                for name, item in base.__dict__.items()
                if is_of_a_body(name, item)
            ]
        return Same(value), self._held_by(value), self(type(value))

    def _held_by(self, value: Any) -> list[object]:
        cls = type(value)
        if isinstance(value, nn.Module):
            names = [name for name in value.__dict__ if name not in OF_EVERY_MODULE | OF_TRAINING]
            self._count(len(names) // NUMBERS_FOR_ONE)
            return [(name, self(value.__dict__.get(name))) for name in (*OF_A_FORWARD, *names)]
        package = cls.__module__.partition(".")[0]
        if isinstance(value, Iterator) or _draws(value):
            raise NotComparable(f"forward reads {cls.__name__}, which does not show what it gives next")
        if package == "numpy" and hasattr(value, "tobytes"):
            return [str(value.dtype), value.shape, self(value.tolist()) if value.dtype.hasobject else _bytes_of(value)]
        held: list[object] = []
        if isinstance(value, Mapping):
            self._count(len(value) // NUMBERS_FOR_ONE)
            held += [(self(key), self(item)) for key, item in value.items()]
        elif isinstance(value, functools.partial):
            held += [self(value.func), self(value.args), self(value.keywords)]
        elif isinstance(value, MethodType):
            held += [self(value.__self__), self(value.__func__)]
        elif isinstance(value, FunctionType):
            cells = value.__closure__ or ()
            held += [self(_content_of(cell)) for cell in cells]
            held += [self(value.__defaults__), self(value.__kwdefaults__)]
        elif isinstance(value, property):
            held += [self(value.fget)]
        elif isinstance(value, weakref.ref):
            held += [self(value())]
        elif package in OF_LIGHTNING:
            raise NotComparable(f"forward reads an object that leads to the {cls.__name__} of Lightning")
        elif package == "random" and hasattr(value, "getstate"):
            held.append(value.getstate())
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._count(len(attributes) // NUMBERS_FOR_ONE)
            held += [(name, self(item)) for name, item in attributes.items()]
        else:
            held.append(_bytes_of(value))
        for base in cls.__mro__:
            slots = base.__dict__.get("__slots__", ())
            held += [
                (name, self(getattr(value, name, None)))
                for name in ([slots] if isinstance(slots, str) else slots)
                if name not in ("__dict__", "__weakref__")
            ]
        return held

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > MOST_ITEMS:
            raise NotComparable(f"the attributes that forward reads hold more than {MOST_ITEMS} objects")


def is_of_a_body(name: str, value: object) -> bool:
    """Tell whether something in a class is what its body says, and not what Python adds."""
    return not name.startswith("__") or callable(value)


@functools.cache
def _is_a_users(cls: Any) -> bool:
    return bool(classes_of_users(cls))


def _holds_nothing(value: object) -> bool:
    """Tell whether something is a class of a library, or a function with nothing but its code."""
    if isinstance(value, type):
        return not _is_a_users(value)
    return isinstance(value, FunctionType) and not (
        value.__closure__ or value.__defaults__ or value.__kwdefaults__ or value.__dict__
    )


def _bytes_of(value: Any) -> bytes | None:
    """Give the memory of an array or anything else that shows it."""
    try:
        memory = memoryview(value)
    except (TypeError, ValueError, BufferError):  # NumPy has kinds of elements that it does not show so
        return value.tobytes() if hasattr(value, "tobytes") else None
    if memory.nbytes > MOST_BYTES:
        raise NotComparable("forward reads a large array. Make it a buffer")
    return memory.tobytes()


def _content_of(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None


def _draws(value: object) -> bool:
    random = sys.modules.get("numpy.random")
    return random is not None and isinstance(value, (random.Generator, random.RandomState, random.BitGenerator))
