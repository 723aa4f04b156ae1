"""What a forward pass keeps for the backward pass, and whether a model saves some of that in training alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from lightning_ydrop.models.state import all_modules


def may_checkpoint(model: nn.Module) -> bool:
    """Tell whether something in a model looks as if it checkpoints activations: by an attribute, or by its code."""
    return any(_code_speaks_of_it(type(module)) or _attribute_says_so(module) for module in all_modules(model))


class SavedMemory:
    """Bytes that forward passes keep for a backward pass, beside the parameters.

    Attributes:
        size: So many.

    """

    def __init__(self, model: nn.Module) -> None:
        self._others = {_place(each) for each in model.parameters()}
        self._places: dict[int, int] = {}
        self._twice = 0

    @property
    def size(self) -> int:
        """So many bytes."""
        return sum(self._places.values()) + self._twice

    def add_twice(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are kept themselves, and whose gradients will be."""
        for tensor in tensors:
            if _place(tensor) not in self._places:
                self._places[_place(tensor)] = _bytes(tensor)
            self._twice += _bytes(tensor)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the passes inside keep."""

        def pack(tensor: Tensor) -> Tensor:
            if _place(tensor) not in self._others:
                self._places[_place(tensor)] = _bytes(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@cache
def _code_speaks_of_it(cls: type) -> bool:
    for name in ("forward", "__call__"):
        code = getattr(getattr(cls, name, None), "__code__", None)
        if (
            code is not None
            and any("checkpoint" in used for used in code.co_names)
            and not cls.__module__.startswith("torch.")
        ):
            return True
    return False


def _attribute_says_so(module: nn.Module) -> bool:
    return any("checkpoint" in name and value is True for name, value in module.__dict__.items())
