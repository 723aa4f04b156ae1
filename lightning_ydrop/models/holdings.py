"""What an objective holds: the modules that a call runs, and the tensors that have to be on the model's device."""

import copy
import sys
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError

Held = TypeVar("Held")

# Attributes of their objects, such as loggers, optimizers and trainers, lead far away from anything that a loss runs.
FRAMEWORKS = {*sys.stdlib_module_names, "lightning", "lightning_fabric", "numpy", "pytorch_lightning", "torch"}
MOST_ENTRIES = 10_000  # a list or dictionary with more holds data: to walk through it takes long, and finds no loss


def modules_held(by: object) -> list[nn.Module]:
    """Find the modules that a call may run.

    It looks into attributes, lists, dictionaries, partials and the owners of bound methods. It looks into functions
    too, methods included: at their closures, their defaults, and the global names that they use.

    Args:
        by: An objective, or whatever else is called.

    Returns:
        Each module once. Modules inside them are not listed.

    """
    return [value for value in _reachable(by, into_code=True) if isinstance(value, nn.Module)]


def moved(held: Held, device: torch.device) -> Held:
    """Give an object with all tensors that it holds on a device.

    What a function holds in its closure, or a class in its attributes, stays where it is: all callers share it.

    Args:
        held: An objective. It is not changed.
        device: Where its tensors are needed.

    Returns:
        `held` itself if nothing has to move. Otherwise a copy, which shares with `held` all that holds nothing to move.

    Raises:
        ConfigurationError: If something that has to move cannot be copied.

    """
    values = list(_reachable(held))
    if not any(_is_elsewhere(value, device) for value in values):
        return held
    try:
        # `copy.deepcopy` takes from the memo whatever is in it, by identity, and copies the rest.
        result = copy.deepcopy(held, _memo(values, device))
    except Exception as error:
        raise ConfigurationError(
            f"{held!r} was given, which holds tensors that are not on {device}, and copying it raised "
            f"{type(error).__name__}: {error}",
            "Everything in an objective is on the model's device, or can be copied there by copy.deepcopy.",
            f"Move what it holds to {device} before training starts.",
        ) from error
    for value in _reachable(result):
        if isinstance(value, nn.Module) and _is_elsewhere(value, device):
            value.to(device)  # TorchScript copies its tensors itself, past the memo
    return result


def _memo(values: list[Any], device: torch.device) -> dict[int, Any]:
    """Tell what stands in a copy for which value: tensors on the device, and what holds nothing to move for itself."""
    memo: dict[int, Any] = {}
    for value in values:
        if not any(_is_elsewhere(part, device) for part in _reachable(value)):
            memo.setdefault(id(value), value)
        elif isinstance(value, nn.Module):
            memo |= {id(tensor): _copied(tensor, device) for tensor in _tensors_in(value)}
        elif isinstance(value, Tensor):
            memo[id(value)] = _copied(value, device)
    return memo


def _reachable(start: object, *, into_code: bool = False, into_modules: bool = False) -> Iterator[Any]:
    """Walk from an object through all that it holds: each value once, the object itself first.

    Args:
        start: Where to start.
        into_code: Whether to look into functions and classes too. Copies share what these hold.
        into_modules: Whether to look into modules too, at their tensors and at all other attributes.

    """
    seen: dict[int, Any] = {}  # it keeps the values alive, so that no other gets the same id
    waiting: list[Any] = [start]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, nn.Module):
            parts = list(vars(value).values()) if into_modules else []
        else:
            parts = _parts(value) + (_parts_of_code(value) if into_code else [])
        waiting.extend(reversed(parts))


def _parts(value: Any) -> list[Any]:
    """List what an object holds, if it is one to look into."""
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value) if len(value) <= MOST_ENTRIES else []
    if isinstance(value, dict):
        return [*value.keys(), *value.values()] if len(value) <= MOST_ENTRIES else []
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    return list(vars(value).values()) if _is_plain(value) else []


def _parts_of_code(value: Any) -> list[Any]:
    """List what a function, or the class of a plain object, can run or read."""
    if isinstance(value, FunctionType):
        return [] if _is_of_framework(value) else _parts_of_function(value)
    if isinstance(value, MethodType):  # of an object, or of a class
        return [value.__func__, *(_parts_of_class(value.__self__) if isinstance(value.__self__, type) else [])]
    if isinstance(value, (staticmethod, classmethod)):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget]
    return _parts_of_class(type(value)) if _is_plain(value) else []


def _parts_of_class(kind: type) -> list[Any]:
    """List the methods and attributes of a user's class and of its bases."""
    # Our own bases hold no modules, and name much of this package.
    own = [base for base in kind.__mro__ if not (_is_of_framework(base) or _root(base) == "lightning_ydrop")]
    return [part for base in own for part in vars(base).values()]


def _parts_of_function(function: FunctionType) -> list[Any]:
    """List a function's defaults and attributes, what is in its closure, and the globals that it names."""
    parts = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    for cell in function.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # the enclosing function has not assigned that variable
            continue
    return parts + [function.__globals__.get(name) for name in names_in(function.__code__)]


def names_in(code: CodeType) -> list[str]:
    """List the names that code uses, and those that functions and comprehensions inside it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [*code.co_names, *(name for each in inner for name in names_in(each))]


def _is_plain(value: Any) -> bool:
    """Tell whether an object is the user's own, with attributes to look into."""
    if isinstance(value, (ModuleType, type)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, SimpleNamespace) or not _is_of_framework(type(value))


def _is_of_framework(defined: FunctionType | type) -> bool:
    return _root(defined) in FRAMEWORKS


def _root(defined: FunctionType | type) -> str:
    return (defined.__module__ or "").partition(".")[0]


def _is_elsewhere(value: Any, device: torch.device) -> bool:
    """Tell whether a tensor, or one in a module, is not on the device."""
    if isinstance(value, nn.Module):
        # Once a module is on the device, its forward has to cope with tensors that it keeps besides: `module.to` leaves
        # them behind in training too, and some, like Lightning's `example_input_array`, are none of the loss.
        registered = [*value.parameters(), *value.buffers()]
        return any(_is_elsewhere(tensor, device) for tensor in registered or _tensors_in(value))
    if not isinstance(value, Tensor):
        return False
    return value.device.type != device.type or device.index not in (None, value.device.index)


def _tensors_in(module: nn.Module) -> list[Tensor]:
    return [value for value in _reachable(module, into_modules=True) if isinstance(value, Tensor)]


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device, copy=True)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
