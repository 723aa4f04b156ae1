"""What Python objects hold that can be changed in place: containers, slots, and sources of random numbers."""

import random
import sys
import warnings
from array import array
from collections import OrderedDict, deque
from functools import cache
from types import CellType
from typing import Any

import torch

UNSET = object()  # what a slot without a value holds
CONTAINERS = (dict, list, set, deque, bytearray, array)
# Objects of these classes hold what a user has put there, whoever has written the classes.
HOLDERS = frozenset(
    {
        *("types.SimpleNamespace", "argparse.Namespace", "collections.UserDict", "collections.UserList"),
        *("collections.ChainMap", "weakref.WeakKeyDictionary", "weakref.WeakValueDictionary", "weakref.WeakSet"),
        *("queue.Queue", "queue.LifoQueue", "queue.PriorityQueue", "torch.quasirandom.SobolEngine"),
    }
)


def items_of(container: Any) -> Any:
    """Copy what a container holds."""
    if isinstance(container, array):
        return container[:]
    return dict(container.items()) if isinstance(container, dict) else tuple(container)


def refill(container: Any, items: Any) -> bool:
    """Let a container hold again what it held: of a large one, whose length is all that is known, as many items.

    Methods of Python's own classes do it, past those of a subclass.

    Returns:
        Whether it held something else.

    """
    if isinstance(items, int):
        return _shorten(container, items)
    if isinstance(container, dict):
        if len(container) == len(items) and all(
            key is former_key and value is former_value
            for (key, value), (former_key, former_value) in zip(container.items(), items.items(), strict=True)
        ):
            return False
        base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        base.clear(container)
        for key, value in items.items():
            base.__setitem__(container, key, value)
    elif isinstance(container, set):
        if len(container) == len(items) and all(item in container for item in items):
            return False
        set.clear(container)
        set.update(container, items)
    elif isinstance(container, array):
        if container.tobytes() == items.tobytes():
            return False
        container[:] = items
    else:
        if len(container) == len(items) and all(
            value is former for value, former in zip(container, items, strict=True)
        ):
            return False
        base = next(cls for cls in (list, deque, bytearray) if isinstance(container, cls))
        base.clear(container)
        base.extend(container, items)
    return True


def _shorten(container: Any, length: int) -> bool:
    if len(container) <= length:
        return len(container) < length
    if isinstance(container, dict):
        while len(container) > length:
            container.popitem()  # the last ones that came
    elif not isinstance(container, set):
        while len(container) > length:
            container.pop()
    return True


def array_type() -> Any:
    """Give NumPy's class of arrays, or None where nobody has imported it."""
    numpy: Any = sys.modules.get("numpy")
    return None if numpy is None else numpy.ndarray


def refill_array(array: Any, copied: Any) -> bool:
    """Let an array hold again what it held, and tell whether it held something else."""
    if array.shape != copied.shape:
        array.resize(copied.shape, refcheck=False)
    elif array.dtype.hasobject:
        if all(one is other for one, other in zip(array.flat, copied.flat, strict=True)):
            return False
    elif array.tobytes() == copied.tobytes():
        return False
    array[...] = copied
    return True


def holds_attributes(value: object) -> bool:
    """Tell whether an object of a library holds what its user has put there."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}" in HOLDERS or isinstance(
        value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    )


def set_slots(value: object, slots: dict[str, Any]) -> bool:
    """Put back what an object held in slots, past a frozen class, and tell whether it held something else."""
    is_changed = False
    for name, held in slots.items():
        if getattr(value, name, UNSET) is held:
            continue
        is_changed = True
        if held is UNSET:
            object.__delattr__(value, name)
        else:
            object.__setattr__(value, name, held)
    return is_changed


def set_cell(cell: CellType, content: Any) -> bool:
    """Let a variable of an enclosing function have the value that it had, and tell whether it had another."""
    try:
        now = cell.cell_contents
    except ValueError:
        now = UNSET
    if now is content:
        return False
    if content is UNSET:
        del cell.cell_contents
    else:
        cell.cell_contents = content
    return True


def set_class_attributes(cls: type, attributes: dict[str, Any]) -> bool:
    """Put back the attributes of a class, past its metaclass, and tell whether they were others."""
    now = vars(cls)
    changed = [name for name, value in attributes.items() if now.get(name, UNSET) is not value]
    added = [name for name in now if name not in attributes]
    for name in changed:
        type.__setattr__(cls, name, attributes[name])
    for name in added:
        type.__delattr__(cls, name)
    return bool(changed or added)


def copy_of_iterator(iterator: Any) -> Any:
    """Copy an iterator of Python's own, with those inside it, so that the copy can go on alone.

    Returns:
        The copy, or the iterator itself where Python can't copy it, such as a generator.

    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python will copy no iterators of itertools from 3.14 on
            make, arguments, *states = iterator.__reduce__()
            copied = make(*map(_part_copied, arguments))
            for state in states:
                copied.__setstate__(tuple(map(_part_copied, state)) if isinstance(state, tuple) else state)
    except (TypeError, AttributeError):
        return iterator
    return copied


def _part_copied(part: Any) -> Any:
    """Copy what an iterator goes on from: not its items, except for those that are iterators."""
    if is_iterator(part):
        return copy_of_iterator(part)
    if type(part) is list:  # which `itertools.cycle` fills
        return part.copy()
    return tuple(map(_part_copied, part)) if type(part) is tuple and any(map(is_iterator, part)) else part


def is_iterator(value: object) -> bool:
    """Tell whether a value is an iterator of Python's own."""
    return hasattr(value, "__next__") and type(value).__module__ in ("builtins", "itertools")


@cache
def slots_of(cls: Any) -> tuple[str, ...]:
    """List the attributes that a class and its bases keep in slots, without those of Python's own classes."""
    names = [
        _mangled(name, base)
        for base in cls.__mro__
        if base.__module__ != "builtins"
        for name in (
            (base.__dict__["__slots__"],)
            if isinstance(base.__dict__.get("__slots__"), str)
            else base.__dict__.get("__slots__", ())
        )
    ]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _mangled(name: str, cls: type) -> str:
    """Give the name under which Python keeps a private one."""
    is_private = name.startswith("__") and not name.endswith("__")
    return f"_{cls.__name__.lstrip('_')}{name}" if is_private else name


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
