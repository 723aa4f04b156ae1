"""How torch.fx traces our layers: as the call of a module, like the layers of torch."""

from typing import cast

from torch import Tensor, nn
from torch.fx import Proxy, Tracer
from torch.jit import is_scripting  # type: ignore[attr-defined]

__all__ = ["is_scripting", "leaf_call"]


def leaf_call(layer: nn.Module, x: Proxy) -> Tensor:
    """Record a call of a layer in the graph that is being traced.

    A tracer takes the modules of torch for leaves and runs the forward of all others. Each tracer has rules of its own
    for that, so the layer records itself, which works with all of them.

    Args:
        layer: The layer that is called.
        x: What it is called with.

    Returns:
        A proxy for the output.

    """
    tracer = cast(Tracer, x.tracer)
    return cast(Tensor, tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {}))
