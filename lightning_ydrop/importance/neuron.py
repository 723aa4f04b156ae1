"""The conductance of each input feature through one unit."""

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import is_list, is_whole
from lightning_ydrop.errors import ConfigurationError, describe, listed
from lightning_ydrop.functional.attribution import Quadrature, path_conductance
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.importance.attribution import MaxRows, check_layout, measured_along
from lightning_ydrop.importance.baseline import Baseline
from lightning_ydrop.importance.interpolation import MOST_NAMES
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.importance.passes import (
    Recorded,
    Recorder,
    carried_along,
    gradients,
    measured_in_parts,
    target_along,
    with_own_starts,
)
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.request import Request
from lightning_ydrop.importance.selection import Layout, check_called
from lightning_ydrop.importance.tasks import Task, objective_of
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.modules import named_modules
from lightning_ydrop.models.wrappers import unwrapped

Neuron = int | tuple[int, ...]


@overload
def neuron_conductance(
    model: nn.Module,
    inputs: Tensor,
    target: Target | int = ...,
    *,
    layer: str,
    neuron: Neuron,
    baseline: Baseline = ...,
    n_steps: int = ...,
    quadrature: Quadrature = ...,
    objective: Objective | Task | None = ...,
    interpolate_at: str | None = ...,
    forward: Callable[..., Any] | None = ...,
    unit_dim: int | None = ...,
    max_rows: MaxRows = ...,
    batch_dim: int = ...,
) -> Tensor: ...


@overload
def neuron_conductance(
    model: nn.Module,
    inputs: Inputs,
    target: Target | int = ...,
    *,
    layer: str,
    neuron: Neuron,
    baseline: Baseline = ...,
    n_steps: int = ...,
    quadrature: Quadrature = ...,
    objective: Objective | Task | None = ...,
    interpolate_at: str | None = ...,
    forward: Callable[..., Any] | None = ...,
    unit_dim: int | None = ...,
    max_rows: MaxRows = ...,
    batch_dim: int = ...,
) -> tuple[Tensor, ...]: ...


