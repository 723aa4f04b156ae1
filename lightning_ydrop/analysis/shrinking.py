"""Removing the least important units of a trained network from its tensors, so that it becomes smaller and faster."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

from lightning_ydrop.analysis.pruning import layers_of
from lightning_ydrop.checks import check_fraction, check_module
from lightning_ydrop.errors import ConfigurationError, describe, listed
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.modules import named_modules

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
# Others, such as LayerNorm and GroupNorm, take their statistics over several units.
NORMS_OF_EACH_UNIT = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def shrink_units(model: nn.Module, scores: Mapping[str, Tensor], fraction: float, inputs: Inputs) -> nn.Module:
    """Make a smaller network, without the units that have the lowest scores. It takes lightning-ydrop[shrink].

    Where `prune_units` sets weights to 0, this leaves them out, together with what else belongs to a unit: its bias,
    its entry in a norm, and the weights of the next layer that it goes into. Torch-Pruning finds all of these by
    following the network from one forward pass. Channels that a residual connection adds to each other go together, by
    the sum of the scores that they have. Each layer keeps one unit at least.

    The smaller network gives what the whole one gives where the removed units are set to 0 behind their activation,
    which is checked with `inputs`. Only norms over several units, such as LayerNorm, then have other statistics.
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
        ConfigurationError: If Torch-Pruning is not installed, scores do not fit a layer of the model, the model can't
            take `inputs`, or a layer can't be made smaller: its units are part of the output, or reshaped as those of
            attention heads are, or it is a convolution with groups.

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
    whole = _call_first(smaller, inputs)
    flags = {name: parameter.requires_grad for name, parameter in smaller.named_parameters()}
    for parameter in smaller.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # Torch-Pruning follows gradients
    try:
        _shrink_all(pruning, smaller, layers, inputs, fraction)
        is_whole_output = _shapes(_call(smaller, inputs)) == _shapes(whole)
    except ConfigurationError:
        raise
    except Exception as error:
        raise _refused(scores, f"it fails: {type(error).__name__}: {str(error).rstrip('.')}.") from error
    if not is_whole_output:
        raise ConfigurationError(
            f"shrink_units(scores=...) has scores for {', '.join(map(repr, scores))}.",
            "The units of a layer that is made smaller are no part of the model's output, whose shape would change.",
            "Leave out the last layer, whose units are the classes.",
        )
    _tie_again(model, smaller, scores)
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(flags[name])
    for module in smaller.modules():
        if isinstance(module, ConductanceDropout):
            module.reset()
    for module, former in zip(smaller.modules(), model.modules(), strict=True):
        module.training = former.training
    return smaller


def _shrink_all(
    pruning: Any, model: nn.Module, layers: Mapping[nn.Module, Tensor], inputs: Inputs, fraction: float
) -> None:
    """Shrink each layer, and check that this does to the model what it should.

    Raises:
        ConfigurationError: If it does something else.

    """
    graph = pruning.DependencyGraph()
    arguments = dict(inputs) if isinstance(inputs, Mapping) else inputs
    with torch.enable_grad():
        graph.build_dependency(model, example_inputs=arguments, output_transform=_followed, verbose=False)
    names = {module: name for name, module in named_modules(model).items()}
    left = set(layers)
    for layer, values in layers.items():
        if layer not in left:
            continue
        group, found = _weakest(pruning, graph, layer, values, layers, fraction)
        left -= found
        if group is None:
            continue
        # The weights of what comes next are removed as well, so it does no harm to set them to 0 before.
        is_comparable = _cut_off(pruning, model, group)
        expected = _call(model, inputs)
        group.prune()
        if is_comparable and not _are_close(_call(model, inputs), expected):
            reason = f"without units of {names[layer]!r} the smaller network gives something else than the whole one."
            raise _refused([names[each] for each in found], reason)


def _weakest(
    pruning: Any, graph: Any, layer: nn.Module, values: Tensor, scores: Mapping[nn.Module, Tensor], fraction: float
) -> tuple[Any, set[nn.Module]]:
    """Find what goes with the weakest units of a layer, and the layers with scores whose units go with its own."""
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
    weakest = sorted(total.argsort(stable=True)[:count].tolist())
    return (graph.get_pruning_group(layer, _out(pruning, layer), idxs=weakest) if weakest else None), found


