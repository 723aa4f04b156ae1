"""Counting passes and operators: passes outside of the model, since what a forward counts in it, phase 1 undoes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Passing(torch.autograd.Function):
    """Returns its input, and tells of the backward passes through it: hooks of a forward do not fire in phase 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tell: Any) -> Tensor:
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.tell(1)
        return gradients[0], None


class Counting(nn.Module):
    """Counts forward passes, their rows, and backward passes through the output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        rows: list[int] = []
        backwards: list[int] = []
        # Functions, since phase 1 gives back what lists in attributes hold.
        self.tell_rows, self.tell_backward = rows.append, backwards.append
        self.seen = lambda: (rows, backwards)

    @property
    def rows(self) -> list[int]:
        """Of each forward pass so far."""
        return self.seen()[0]

    @property
    def backwards(self) -> int:
        """How many backward passes so far."""
        return len(self.seen()[1])

    def forget(self) -> None:
        """Begin anew."""
        for each in self.seen():
            each.clear()

    def forward(self, x: Tensor) -> Tensor:
        self.tell_rows(len(x))
        output: Tensor = self.model(x)
        return Passing.apply(output, self.tell_backward) if output.requires_grad else output


def recorder() -> Any:
    """Give a function that keeps what it is called with in its attribute `seen`: no part of a model's state."""

    def tell(each: Any) -> None:
        tell.seen.append(each)  # type: ignore[attr-defined]

    tell.seen = []  # type: ignore[attr-defined]
    return tell


class Operators(TorchDispatchMode):
    """Notes the operators that torch starts, views among them.

    Attributes:
        names: Of the operators, without namespace and overload.

    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.rpartition("::")[2])
        return func(*args, **(kwargs or {}))
