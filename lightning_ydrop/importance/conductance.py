"""The conductance of many layers in one forward and one backward pass."""

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ydrop.errors import ConfigurationError
from lightning_ydrop.functional.attribution import Quadrature, path_conductance, sum_to_units
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.importance.recording import Tape, recording
from lightning_ydrop.importance.request import Request
from lightning_ydrop.importance.selection import Layout, count_units, layout_of

# Copying activations with no more elements than this side by side takes less time than an operation for each.
SMALL = 2**13


def conductance(request: Request) -> dict[str, Tensor]:
    """Measure conductance as `layer_conductance` does, of a request that was checked before.

    It never looks at a value, so that on a GPU the host does not wait.

    Args:
        request: The model, its layers, and the samples.

    Returns:
        For each layer that the forward pass called, by name, (B, U).

    """
    differs = request.carried or (request.quadrature != "right" and request.target is not None)
    if differs:
        # The model's output at the start, or F of it, depends on the sample: each needs a row of its own.
        starts = tuple(start.expand_as(item) for start, item in zip(request.starts, request.inputs, strict=True))
        request = replace(request, starts=starts)
    overwritten = set(request.plan.overwritten)
    with (
        request.borrowed(constant_parameters=True),
        recording(request.layers, overwritten) as tape,
    ):
        return _in_parts(request, tape, overwritten)


def _in_parts(request: Request, tape: Tape, overwritten: set[str]) -> dict[str, Tensor]:
    """Measure conductance in as many passes as `max_rows` makes necessary."""
    num_samples, num_starts, n_steps = request.num_samples, len(request.starts[0]), request.n_steps
    if (
        request.max_rows is None
        or num_starts + n_steps * num_samples <= request.max_rows
        or n_steps == 1 == num_samples
    ):
        return _one_pass(request, tape, overwritten)
    if num_samples > 1:
        at_once = (request.max_rows - 1) // n_steps if num_starts == 1 else request.max_rows // (n_steps + 1)
        passes = math.ceil(num_samples / max(1, at_once))
        size, more = divmod(num_samples, passes)
        ends = [size * each + min(each, more) for each in range(passes + 1)]
        parts = [_in_parts(request.part(first, end), tape, overwritten) for first, end in itertools.pairwise(ends)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # Part of a straight path is a straight path, and the sum over its steps is the sum over the steps of its parts.
    steps = n_steps // 2
    middle = tuple(
        torch.lerp(start, item, steps / n_steps) for start, item in zip(request.starts, request.inputs, strict=True)
    )
    near = _in_parts(replace(request, inputs=middle, n_steps=steps), tape, overwritten)
    far = _in_parts(replace(request, starts=middle, n_steps=n_steps - steps), tape, overwritten)
    return {name: near[name] + far[name] for name in near}


def _one_pass(request: Request, tape: Tape, overwritten: set[str]) -> dict[str, Tensor]:
    """Measure conductance in one forward and one backward pass."""
    num_starts, n_steps = len(request.starts[0]), request.n_steps
    points = tuple(
        path_points(start, item, n_steps) for start, item in zip(request.starts, request.inputs, strict=True)
    )
    carried = tuple(_along_the_path(rows, num_starts, n_steps) for rows in request.carried)
    target = None if request.target is None else _along_the_path(request.target, num_starts, n_steps)
    tape.clear()
    value = request.value(points, carried, target)
    if tape.overwritten:
        # Once more, with copies of these layers' outputs.
        overwritten.update(tape.overwritten)
        tape.clear()
        del value  # or both graphs would be in memory
        value = request.value(points, carried, target)
    rows = len(points[0])
    layouts: list[Layout] = []
    for name, calls in tape.items():
        layer, unit_dim, batch_dim = request.layers[name], request.unit_dims[name], request.dim_of_rows(name)
        count_units(name, layer, calls, unit_dim, rows=rows, batch_dim=batch_dim)
        for activation in calls:
            layout = layout_of(activation, unit_dim, rows=rows, batch_dim=batch_dim)
            assert layout is not None
            layouts.append(layout)
    # Listed before the backward pass, in which activation checkpoints call their layers once more.
    recorded = [(name, activation) for name, calls in tape.items() for activation in calls]
    activations = [activation for _, activation in recorded]
    gradients = _gradients(value, activations)
    activations, gradients = (
        [layout.rows_first(each) for layout, each in zip(layouts, tensors, strict=True)]
        for tensors in (activations, gradients)
    )
    scores: dict[str, Tensor] = {}
    measured = _path_conductances(activations, gradients, request.num_samples, request.quadrature)
    for (name, _), layout, each in zip(recorded, layouts, measured, strict=True):
        units = sum_to_units(each, layout.units_behind_rows)
        scores[name] = scores[name] + units if name in scores else units
    return scores


def _path_conductances(
    activations: list[Tensor], gradients: list[Tensor], num_samples: int, quadrature: Quadrature
) -> list[Tensor]:
    """Give the conductance (B, *) of each activation. Small ones (rows, U) are put side by side and treated as one.

    Copying these takes less time than starting the operations for each of them.
    """
    measured: dict[int, Tensor] = {}
    side_by_side: dict[torch.device, list[int]] = {}
    for place, activation in enumerate(activations):
        if activation.ndim == 2 and activation.numel() <= SMALL:
            side_by_side.setdefault(activation.device, []).append(place)
        else:
            measured[place] = path_conductance(activation.detach(), gradients[place], num_samples, quadrature)
    for places in side_by_side.values():
        paths = torch.cat([activations[place].detach() for place in places], 1)
        slopes = torch.cat([gradients[place] for place in places], 1)
        together = path_conductance(paths, slopes, num_samples, quadrature)
        widths = [activations[place].shape[1] for place in places]
        measured.update(zip(places, torch.split(together, widths, 1), strict=True))
    return [measured[place] for place in range(len(activations))]


def _along_the_path(rows: Tensor, num_starts: int, n_steps: int) -> Tensor:
    """Repeat rows for every point: for the starts, then for all samples at each step."""
    return torch.cat([rows[:num_starts], *[rows] * n_steps])


def _gradients(value: Tensor, activations: list[Tensor]) -> list[Tensor]:
    """Differentiate F, summed over rows, with respect to activations: zeros for those that it does not depend on."""
    if not activations or not value.requires_grad:
        return [torch.zeros_like(activation) for activation in activations]
    try:
        # Not value.sum(): in half precision the sum of many rows could overflow.
        return list(torch.autograd.grad(value, activations, torch.ones_like(value), materialize_grads=True))
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        raise ConfigurationError(
            "The model checkpoints activations with use_reentrant=True.",
            "Phase 1 differentiates with respect to activations, which reentrant checkpointing cannot do.",
            "Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False), as torch recommends.",
        ) from error
