"""Wrappers around a user's module: those of distributed training, and Fabric's."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_ydrop.torch_internals import uncompiled


def unwrapped(model: nn.Module, forward: Callable[..., Any] | None) -> tuple[nn.Module, Callable[..., Any]]:
    """Find the module inside a wrapper, and how to call it.

    A wrapper adds to the names of layers, and expects a training step of its own: DDP prepares to average gradients,
    Fabric refuses gradients taken without it.

    Args:
        model: A module, or what `fabric.setup` or `DistributedDataParallel` made of one.
        forward: What the user wants to be called instead, or None.

    Returns:
        The module, and what to call: the module itself, or, if Fabric wraps it, the module in Fabric's precision.

    """
    inner: Any = model
    precision: Any = None
    while True:
        if _is_fabrics(inner):
            precision = inner._strategy.precision
            inner = inner.module
        elif _is_fabrics(uncompiled(inner)):
            inner = uncompiled(inner)
        elif isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = inner.module
        else:
            break
    if forward is not None and forward is not model:
        return inner, forward
    return inner, inner if precision is None else _InPrecision(inner, precision)


class _InPrecision:
    """A module, called as Fabric calls it."""

    def __init__(self, module: nn.Module, precision: Any) -> None:
        self.module = module
        self.precision = precision
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.precision.convert_input((args, kwargs))
        with self.precision.forward_context():
            output = self.module(*args, **kwargs)
        return self.precision.convert_output(output)


def _is_fabrics(module: nn.Module) -> Any:
    # By name: nothing here needs Lightning, and `lightning` and `lightning_fabric` have classes of their own.
    return any(base.__name__ == "_FabricModule" for base in type(module).__mro__)
