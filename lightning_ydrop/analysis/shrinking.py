"""Removing the least important units of a trained network from its tensors, so that it becomes smaller and faster."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_ydrop.analysis.pruning import layers_of
from lightning_ydrop.checks import check_fraction, check_module
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.modules import named_modules

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def shrink_units(model: nn.Module, scores: Mapping[str, Tensor], fraction: float, inputs: Inputs) -> nn.Module:
    """Make a smaller network, without the units that have the lowest scores. It takes lightning-ydrop[shrink].

    Where `prune_units` sets weights to 0, this leaves them out, together with what else belongs to a unit: its bias,
    its entry in a norm, and the weights of the next layer that it goes into. Torch-Pruning finds all of these by
    following the network from one forward pass. Channels that a residual connection adds to each other go together, by
    the sum of the scores that they have. Each layer keeps one unit at least.

    The smaller network gives what the whole one gives where the removed units are set to 0 behind their activation.
    Y-Drop starts anew in it: its layers forget the probabilities of units. Train it on to get accuracy back.

    Args:
        model: A model. It stays as it is.
        scores: By the name of a linear or convolutional layer, the score of each of its units or output channels, shape
            (U,). For example `mean_conductance(model, data, layers=nn.Linear)`, without the last layer.
        fraction: Fraction of the units of each of these layers to remove, in [0, 1), rounded to whole units.
        inputs: What the model takes, a small batch: a tensor, a tuple for positional or a mapping for keyword
            arguments.

    Returns:
        A new network, on the same device and in the same mode.

    Raises:
        ConfigurationError: If Torch-Pruning is not installed, scores do not fit a layer of the model, or a layer can't
            be made smaller: its units are part of the output, or it is a convolution with groups.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> smaller = shrink_units(model, {"0": torch.arange(8.0)}, fraction=0.75, inputs=torch.randn(2, 4))
        >>> smaller
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )

    """
    pruning = _torch_pruning()
    check_module("shrink_units", model)
    fraction = float(check_fraction("shrink_units", "fraction", fraction, example=0.5))
    for name, layer in layers_of("shrink_units", model, scores).items():
        _check_whole(name, layer)
    smaller = copy.deepcopy(model).eval()
    modules = named_modules(smaller)
    layers = {modules[name]: values for name, values in scores.items()}
    arguments = dict(inputs) if isinstance(inputs, Mapping) else inputs
    shapes = _shapes(smaller, inputs)
    graph = pruning.DependencyGraph()
    with torch.enable_grad():
        graph.build_dependency(smaller, example_inputs=arguments, verbose=False)
    left = set(layers)
    for layer, values in layers.items():
        if layer in left:
            left -= _shrink(pruning, graph, layer, values, layers, fraction)
    for module in smaller.modules():
        if isinstance(module, ConductanceDropout):
            module.reset()
    if _shapes(smaller, inputs) != shapes:
        raise ConfigurationError(
            f"shrink_units(scores=...) has scores for {', '.join(map(repr, scores))}.",
            "The units of a layer that is made smaller are no part of the model's output, whose shape would change.",
            "Leave out the last layer, whose units are the classes.",
        )
    for module, former in zip(smaller.modules(), model.modules(), strict=True):
        module.training = former.training
    return smaller


def _shrink(
    pruning: Any, graph: Any, layer: nn.Module, values: Tensor, scores: Mapping[nn.Module, Tensor], fraction: float
) -> set[nn.Module]:
    """Shrink a layer and those whose units go with its own, and give those that have scores."""
    whole = graph.get_pruning_group(layer, _out(pruning, layer), idxs=list(range(len(values))))
    total, found = torch.zeros_like(values, dtype=torch.float32), {layer}
    for dependency, indices in whole:
        module = dependency.target.module
        if module in scores and dependency.handler == _out(pruning, module) and len(indices) == len(values):
            # The units of both are added to each other.
            found.add(module)
            total[torch.tensor(whole[0].idxs, device=total.device)] += scores[module].to(total)[
                torch.tensor(indices, device=total.device)
            ]
    count = min(round(fraction * len(values)), len(values) - 1)
    weakest = total.argsort(stable=True)[:count].tolist()
    if weakest:
        graph.get_pruning_group(layer, _out(pruning, layer), idxs=sorted(weakest)).prune()
    return found


def _out(pruning: Any, layer: nn.Module) -> Any:
    return pruning.prune_linear_out_channels if isinstance(layer, nn.Linear) else pruning.prune_conv_out_channels


def _shapes(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return apply_to_collection(output, Tensor, lambda tensor: tensor.shape)


def _check_whole(name: str, layer: nn.Module) -> None:
    """Refuse layers that keep their shapes.

    Raises:
        ConfigurationError: If this is one.

    """
    if getattr(layer, "groups", 1) != 1:
        raise ConfigurationError(
            f"shrink_units(scores=...) has scores for {name!r}, {describe(layer)} with groups={layer.groups}.",
            "Convolutions with groups keep their channels, since a group would become smaller than the others.",
            "Leave this layer out of `scores`. A depthwise convolution shrinks with the layer before it.",
        )
    if prune.is_pruned(layer):
        raise ConfigurationError(
            f"shrink_units(scores=...) has scores for {name!r}, {describe(layer)} that prune_units has pruned.",
            "Tensors become smaller once pruning is final.",
            'Call torch.nn.utils.prune.remove(layer, "weight"), and the same for "bias", before.',
        )


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "shrink_units was called, and Torch-Pruning is not installed.",
            "It takes Torch-Pruning, which follows the units of a layer through the network.",
            'Run pip install "lightning-ydrop[shrink]".',
        ) from error
    return torch_pruning
