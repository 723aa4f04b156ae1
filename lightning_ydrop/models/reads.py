"""What a forward reads beside its arguments, and whether that is still what it was."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_ydrop.models.descriptions import PLAIN, Describer, NotComparable, Same, is_of_a_body
from lightning_ydrop.models.modules import classes_of_users, kind_of
from lightning_ydrop.models.snapshot import OF_EVERY_MODULE

# Phase 1 runs compiled parts as they are.
OF_COMPILATION = frozenset({"_compiled_call_impl"})


@dataclass(frozen=True)
class Reads:
    """Which attributes of modules a forward has read.

    Attributes:
        modules: The modules, by their `id`: some compute a hash from attributes, as metrics do.
        names: The names for each module.
        own: Those of them that it had not written to before.
        registered: All modules of the model, by their `id`.

    """

    modules: dict[int, nn.Module]
    names: dict[int, set[str]]
    own: dict[int, set[str]]
    registered: frozenset[int]


@contextmanager
def seeing_reads(modules: Sequence[nn.Module]) -> Iterator[Reads]:
    """Note which attributes of modules are read.

    Yields:
        The reads, filled while the model runs.

    """
    watched = {id(each): each for each in modules if not (kind_of(each).ours or kind_of(each).script)}
    held = {key: each.__dict__.copy() for key, each in watched.items()}
    registered = frozenset(map(id, modules))
    reads = Reads(watched, {key: set() for key in watched}, {key: set() for key in watched}, registered)
    thread = threading.get_ident()

    def note(key: int, name: str, now: dict[str, Any]) -> None:
        names, before = reads.names[key], held[key]
        if name not in names:
            names.add(name)
            if (name in now) == (name in before) and now.get(name) is before.get(name):
                reads.own[key].add(name)

    def instead_of(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def look(self: Any, name: str) -> Any:
            if id(self) in watched and threading.get_ident() == thread:
                now = object.__getattribute__(self, "__dict__")
                is_all = name == "__dict__" and not _is_of_torch(sys._getframe(1).f_globals.get("__name__"))
                for each in list(now) if is_all else [name]:
                    note(id(self), each, now)
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


class Values:
    """What a forward has read, for a later comparison. Parameters, buffers and submodules are left out.

    Args:
        reads: What it has read of modules, which are as they were before.
        beside: Other objects that take part, such as a function that calls the model.

    Raises:
        NotComparable: If something that it has read can't be compared.

    """

    def __init__(self, reads: Reads, beside: Sequence[object] = ()) -> None:
        bases = dict.fromkeys(base for module in reads.modules.values() for base in classes_of_users(type(module)))  # type: ignore[arg-type] # mypy sees no hash in classes
        self._elsewhere = reads.registered | set(map(id, bases))
        describe = Describer(self._elsewhere)
        self._read: list[tuple[nn.Module, list[tuple[str, object, object]], frozenset[str]]] = []
        for key, names in reads.own.items():
            module = reads.modules[key]
            held = module.__dict__
            own = [(name, held[name], describe(held[name])) for name in sorted((names & held.keys()) - OF_EVERY_MODULE)]
            missing = frozenset(names - held.keys() - OF_COMPILATION)
            if own or missing:
                self._read.append((module, own, missing))
        self._beside = [(each, describe(each)) for each in beside]
        self._bodies = [_Body(base, describe) for base in bases]

    @property
    def names(self) -> set[str]:
        """The names of the attributes that are compared."""
        return {name for _, own, _ in self._read for name, *_ in own}

    def changed(self) -> str | None:
        """Name the first thing that is not what it was, as code would: `Class.name`."""
        try:
            return self._changed(Describer(self._elsewhere))
        except NotComparable:  # such as a list that has grown
            return "state: it holds more than can be compared"

    def _changed(self, describe: Describer) -> str | None:
        for module, own, missing in self._read:
            held = module.__dict__
            for name, value, description in own:
                if name not in held:
                    return f"{type(module).__name__}.{name}"
                now = held[name]
                if now is value and isinstance(value, PLAIN):
                    continue
                if describe(now) != description:
                    return f"{type(module).__name__}.{name}"
            if not missing.isdisjoint(held):
                return f"{type(module).__name__}.{min(missing & held.keys())}"
        for each, description in self._beside:
            if describe(each) != description:
                return f"state of {type(each).__name__}"
        for body in self._bodies:
            if (changed := body.changed(describe)) is not None:
                return changed
        return None


class _Body:
    """What stands in the body of a class, for a later comparison. Most functions need no description."""

    def __init__(self, cls: type, describe: Describer) -> None:
        self.cls = cls
        self._names = set(cls.__dict__)
        read = {name: value for name, value in cls.__dict__.items() if is_of_a_body(name, value)}
        described = {name: describe(value) for name, value in read.items()}
        self._by_identity = {name: read[name] for name, description in described.items() if type(description) is Same}
        self._described = {name: each for name, each in described.items() if name not in self._by_identity}

    def changed(self, describe: Describer) -> str | None:
        """Name the first thing that is not what it was: `Class.name`."""
        now = self.cls.__dict__
        if now.keys() != self._names:
            return f"{self.cls.__name__}.{min(now.keys() ^ self._names)}"
        for name, value in self._by_identity.items():
            if now[name] is not value:
                return f"{self.cls.__name__}.{name}"
        for name, description in self._described.items():
            if describe(now[name]) != description:
                return f"{self.cls.__name__}.{name}"
        return None


def _is_of_torch(name: object) -> bool:
    return isinstance(name, str) and name.partition(".")[0] == "torch"
