"""How torch.fx traces our layers: as the call of a module, like the layers of torch."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import Proxy, Tracer
from torch.jit import is_scripting  # type: ignore[attr-defined]

__all__ = ["can_be_leaf", "is_scripting", "leaf_call"]


def can_be_leaf(layer: nn.Module, forward: Callable[..., Any], x: Proxy) -> bool:
    """Tell whether a layer can be a single call in the graph that is being traced.

    A subclass whose own forward calls `forward` cannot: the graph would apply its own forward twice. Neither can a
    layer that is traced by itself: it would call itself.

    Args:
        layer: The layer that is called.
        forward: The forward of its class that asks.
        x: What the layer is called with.

    """
    return type(layer).forward is forward and _path(layer, x) != ""


def leaf_call(layer: nn.Module, x: Proxy, *others: object) -> Tensor:
    """Record a call of a layer in the graph that is being traced.

    A tracer treats the modules of torch as leaves and runs the forward of all others. Each tracer has its own rules for
    that, so the layer records itself, which works with all of them.

    Args:
        layer: The layer that is called.
        x: What the layer is called with.
        others: Further positional arguments.

    Returns:
        A proxy for the output.

    """
    return cast(Tensor, x.tracer.create_proxy("call_module", _path(layer, x), (x, *others), {}))


def _path(layer: nn.Module, x: Proxy) -> str:
    """Find the name of a layer in the model that is being traced, empty for the model itself."""
    return cast(Tracer, x.tracer).path_of_module(layer)
