"""Removing the least important units of a trained network for good."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune

from lightning_ydrop.checks import check_fraction
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.modules import named_modules

# The first dimension of their weights is the units.
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRUNED = ("weight", "bias")


def prune_units(model: nn.Module, scores: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Remove the units with the lowest scores, with their weights and biases, by `torch.nn.utils.prune`.

    The layers keep their shapes. What is removed stays 0 when the network trains on. `prune.remove(layer, "weight")`
    makes this final, in checkpoints too. If a norm follows a layer, a removed unit still passes on the constant that
    the norm makes of 0. A network can be pruned again with a larger fraction, which includes the units removed before.
    If an error is raised, the model is as it was.

    Args:
        model: A model.
        scores: By the name of a linear or convolutional layer, the score of each of its units or output channels, shape
            (U,). For example `mean_conductance(model, data, layers=nn.Linear)`, without the last layer.
        fraction: Fraction of the units of each of these layers to remove in total, in [0, 1], rounded to whole units. 0
            removes none, 1 all.

    Returns:
        For each layer, by name, which units are left: booleans, shape (U,), on the device of the scores.

    Raises:
        ConfigurationError: If scores do not fit a layer of the model, or torch cannot prune the layer, for example
            because it has a parametrization such as weight_norm.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> left = prune_units(model, {"0": torch.arange(8.0)}, fraction=0.25)
        >>> left["0"]
        tensor([False, False,  True,  True,  True,  True,  True,  True])

    """
    check_fraction("prune_units", "fraction", fraction, example=0.5)
    layers = layers_of("prune_units", model, scores)
    left = {name: _strongest(layers[name], values, float(fraction)) for name, values in scores.items()}
    with _undone_if_it_raises(list(layers.values())):
        for name, layer in layers.items():
            for parameter in PRUNED:
                whole = getattr(layer, parameter)
                if whole is not None:
                    mask = left[name].to(whole.device).view(-1, *[1] * (whole.ndim - 1)).expand_as(whole)
                    prune.custom_from_mask(layer, parameter, mask)  # type: ignore[no-untyped-call]
    return left


def layers_of(owner: str, model: nn.Module, scores: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Find the layers that scores are for, and refuse scores that do not fit, and layers that can't be pruned.

    Args:
        owner: Which function was given the scores.
        model: The model.
        scores: As for `prune_units`.

    Returns:
        The layers, by name.

    Raises:
        ConfigurationError: If it is the case.

    """
    if not isinstance(scores, Mapping):
        raise ConfigurationError(
            f"{owner}(scores={describe(scores)}) was given.",
            "`scores` is a mapping from the names of layers to the scores of their units (U,).",
            'Pass, for example, scores=mean_conductance(model, data, layers="...").',
        )
    modules = named_modules(model)
    for name, values in scores.items():
        _check_fit(owner, name, values, modules)
    return {name: modules[name] for name in scores}


def _check_fit(owner: str, name: str, values: object, modules: Mapping[str, nn.Module]) -> None:
    layer = modules.get(name)
    if isinstance(layer, PRUNABLE) and (obstacle := _obstacle(layer)):
        raise ConfigurationError(
            f"{owner}(scores=...) has scores for {name!r}, a {describe(layer)} whose {obstacle}.",
            "Layers are pruned whose weight and bias are parameters.",
            "Leave this layer out of `scores`. Or remove a parametrization with "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_weight_norm, and run a lazy "
            "layer once.",
        )
    if (
        not isinstance(layer, PRUNABLE)
        or not isinstance(values, Tensor)
        or values.shape != layer.weight.shape[:1]
        or values.is_complex()
        or values.isnan().any()
    ):
        raise ConfigurationError(
            f"{owner}(scores=...) has {describe(values)} for {name!r}, that is {describe(layer)} here.",
            "Scores are real numbers, no NaN, one for each unit (U,) of a linear or convolutional layer, by its name.",
            _remedy(name, modules),
        )


def _remedy(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Say which layer to measure: for what prunes nothing itself, such as a ReLU, the last one before it."""
    before = [each for each in takewhile(lambda each: each != name, modules) if isinstance(modules[each], PRUNABLE)]
    if not before or isinstance(modules.get(name), PRUNABLE) or name not in modules:
        return 'Measure these layers: mean_conductance(model, data, layers="...").'
    return f"Measure the linear or convolutional layer before it: mean_conductance(model, data, layers={before[-1]!r})."


def _obstacle(layer: nn.Module) -> str | None:
    """Say why torch cannot prune a layer. None if it can."""
    for parameter in PRUNED:
        tensor = layer._parameters.get(parameter)
        if tensor is not None and is_lazy(tensor):
            return f"{parameter} has no shape before the first forward pass"
        # Pruning replaces a parameter by a tensor. Weight and spectral norms do so too, and torch would fail on those.
        hooks = [
            hook
            for hook in layer._forward_pre_hooks.values()
            if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == parameter
        ]
        if parameter not in layer._parameters and len(hooks) != 1:
            return f"{parameter} is computed from other parameters"
    return None


def _strongest(layer: nn.Module, scores: Tensor, fraction: float) -> Tensor:
    """Choose the units that are left: booleans, shape (U,)."""
    # Torch multiplies the mask with those of earlier pruning, so units that are gone are the first to remove.
    before: Tensor = getattr(layer, "weight_mask", torch.ones_like(layer.weight))  # type: ignore[arg-type]
    there = before.flatten(1).any(1).to(scores.device)
    weakest = scores.where(there, -torch.inf).argsort(stable=True)[: round(fraction * len(scores))]
    return there.scatter(0, weakest, False)


@contextmanager
def _undone_if_it_raises(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Undo what pruning has done to layers if something raises."""
    # A layer's attributes, and the dictionaries among them, are all that it changes. Of a mask that torch extends in
    # place, the list of its parts is kept.
    attributes = [dict(vars(layer)) for layer in layers]
    contents = [{name: dict(value) for name, value in kept.items() if isinstance(value, dict)} for kept in attributes]
    containers = [
        (hook, hook._pruning_methods)
        for layer in layers
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, prune.PruningContainer)
    ]
    try:
        yield
    except BaseException:
        for layer, kept, dictionaries in zip(layers, attributes, contents, strict=True):
            vars(layer).clear()
            vars(layer).update(kept)
            for name, content in dictionaries.items():
                kept[name].clear()
                kept[name].update(content)
        for container, methods in containers:
            container._pruning_methods = methods
        raise