def _cut_off(pruning: Any, model: nn.Module, group: Any) -> bool:
    """Set the weights to 0 that take in units of a group.

    Returns:
        Whether the model then gives what it gives without these units. It does not where a norm takes its statistics
        over units, or where layers of other kinds take them in.

    """
    owners = {id(each): module for module in model.modules() for each in module._parameters.values()}
    is_comparable = True
    for dependency, indices in group:
        module = dependency.target.module
        owner = owners.get(id(module), module)  # parameters outside of torch's layers are targets themselves
        if dependency.handler in (pruning.prune_linear_in_channels, pruning.prune_conv_in_channels):
            is_comparable &= getattr(module, "groups", 1) == 1
            with torch.no_grad():
                module.weight.index_fill_(
                    0 if getattr(module, "transposed", False) else 1,
                    torch.tensor(indices, device=module.weight.device),
                    0.0,
                )
        is_joint_norm = "norm" in type(owner).__name__.lower() and not isinstance(owner, NORMS_OF_EACH_UNIT)
        is_comparable &= not (is_joint_norm or isinstance(module, (nn.RNNBase, nn.MultiheadAttention)))
    return is_comparable


def _tie_again(model: nn.Module, smaller: nn.Module, scores: Mapping[str, Tensor]) -> None:
    """Let layers of the smaller network share the parameters that they share in the whole one.

    Raises:
        ConfigurationError: If one of them has become smaller than the other.

    """
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    for first, *others in shared.values():
        kept = smaller.get_parameter(first)
        for name in others:
            if not torch.equal(smaller.get_parameter(name), kept):
                raise _refused(scores, f"{first} and {name} are the same parameter, of which one becomes smaller.")
            holder, _, parameter_name = name.rpartition(".")
            setattr(smaller.get_submodule(holder), parameter_name, kept)


def _refused(names: Iterable[str], reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"shrink_units(scores=...) has scores for {listed(map(repr, names))}. There {reason}",
        "Units can be removed where all that uses them can do without them. Layers whose units are reshaped to a fixed "
        "size, as the queries, keys and values of attention heads are, or that are called several times, keep theirs.",
        "Leave such layers out of `scores`.",
    )


def _out(pruning: Any, layer: nn.Module) -> Any:
    return pruning.prune_linear_out_channels if isinstance(layer, nn.Linear) else pruning.prune_conv_out_channels


def _call(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _call_first(model: nn.Module, inputs: Inputs) -> Any:
    """Call the whole model: what it raises is not about shrinking.

    Raises:
        ConfigurationError: If it can't take the inputs.

    """
    try:
        return _call(model, inputs)
    except (ConfigurationError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first_line = str(error).partition("\n")[0]  # torch lists all overloads of an operator below
        raise ConfigurationError(
            f"shrink_units(inputs={describe(inputs)}) was given, and with these the model's forward raised "
            f"{type(error).__name__}: {first_line.rstrip('.:')}.",
            "`inputs` is a small batch of what forward takes, on the model's device: a tensor, a tuple for positional "
            "or a mapping for keyword arguments.",
            "Pass inputs with which model(...) runs, such as inputs=x for model(x).",
        ) from error


def _followed(output: Any) -> Any:
    """List the tensors of an output that gradients lead to: others, such as caches, can't be followed."""
    found = [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.grad_fn is not None]
    return found or output


def _shapes(output: Any) -> Any:
    return [each.shape for each in tree_leaves(output) if isinstance(each, Tensor)]


def _are_close(output: Any, expected: Any) -> bool:
    """Tell whether two outputs are the same, as far as rounding allows."""
    for one, other in zip(tree_leaves(output), tree_leaves(expected), strict=True):
        if isinstance(one, Tensor) and one.shape == other.shape and one.is_floating_point():
            tolerance = torch.finfo(one.dtype).eps ** 0.5 * float(other.abs().amax()) if one.numel() else 0.0
            if not torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True):
                return False
    return True


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
