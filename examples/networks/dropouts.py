"""Which dropout stands in a network."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from lightning_ydrop import ConductanceDropout, Jumpout

Dropout = Literal["none", "vanilla", "conductance", "jumpout"]
# Arguments of Jumpout, such as its sigma.
JumpoutArguments = Mapping[str, Any]


def dropped(dropout: Dropout, p: float, jumpout: JumpoutArguments) -> nn.Module:
    """Make a layer that drops features, which are the last dimension."""
    match dropout:
        case "none":
            return nn.Identity()
        case "vanilla":
            return nn.Dropout(p)
        case "conductance":
            return ConductanceDropout(p, unit_dim=-1)
        case "jumpout":
            return Jumpout(**jumpout)


def dropped_relu(dropout: Dropout, p: float, jumpout: JumpoutArguments) -> list[nn.Module]:
    """Make a ReLU and the dropout of what goes into it.

    Dropout comes before the ReLU: a unit's activation, and so its conductance, is the linear output. Jumpout counts the
    activations that the ReLU leaves.
    """
    layer = dropped(dropout, p, jumpout)
    return [nn.ReLU(), layer] if dropout == "jumpout" else [layer, nn.ReLU()]
