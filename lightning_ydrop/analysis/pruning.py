"""Removing the units of a trained network that matter least, for good."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_ydrop.checks import check_fraction
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.state import named_modules

# Their weights hold one unit after the other.
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prune_units(model: nn.Module, scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Remove the units with the lowest scores of some layers, with their weights and biases, by `torch.nn.utils.prune`.

    The layers keep their shapes, and what is removed stays 0 when the network trains on. As with all of torch's
    pruning, `prune.remove(layer, "weight")` makes that final, for checkpoints too. Where normalisation follows a layer,
    a removed unit still passes on the constant that this makes of 0. A network can be pruned further: what torch's
    masks have removed before is the first of what a larger fraction takes.

    Args:
        model: A model.
        scores: By the name of a linear or convolutional layer, the score of each of its units or output channels, (U,):
            `mean_conductance(model, data, layers=nn.Linear)` without the last layer, for example.
        fraction: Of the units of each of these layers that are removed in the end, rounded to whole units, in [0, 1].

    Returns:
        For each layer, by name, which units are left: booleans, shape (U,).

    Raises:
        ConfigurationError: If a score does not fit to a layer of the model; then nothing is pruned.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> left = prune_units(model, {"0": torch.arange(8.0)}, fraction=0.25)
        >>> left["0"]
        tensor([False, False,  True,  True,  True,  True,  True,  True])

    """
    check_fraction("prune_units", "fraction", fraction, example=0.5)
    modules = named_modules(model)
    for name, values in scores.items():
        layer = modules.get(name)
        if not isinstance(layer, PRUNABLE) or values.shape != layer.weight.shape[:1] or values.isnan().any():
            raise ConfigurationError(
                f"prune_units(scores=...) has {describe(values)} for {name!r}, that is {describe(layer)} here.",
                "Scores are those of the units (U,) of linear layers and convolutions, by their names, and no NaN.",
                'Measure these layers: mean_conductance(model, data, layers="...").',
            )
    left = {}
    for name, values in scores.items():
        layer = modules[name]
        # torch multiplies the masks of one pruning after another.
        before: Tensor = getattr(layer, "weight_mask", torch.ones_like(layer.weight))  # type: ignore[arg-type]
        there = before.flatten(1).any(1).to(values.device)
        weakest = values.where(there, -torch.inf).argsort(stable=True)[: round(fraction * len(values))]
        left[name] = there.scatter(0, weakest, False)
        for parameter in ("weight", "bias"):
            whole = getattr(layer, parameter)
            if whole is not None:
                mask = left[name].to(whole.device).view(-1, *[1] * (whole.ndim - 1)).expand_as(whole)
                prune.custom_from_mask(layer, parameter, mask)  # type: ignore[no-untyped-call]
    return left
