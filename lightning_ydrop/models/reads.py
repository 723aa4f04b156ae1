"""Which attributes of its modules a forward reads, and whether they are still what they were."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.models.modules import kind_of
from lightning_ydrop.models.snapshot import OF_EVERY_MODULE

# Attributes that lead to what changes while a network trains, out of sight.
OF_TRAINING = frozenset({"_trainer", "_fabric", "trainer", "fabric"})
PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)

Reads = dict[nn.Module, set[str]]
# For a module and an attribute, to what depth its value is described, and the description.
Values = dict[tuple[nn.Module, str], tuple[int, object]]
DEPTH = 2


@contextmanager
def seeing_reads(modules: Iterable[nn.Module]) -> Iterator[Reads]:
    """Note which attributes are read of modules whose classes are a user's.

    Yields:
        The names for each module, filled while the model runs.

    """
    watched = {id(each): each for each in modules if not _is_fixed(each)}
    reads: Reads = {each: set() for each in watched.values()}
    thread = threading.get_ident()

    def instead_of(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def look(self: Any, name: str) -> Any:
            if id(self) in watched and threading.get_ident() == thread:
                reads[watched[id(self)]].add(name)
            return original(self, name)

        return look

    classes: list[Any] = list(dict.fromkeys(map(type, watched.values())))
    own = {cls: cls.__dict__["__getattribute__"] for cls in classes if "__getattribute__" in cls.__dict__}
    originals = {cls: cls.__getattribute__ for cls in classes}
    try:
        for cls in classes:
            cls.__getattribute__ = instead_of(originals[cls])
        yield reads
    finally:
        for cls in classes:
            if cls in own:
                cls.__getattribute__ = own[cls]
            else:
                del cls.__getattribute__


def values_read(reads: Reads) -> Values:
    """Describe the attributes that were read, as far as modules hold them themselves, for a later comparison.

    Parameters, buffers and submodules are left out. An object that many modules hold, such as their configuration, is
    described once.
    """
    values: Values = {}
    seen: set[int] = set()
    for module, names in reads.items():
        for name in sorted(names & module.__dict__.keys() - OF_EVERY_MODULE):
            value = module.__dict__[name]
            depth = 0 if id(value) in seen else DEPTH
            seen.add(id(value))
            values[module, name] = depth, described(value, depth)
    return values


def changed_since(values: Values) -> str | None:
    """Name the first attribute that is not what it was, as code would: `Class.name`."""
    for (module, name), (depth, value) in values.items():
        if described(module.__dict__.get(name), depth) != value:
            return f"{type(module).__name__}.{name}"
    return None


def described(value: object, depth: int = DEPTH) -> object:
    """Give what can be compared: numbers and text by value, collections by items, objects by identity and attributes.

    Of tensors only the identity counts. Their values are not looked at.
    """
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (Tensor, nn.Module)) or depth == 0:
        return id(value)
    if isinstance(value, Mapping):
        return id(value), [(key, described(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [described(item, depth - 1) for item in value]
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict:
        return id(value)
    return id(value), [(name, described(item, depth - 1)) for name, item in attributes.items()]


def _is_fixed(module: nn.Module) -> bool:
    """Tell whether a module is torch's or ours, whose attributes say how it was made."""
    kind = kind_of(module)
    return kind.of_torch or kind.ours or kind.script
