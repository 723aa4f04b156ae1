"""The layers that an engine drives: whose they are, and what a checkpoint keeps of them."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers import ConductanceDropout

Layers = Mapping[str, ConductanceDropout]

_NUMBERS = itertools.count(1)


def take_over(layers: Layers) -> int:
    """Make an engine the driver of layers, whichever drove them before.

    Returns:
        The engine's number, by which its layers know it. A copy of a model and its engine keeps it.

    """
    number = next(_NUMBERS)
    for layer in layers.values():
        layer.driver = number
    return number


def check_driver(owner: str, layers: Layers, number: int) -> None:
    """Refuse to drive layers that another engine has taken over.

    Raises:
        ConfigurationError: If one has; it speaks of `owner`, what the user called.

    """
    if taken := [name for name, layer in layers.items() if layer.driver != number]:
        raise ConfigurationError(
            f"{owner}.step was called for {', '.join(map(repr, taken))}, for which another engine or callback has "
            "been made since.",
            "A layer has one driver: of two, each would undo the probabilities of the other.",
            "Use the one that was made last, or give each a model of its own.",
        )


def states_of(layers: Layers) -> dict[str, dict[str, Any]]:
    """Hold what resuming needs of the layers."""
    return {
        name: {
            "drop_prob": layer.drop_prob.clone(),
            "mean_drop_prob": layer.mean_drop_prob.clone(),
            "active": layer.active,
        }
        for name, layer in layers.items()
    }


def restore(layers: Layers, states: Mapping[str, Mapping[str, Any]], progress: float, device: torch.device) -> None:
    """Let the layers be as they were when `states_of` was called."""
    for name, layer in layers.items():
        saved = states[name]
        layer.restore(saved["drop_prob"].to(device), saved["mean_drop_prob"].to(device))
        if saved["active"]:
            layer.activate(progress)


def check_state(state: Any, own: Mapping[str, Any]) -> None:
    """Refuse what is no state of an engine with these layers.

    Args:
        state: What was given.
        own: The engine's own state.

    Raises:
        ConfigurationError: If it is the state of other layers, or none.

    """
    if not (isinstance(state, dict) and state.keys() == own.keys()):
        raise ConfigurationError(
            f"{describe(state)} was given as a Y-Drop state.",
            "A state is what `YDrop.state_dict` gave, whole.",
            "Load one of those, or start without it.",
        )
    if state["layers"].keys() != own["layers"].keys():
        raise ConfigurationError(
            f"A Y-Drop state of the layers {', '.join(map(repr, state['layers']))} was given to a model with "
            f"{', '.join(map(repr, own['layers']))}.",
            "A state fits to the network that it was taken from.",
            "Load it into that network, or start without it.",
        )