def neuron_conductance(
    model: nn.Module,
    inputs: Inputs,
    target: Target | int = None,
    *,
    layer: str,
    neuron: Neuron,
    baseline: Baseline = 0.0,
    n_steps: int = 50,
    quadrature: Quadrature = "right",
    objective: Objective | Task | None = None,
    interpolate_at: str | None = None,
    forward: Callable[..., Any] | None = None,
    unit_dim: int | None = None,
    max_rows: MaxRows = None,
    batch_dim: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    """Measure how much each input feature contributes to the output through one unit (arXiv 1805.12233, Eq. 2).

    That is the integral of `(x - x') dF/da da/dx` along the path, where `a` is the unit (Dhamdhere, Sundararajan, Yan,
    2018). Its sum over all features converges, with `n_steps`, to the unit's `layer_conductance`. Where the layer is
    an affine function of the inputs, such as the first of a network, the two are equal for any number of steps.

    The model is measured in evaluation mode and given back as it was, in one forward pass and two backward passes.

    Args:
        model: Any torch model.
        inputs: What its forward takes, as of `layer_conductance`.
        target: What F is taken with, as of `layer_conductance`.
        layer: The name of one module, as in `model.named_modules()`.
        neuron: The unit, by its index in the result of `layer_conductance`: a feature, or a channel with all of its
            positions together. Or a tuple that names one position: an index for each dimension of the layer's output
            except the batch, such as (channel, row, column).
        baseline: Where the paths start, as of `layer_conductance`.
        n_steps: S, the number of steps on each path, at least 1. The error against the integral falls with S.
        quadrature: Where on each step gradients are taken: its "right" end, its "left" end, or "trapezoid", the mean
            of both, which converges fastest.
        objective: F, what is differentiated: an objective, or the name of a task as for `YDrop`.
        interpolate_at: Name of a module, such as an embedding, at whose output the paths end instead of at the inputs.
            The features are then what this module puts out.
        forward: What is called instead of `model`, in the way in which `forward` of a model is called.
        unit_dim: Dimension of the units in the output of the layer, as of `layer_conductance`.
        max_rows: The largest number of rows that pass through the model at once, as of `layer_conductance`.
        batch_dim: The dimension of the samples, as of `layer_conductance`.

    Returns:
        Of inputs that are a tensor, a tensor of the same shape, or with `interpolate_at` of that module's output. Of
        other inputs a tuple: a tensor for each floating tensor that paths run through, in the order in which they
        stand. On their device, in float32 or, for float64 inputs, float64. A layer that is called several times counts
        as the sum of its calls.

    Raises:
        ConfigurationError: If an argument does not fit the model, its forward does not call the layer, or autograd
            does not see how the layer depends on the inputs.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
        >>> features = neuron_conductance(model, torch.rand(8, 1, 8, 8), 0, layer="1", neuron=2)
        >>> features.shape
        torch.Size([8, 1, 8, 8])

    """
    owner, chosen = "neuron_conductance", objective_of("neuron_conductance", objective)
    path = PathSettings(owner, n_steps, "all", baseline, quadrature, chosen, interpolate_at, batch_dim)
    check_layout(owner, unit_dim, max_rows)
    _check_layer(owner, unwrapped(model, forward)[0], layer)
    measure = partial(_through, owner=owner, neuron=_check_neuron(owner, neuron))
    measured = measured_along(path, model, inputs, target, layer, forward, unit_dim, max_rows, measure)
    features = tuple(each.movedim(0, path.batch_dim) for each in measured)
    return features[0] if isinstance(inputs, Tensor) else features


def _through(request: Request, owner: str, neuron: Neuron) -> tuple[Tensor, ...]:
    """Measure features through a neuron: for each input (B, *)."""
    called: set[str] = set()
    measured = measured_in_parts(
        with_own_starts(request), partial(_one_pass, owner=owner, neuron=neuron, called=called)
    )
    check_called(owner, request.layers, called)
    return tuple(measured.values())


def _one_pass(request: Request, recorder: Recorder, owner: str, neuron: Neuron, called: set[str]) -> dict[int, Tensor]:
    """Measure in one forward pass, a backward pass to the layer, and one from the neuron on to the inputs."""

    def run() -> tuple[list[Tensor], Tensor]:
        points = [
            path_points(start.detach(), item.detach(), request.n_steps).requires_grad_()
            for start, item in zip(request.starts, request.inputs, strict=True)
        ]
        # Copies go in: a network may write to its input, which autograd forbids for the points themselves.
        inputs = tuple(each.clone() for each in points)
        return points, request.value(inputs, carried_along(request), target_along(request))

    points, value = recorder.passed(run)
    kept = recorder.recorded(request, len(points[0]))
    called.update(kept.names)
    _check_fits(owner, kept, neuron)
    slopes = gradients(value, kept.activations, keep_graph=True)
    neurons, slopes = (
        [_at(neuron, layout, each) for layout, each in zip(kept.layouts, tensors, strict=True)]
        for tensors in (kept.activations, slopes)
    )
    through = torch.autograd.grad(neurons, points, slopes, materialize_grads=True) if neurons else points
    return {
        place: path_conductance(each.detach(), of_neuron, request.num_samples, request.quadrature)
        for place, (each, of_neuron) in enumerate(zip(points, through, strict=True))
    }


def _at(neuron: Neuron, layout: Layout, tensor: Tensor) -> Tensor:
    """Take a neuron out of a tensor that is laid out as an activation: (rows, *)."""
    rows = layout.rows_first(tensor)
    if isinstance(neuron, int):
        return rows.select(layout.units_behind_rows, neuron)
    for index in neuron:
        rows = rows.select(1, index)
    return rows


def _check_layer(owner: str, model: nn.Module, layer: object) -> None:
    """Refuse what is no name of a module."""
    modules = named_modules(model)
    if not isinstance(layer, str) or layer not in modules:
        name = next((name for name, module in modules.items() if module is layer), None)
        names = listed(filter(None, modules), MOST_NAMES)
        shown = f"an instance of {type(layer).__name__}" if isinstance(layer, nn.Module) else describe(layer)
        raise ConfigurationError(
            f"{owner}(layer={shown}) was given.",
            f"`layer` is the name of one module of {type(model).__name__}: {names}.",
            "Pass one of these names." if name is None else f"Pass its name: layer={name!r}.",
        )


def _check_neuron(owner: str, neuron: Any) -> Neuron:
    """Refuse what can't name a neuron of any layer, and give it with Python's own numbers."""
    if is_whole(neuron) and neuron >= 0:
        return int(neuron)
    if is_list(neuron) and len(neuron) and all(is_whole(each) and each >= 0 for each in neuron):
        return tuple(map(int, neuron))
    raise ConfigurationError(
        f"{owner}(neuron={describe(neuron)}) was given.",
        "`neuron` is the index of a unit, at least 0, or a tuple of such indices for one position.",
        "Pass, for example, neuron=3 for a feature or a channel, or neuron=(3, 0, 0) for a position of a channel.",
    )


def _check_fits(owner: str, kept: Recorded, neuron: Neuron) -> None:
    """Refuse a neuron that the layer does not have, and a layer that autograd can't follow from the inputs."""
    for name, layout, activation in zip(kept.names, kept.layouts, kept.activations, strict=True):
        sizes = layout.rows_first(activation).shape
        num_units = sizes[layout.units_behind_rows]
        fits = (
            neuron < num_units
            if isinstance(neuron, int)
            else len(neuron) == len(sizes) - 1
            and all(index < size for index, size in zip(neuron, sizes[1:], strict=True))
        )
        if not fits:
            raise ConfigurationError(
                f"{owner}(layer={name!r}, neuron={neuron}) was given.",
                f"The layer puts out {tuple(sizes[1:])} for each sample, with {num_units} units.",
                f"Pass a unit from 0 to {num_units - 1}, or a tuple of {len(sizes) - 1} such indices.",
            )
        if activation.is_leaf:
            raise ConfigurationError(
                f"{owner}(layer={name!r}) was given, and what this layer put out has no gradient with respect to "
                "the inputs.",
                "Autograd follows the features to the unit. It can't follow them through torch.no_grad() or detach(), "
                "nor to a layer that does not depend on the inputs.",
                "Choose a layer that depends on the inputs, or let forward compute it with gradients.",
            )
