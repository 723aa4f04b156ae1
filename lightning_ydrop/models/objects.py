"""What Python objects hold that can be changed in place: containers, slots, and sources of random numbers."""

import random
import sys
from functools import cache
from typing import Any

import torch


def items_of(container: Any) -> Any:
    """Copy what a container holds."""
    return dict(container) if isinstance(container, dict) else tuple(container)


def refill(container: Any, items: Any) -> None:
    """Put back the items that a container held. If only their number is known, remove what was added at the end."""
    if isinstance(items, int):
        if len(container) > items:
            if isinstance(container, dict):
                for _ in range(len(container) - items):
                    container.popitem()  # the ones added last
            elif not isinstance(container, set):
                while len(container) > items:
                    container.pop()
        return
    if isinstance(container, dict):
        same = len(container) == len(items) and all(
            key is former_key and value is former_value
            for (key, value), (former_key, former_value) in zip(container.items(), items.items(), strict=True)
        )
        if not same:
            dict.clear(container)
            dict.update(container, items)
    elif isinstance(container, set):
        if container != set(items):
            container.clear()
            container.update(items)
    elif len(container) != len(items) or any(
        value is not former for value, former in zip(container, items, strict=True)
    ):
        container.clear()
        container.extend(items)


@cache
def slots_of(cls: Any) -> tuple[str, ...]:
    """List the attributes that a class and its bases keep in slots, without those of Python's own classes."""
    names = [
        name
        for base in cls.__mro__
        if base.__module__ != "builtins"
        for name in (
            (base.__dict__["__slots__"],)
            if isinstance(base.__dict__.get("__slots__"), str)
            else base.__dict__.get("__slots__", ())
        )
    ]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


def generator_state(value: object) -> Any:
    """Give the state of a source of random numbers, and None for any other object."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.random.Generator):
            return value.bit_generator.state
        if isinstance(value, numpy.random.RandomState):
            return value.get_state()
    return None


def set_generator_state(generator: Any, state: Any) -> None:
    """Put back what `generator_state` gave."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
