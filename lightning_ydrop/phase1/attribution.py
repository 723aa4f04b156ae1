"""The conductance of many layers in one forward and one backward pass."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, check_choice, check_count, describe, dropout_like_modules
from lightning_ydrop.functional.attribution import QUADRATURES, Quadrature, path_conductance, sum_to_units
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.phase1.batches import Baseline, Inputs, as_inputs, start_points
from lightning_ydrop.phase1.objectives import Target, check_pairs, check_target, target_output
from lightning_ydrop.phase1.recording import borrowed, recording

LayerChoice = str | type[nn.Module]
Objective = Callable[[Tensor, Target], Tensor]


def layer_conductance(
    model: nn.Module,
    inputs: Inputs,
    target: Target | int = None,
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = None,
    baseline: Baseline = 0.0,
    n_steps: int = 50,
    quadrature: Quadrature = "right",
    unit_dim: int = 1,
    max_rows: int | None = None,
) -> dict[str, Tensor]:
    """Measure how much each unit of any layers contributes to the output (Eq. 2, arXiv 2409.09088).

    The model is measured in evaluation mode and given back as it was. All layers share one forward and one backward
    pass over the path of all samples: `n_steps * B + 1` rows where every sample's path starts at one and the same
    point, `(n_steps + 1) * B` rows otherwise. The start is the same where `baseline` is, unless its gradient counts
    ("left", "trapezoid") and differs with the sample's target.

    Args:
        model: Any torch model, called as `model(*inputs)`.
        inputs: A floating tensor (B, *), or a tuple of them.
        target: Class index (B,) or one for all samples, soft labels (B, C), or None for the sum of the outputs.
        layers: The modules whose outputs are measured: names, as in `model.named_modules()`, or types, one or several.
            None takes every `ConductanceDropout`.
        baseline: Where the paths start: a number, a tensor of the shape of one sample or of the whole input, or a
            tuple of one for each input.
        n_steps: S, the number of steps on each path, at least 1. The error against the integral of Eq. 1 falls with S.
        quadrature: Where on each step the gradient is taken: its "right" end (the paper), its "left" end (Captum), or
            "trapezoid", the mean of both, which converges fastest.
        unit_dim: Dimension of the units in the outputs of layers that do not say: a `ConductanceDropout` has its own.
        max_rows: At most so many rows, at least 2, pass through the model at once. None takes all in one pass; a
            number splits the samples, and where that does not do each path, into as many passes as needed.

    Returns:
        For each layer, by name, its conductance (B, U), on the device of its output, in float32 or, for float64
        activations, float64. A layer that is called several times counts as the sum of its calls.

    Raises:
        ConfigurationError: If an argument does not fit to the model, or a chosen layer takes no part in its forward.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> scores = layer_conductance(model, torch.rand(8, 4), torch.zeros(8, dtype=torch.long), layers=nn.ReLU)
        >>> scores["1"].shape
        torch.Size([8, 3])

    """
    check_count("layer_conductance", "n_steps", n_steps, minimum=1, example=50)
    check_choice("layer_conductance", "quadrature", quadrature, QUADRATURES)
    if max_rows is not None:
        check_count("layer_conductance", "max_rows", max_rows, minimum=2, example=1024)
    listed = as_inputs(inputs)
    num_samples = len(listed[0])
    if isinstance(target, int):
        target = torch.full((num_samples,), target, device=listed[0].device)
    check_pairs(target, num_samples)
    chosen = select_layers(model, layers)

    def checked_output(output: Tensor, rows_target: Target) -> Tensor:
        check_target(output, rows_target)
        return target_output(output, rows_target)

    scores = conductance(
        model,
        chosen,
        listed,
        target,
        starts=start_points(listed, baseline),
        n_steps=n_steps,
        quadrature=quadrature,
        objective=checked_output,
        unit_dim=unit_dim,
        max_rows=max_rows,
    )
    if missed := [name for name in chosen if name not in scores]:
        raise ConfigurationError(
            f"layer_conductance(layers=...) chose {', '.join(map(repr, missed))}.",
            "A layer is measured where the model's forward calls it.",
            "Leave these layers out, or call them in forward.",
        )
    return scores


def select_layers(model: nn.Module, layers: LayerChoice | Sequence[LayerChoice] | None) -> dict[str, nn.Module]:
    """Find modules by name or type.

    Returns:
        The modules by name, in the order of `model.named_modules()`, each once. What compilation adds to names is
        taken out.

    Raises:
        ConfigurationError: If a name or type is not in the model.

    """
    modules = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}
    if layers is None:
        driven: dict[str, nn.Module] = {
            name: module for name, module in modules.items() if isinstance(module, ConductanceDropout)
        }
        if not driven:
            there = dropout_like_modules(model)
            raise ConfigurationError(
                f"{type(model).__name__} holds no ConductanceDropout; dropout-like modules in it: "
                f"{', '.join(there) if there else 'none'}.",
                "Y-Drop measures and drives ConductanceDropout layers.",
                "Put ConductanceDropout(p) where nn.Dropout(p) stood, or add one behind each hidden layer.",
            )
        return driven
    choices = [layers] if isinstance(layers, (str, type)) else list(layers)
    found: set[str] = set()
    for choice in choices:
        if isinstance(choice, str):
            matches = {choice} & modules.keys()
        else:
            matches = {name for name, module in modules.items() if isinstance(module, choice)}
        if not matches:
            raise ConfigurationError(
                f"layer_conductance(layers={choice if isinstance(choice, str) else choice.__name__}) was given.",
                f"Layers are names or types of modules of {type(model).__name__}: {', '.join(filter(None, modules))}.",
                "Pass one of these names, or the type of one.",
            )
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def conductance(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    target: Target,
    *,
    starts: tuple[Tensor, ...],
    n_steps: int,
    quadrature: Quadrature,
    objective: Objective = target_output,
    unit_dim: int = 1,
    max_rows: int | None = None,
) -> dict[str, Tensor]:
    """Measure conductance, as `layer_conductance`, with arguments that were checked before.

    It never looks at a value, so that on a GPU the host does not wait.

    Args:
        model: Any torch model.
        layers: The modules to measure, by name.
        inputs: Floating tensors (B, *).
        target: Class index (B,), soft labels (B, C), or None.
        starts: For each input the start of its paths, (1, *) or (B, *).
        n_steps: S, the number of steps.
        quadrature: Where on each step the gradient is taken.
        objective: F, from (output, target) of all rows to (rows,).
        unit_dim: Dimension of the units of layers without a `unit_dim` of their own.
        max_rows: At most so many rows at once.

    Returns:
        For each layer that the forward pass called, by name, (B, U).

    """
    num_samples = len(inputs[0])
    if quadrature != "right" and target is not None:
        # The gradient at the start counts, and is another one for each sample's target: no row serves two samples.
        starts = tuple(start.expand_as(item) for start, item in zip(starts, inputs, strict=True))
    if max_rows is None or len(starts[0]) + n_steps * num_samples <= max_rows:
        return _one_pass(model, layers, inputs, target, starts, n_steps, quadrature, objective, unit_dim)
    measure = partial(
        conductance, model, layers, quadrature=quadrature, objective=objective, unit_dim=unit_dim, max_rows=max_rows
    )
    if num_samples > 1:
        halves = [slice(None, num_samples // 2), slice(num_samples // 2, None)]
        parts = [
            measure(
                tuple(item[half] for item in inputs),
                None if target is None else target[half],
                starts=tuple(start if len(start) == 1 else start[half] for start in starts),
                n_steps=n_steps,
            )
            for half in halves
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # Part of a straight path is a straight path, and the sum over its steps is the sum over the steps of its parts.
    steps = n_steps // 2
    middle = tuple(torch.lerp(start, item, steps / n_steps) for start, item in zip(starts, inputs, strict=True))
    near = measure(middle, target, starts=starts, n_steps=steps)
    far = measure(inputs, target, starts=middle, n_steps=n_steps - steps)
    return {name: near[name] + far[name] for name in near}


def _one_pass(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    target: Target,
    starts: tuple[Tensor, ...],
    n_steps: int,
    quadrature: Quadrature,
    objective: Objective,
    unit_dim: int,
) -> dict[str, Tensor]:
    """Measure conductance in one forward and one backward pass."""
    num_samples = len(inputs[0])
    with borrowed(model, inputs[0].device), recording(layers) as tape:
        points = tuple(path_points(start, item, n_steps) for start, item in zip(starts, inputs, strict=True))
        if target is not None:
            # One row of target for each point: those of the start, then all samples' for each step.
            target = torch.cat([target[: len(starts[0])], target.repeat(n_steps, *[1] * (target.ndim - 1))])
        value = objective(model(*points), target)
        activations = [activation for calls in tape.values() for activation in calls]
        gradients = iter(_gradients(value, activations))
    scores: dict[str, Tensor] = {}
    for name, calls in tape.items():
        layer = layers[name]
        dim = layer.unit_dim if isinstance(layer, ConductanceDropout) else unit_dim
        for activation in calls:
            count_units(name, layer, activation, dim, rows=len(points[0]))
            each = path_conductance(activation.detach(), next(gradients), num_samples, quadrature)
            units = sum_to_units(each, dim)
            scores[name] = scores[name] + units if name in scores else units
    return scores


def _gradients(value: Tensor, activations: list[Tensor]) -> list[Tensor]:
    """Differentiate F, summed over rows, with respect to activations: zeros for those that it does not depend on."""
    if not activations or not value.requires_grad:
        return [torch.zeros_like(activation) for activation in activations]
    # Not value.sum(): in half precision the sum of many rows could overflow.
    return list(torch.autograd.grad(value, activations, torch.ones_like(value), materialize_grads=True))


def count_units(name: str, layer: nn.Module, activation: Tensor, unit_dim: int, *, rows: int) -> int:
    """Count the units of a layer's output, after checking that it has a dimension of units behind one of all rows.

    Args:
        name: The layer's name.
        layer: The layer.
        activation: Its output.
        unit_dim: The dimension of its units.
        rows: How many rows went into the model.

    Returns:
        U.

    Raises:
        ConfigurationError: If the output has no such dimensions.

    """
    if activation.ndim < 2 or len(activation) != rows or not 0 < abs(unit_dim) < activation.ndim:
        raise ConfigurationError(
            f"The layer {name!r} ({type(layer).__name__}, unit_dim={unit_dim}) put out {describe(activation)} "
            f"for {rows} rows.",
            "Its first dimension holds the rows of the batch, and `unit_dim` is another of its dimensions.",
            "Choose the `unit_dim` of the features or channels, and keep the batch first.",
        )
    return activation.shape[unit_dim]
