"""Activation checkpoints: many models set them in training mode only, so they are found and set in phase 1 too."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.utils.checkpoint as checkpoints
from torch import Tensor, nn

from lightning_ydrop.models.holdings import FRAMEWORKS, names_in
from lightning_ydrop.models.modules import all_modules, kind_of
from lightning_ydrop.torch_internals import memory_of

CALLED = ("forward", "__call__")


def may_checkpoint(model: nn.Module) -> bool:
    """Tell whether something in a model looks as if it checkpoints activations: by an attribute, or by its code."""
    return any(
        _code_speaks_of_it(type(module)) or _attribute_says_so(module)  # type: ignore[arg-type] # mypy sees no hash in classes
        for module in all_modules(model)
    )


def checkpoint_outputs(modules: Iterable[nn.Module]) -> None:
    """Make modules keep only their inputs for the backward pass, and run again in it.

    It sets the attribute `forward` of each module. Whoever has borrowed the modules removes it again.
    """
    for module in modules:
        module.__dict__["forward"] = partial(checkpoints.checkpoint, module.forward, use_reentrant=False)


class Checkpointed(list[nn.Module]):
    """The modules that checkpoints run.

    Attributes:
        has_parts: Whether a checkpoint ran something else, such as a lambda, so that these are parts of what it ran.

    """

    has_parts = False


@contextmanager
def seeing_checkpoints(model: nn.Module) -> Iterator[Checkpointed]:
    """Note which modules a checkpoint runs directly, with no other module in between.

    Yields:
        These modules, filled while the model runs.

    """
    inside = Checkpointed()

    def look(module: nn.Module, args: Any) -> None:
        frame = _checkpoint_around()
        if frame is None:
            return
        owner = _owner_of(frame.f_locals["function"])
        inside.has_parts = inside.has_parts or owner is None
        checkpointed = module if owner is None else owner
        if checkpointed not in inside:
            inside.append(checkpointed)

    # TorchScript's modules take no such hooks.
    modules = [module for module in all_modules(model) if not kind_of(module).script]
    handles = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


class SavedMemory:
    """Bytes that forward passes keep for a backward pass, beside the parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._others = {memory_of(each) for each in model.parameters()}
        self._places: dict[int, int] = {}

    @property
    def size(self) -> int:
        """The number of bytes."""
        return sum(self._places.values())

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the passes inside keep."""

        def pack(tensor: Tensor) -> Tensor:
            if memory_of(tensor) not in self._others:
                place = memory_of(tensor)
                self._places[place] = max(bytes_of(tensor), self._places.get(place, 0))  # of views, the largest
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def bytes_of(*tensors: Tensor) -> int:
    """Count the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def affordable_rows(
    in_training: int, plain: int, kept: int, recorded: int, num_checkpointed: int, num_always: int = 0
) -> float:
    """Say how many rows phase 1 can take at once in the memory of training, as a fraction of the rows of training.

    Args:
        in_training: Bytes that a forward pass in training mode keeps.
        plain: Bytes that a pass in evaluation mode keeps, with the checkpoints that it sets itself.
        kept: Bytes that it keeps with those that phase 1 sets besides.
        recorded: Bytes of the layers' outputs, which phase 1 keeps until the backward pass gets to them.
        num_checkpointed: The number of modules that phase 1 checkpoints as training does.
        num_always: The number of modules that the model checkpoints in evaluation mode too.

    """
    # The backward pass runs these modules one at a time. Each then keeps what it would keep without a checkpoint.
    if num_checkpointed:
        at_a_time, kept = plain // num_checkpointed, max(kept, in_training)
    elif num_always:
        # Never seen without a checkpoint. After a layer there are at least its output, a mask and what comes next.
        at_a_time, kept = 3 * recorded // num_always, plain
    else:
        return min(1.0, in_training / max(1, plain + 2 * recorded)) if in_training < plain else 1.0
    return min(1.0, (in_training + at_a_time) / max(1, kept + at_a_time + recorded))


def _checkpoint_around() -> FrameType | None:
    """Find the checkpoint that runs the module that is about to run, or the one around it."""
    frame: FrameType | None = sys._getframe(2)
    calls = 0
    while frame is not None and calls < 2:  # up to the call of the module around this one
        if frame.f_code.co_filename == checkpoints.__file__ and "function" in frame.f_locals:
            return frame
        calls += frame.f_code.co_name == "_call_impl"
        frame = frame.f_back
    return None


def _owner_of(function: Any) -> nn.Module | None:
    """Find the module whose forward a function is."""
    first: tuple[Any, ...] = ()
    while isinstance(function, partial):
        first, function = (*function.args, *first), function.func
    if isinstance(function, nn.Module):
        return function
    # A bound method, or the function of the class with its module as the first argument.
    owner = getattr(function, "__self__", first[0] if first else None)
    return owner if isinstance(owner, nn.Module) and getattr(function, "__name__", "") == "forward" else None


@cache
def _code_speaks_of_it(cls: Any) -> bool:
    """Tell whether a method of a user's class calls torch's function, in whatever it calls by a global name too."""
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in FRAMEWORKS]
    methods = [method for base in own for method in vars(base).values() if isinstance(method, FunctionType)]
    return any(_calls_it(method) or (method.__name__ in CALLED and _names_it(method)) for method in methods)


def _names_it(function: FunctionType) -> bool:
    return any("checkpoint" in name for name in names_in(function.__code__))


def _calls_it(function: FunctionType, depth: int = 1) -> bool:
    for name in names_in(function.__code__):
        called = function.__globals__.get(name)
        if name in ("checkpoint", "checkpoint_sequential") or getattr(called, "__module__", "") == checkpoints.__name__:
            return True
        if depth > 0 and isinstance(called, FunctionType) and _calls_it(called, depth - 1):
            return True
    return False


def _attribute_says_so(module: nn.Module) -> bool:
    return any("checkpoint" in name and value is True for name, value in module.__dict__.items())
