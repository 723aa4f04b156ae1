"""What objects hold, described so that it can be compared with what they hold later."""

import functools
import logging
import sys
from collections import deque
from collections.abc import Container, Iterator, Mapping, Set
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.snapshot import OF_EVERY_MODULE

PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# What these hold changes while a network trains, and is none of the network.
OF_FRAMEWORKS = ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics")
# Attributes that lead to what changes while a network trains, out of sight.
OF_TRAINING = frozenset({"_trainer", "_fabric", "trainer", "fabric"})
# Of the attributes that every module has, those that a forward pass depends on.
OF_A_FORWARD = ("training", "_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")
# Of the arrays and objects in one comparison: each takes about a microsecond.
MOST_ITEMS, MOST_BYTES = 1000, 2**14


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

    Numbers and text count by value, collections by their items, other objects by identity and attributes. Of tensors
    only the identity counts, and so it does of modules that are compared elsewhere.

    Args:
        known: Modules that are compared elsewhere, by their `id`.

    Attributes:
        modules: All others that it has met, such as those in a plain list.

    """

    def __init__(self, known: Container[int] = ()) -> None:
        self.modules: list[nn.Module] = []
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
        known = isinstance(value, (Tensor, type, ModuleType, logging.Logger)) or id(value) in self._seen
        if known or (isinstance(value, nn.Module) and id(value) in self._known):
            return Same(value)
        self._seen.add(id(value))
        self._count(1)
        if isinstance(value, (list, tuple, deque)):
            self._count(len(value))
            return type(value), [self(item) for item in value]
        if isinstance(value, Set):
            self._count(len(value))
            return type(value), frozenset(value), [self(item) for item in value if not isinstance(item, PLAIN)]
        return Same(value), self._held_by(value)

    def _held_by(self, value: Any) -> list[object]:
        cls = type(value)
        if isinstance(value, nn.Module):
            self.modules.append(value)
            names = [name for name in value.__dict__ if name not in OF_EVERY_MODULE | OF_TRAINING]
            self._count(len(names))
            return [(name, self(value.__dict__.get(name))) for name in (*OF_A_FORWARD, *names)]
        package = cls.__module__.partition(".")[0]
        if isinstance(value, Iterator) or _draws(value):
            raise NotComparable(f"forward reads {cls.__name__}, which does not show what it gives next")
        if package == "numpy" and hasattr(value, "tobytes"):
            if value.nbytes > MOST_BYTES:
                raise NotComparable("forward reads a large NumPy array. Make it a buffer")
            return [str(value.dtype), value.shape, value.tobytes()]
        held: list[object] = []
        if isinstance(value, Mapping):
            self._count(len(value))
            held += [(self(key), self(item)) for key, item in value.items()]
        elif isinstance(value, functools.partial):
            held += [self(value.func), self(value.args), self(value.keywords)]
        elif isinstance(value, MethodType):
            held += [self(value.__self__), self(value.__func__)]
        elif isinstance(value, FunctionType):
            cells = value.__closure__ or ()
            held += [self(_content_of(cell)) for cell in cells]
            held += [self(value.__defaults__), self(value.__kwdefaults__)]
        elif package in OF_FRAMEWORKS:
            return held
        elif package == "random" and hasattr(value, "getstate"):
            held.append(value.getstate())
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._count(len(attributes))
            held += [(name, self(item)) for name, item in attributes.items()]
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


def _content_of(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None


def _draws(value: object) -> bool:
    random = sys.modules.get("numpy.random")
    return random is not None and isinstance(value, (random.Generator, random.RandomState, random.BitGenerator))
