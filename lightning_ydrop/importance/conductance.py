"""The conductance of many layers in one forward pass, and one backward pass for each F."""

from functools import partial

import torch
from torch import Tensor

from lightning_ydrop.functional.attribution import at_least_float32, path_conductance, sum_to_units
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.importance.classes import Classes
from lightning_ydrop.importance.passes import (
    Recorded,
    Recorder,
    carried_along,
    hand_over_gradients,
    measured_in_parts,
    target_along,
    with_own_starts,
)
from lightning_ydrop.importance.request import Request

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
    if request.plan.compiled is not None and (scores := request.plan.compiled(request)) is not None:
        return scores
    return conductance_and_change(request)[0]


def one_pass(request: Request, recorder: Recorder) -> dict[str, Tensor]:
    """Measure conductance of samples whose rows all go through a borrowed model at once."""
    return {name: scores for name, scores in _one_pass(request, recorder, None, False).items() if name is not None}


def conductance_and_change(
    request: Request, classes: Classes | None = None, *, with_change: bool = False
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Measure conductance, and how far F is at the samples from F at the baseline.

    Args:
        request: The model, its layers, and the samples.
        classes: The classes that F is taken for instead of the request's target.
        with_change: Whether the second is wanted.

    Returns:
        For each layer that the forward pass called, by name, (B, U), and F(x) - F(x'), (B,), or None. With classes
        (B, K, U) and (B, K).

    """
    one_pass = partial(_one_pass, classes=classes, with_change=with_change)
    measured = measured_in_parts(with_own_starts(request), one_pass)
    change = measured.pop(None, None)
    return {name: scores for name, scores in measured.items() if name is not None}, change


def _one_pass(
    request: Request, recorder: Recorder, classes: Classes | None, with_change: bool
) -> dict[str | None, Tensor]:
    """Measure in one forward pass, and one backward pass for each class: layers by name, and by None the change."""
    points = tuple(
        path_points(start, item, request.n_steps) for start, item in zip(request.starts, request.inputs, strict=True)
    )
    values, change = recorder.passed(partial(_values, request, points, classes, with_change))
    rows = len(points[0])
    del points  # the backward pass does not go down to them
    kept = recorder.recorded(request, rows)
    for_each_class = []
    for number, value in enumerate(values, start=1):
        scores: dict[str | None, Tensor] = {}
        measured = _measured(request, value, kept, keep_graph=number < len(values))
        for place, name in enumerate(kept.names):
            scores[name] = scores[name] + measured[place] if name in scores else measured[place]
        for_each_class.append(scores)
    if classes is None:
        (scores,) = for_each_class
    else:
        scores = {name: torch.stack([each[name] for each in for_each_class], 1) for name in for_each_class[0]}
    if change is not None:
        scores[None] = change
    return scores


def _values(
    request: Request, points: tuple[Tensor, ...], classes: Classes | None, with_change: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Run the model on all points: F of each, (rows,), once for each class, and how far F gets along each path."""
    output = request.output(points, carried_along(request))
    targets = [target_along(request)] if classes is None else classes.targets(output)
    values = [request.value_of(output, target) for target in targets]
    if not with_change:
        return values, None
    size, one_start = request.num_samples, len(request.starts[0]) == 1
    changes = []
    with torch.no_grad():
        # Where samples share a start, the output at it is the same for all, but F of it depends on the target.
        starts = output[:1].repeat_interleave(size, 0) if one_start else output[:size]
        for value, target in zip(values, targets, strict=True):
            at_start = request.value_of(starts, None if target is None else target[-size:])
            changes.append(at_least_float32(value[-size:].detach()) - at_least_float32(at_start))
    return values, changes[0] if classes is None else torch.stack(changes, 1)


@torch.no_grad()
def _measured(request: Request, value: Tensor, kept: Recorded, *, keep_graph: bool) -> dict[int, Tensor]:
    """Give the conductance (B, U) of each activation, by its place. The last backward pass lets go of the activations.

    Small ones (rows, U) are put side by side and treated as one. Copying these takes less time than starting the
    operations for each of them.
    """
    measured: dict[int, Tensor] = {}
    small: dict[torch.device, dict[int, tuple[Tensor, Tensor]]] = {}
    activations = dict(enumerate(kept.activations))
    if not keep_graph:
        kept.activations.clear()

    def take(place: int, slope: Tensor) -> None:
        layout, activation = kept.layouts[place], activations.pop(place)
        if activation.ndim == 2 and activation.numel() <= SMALL:
            paths = layout.rows_first(activation), layout.rows_first(slope)
            small.setdefault(activation.device, {})[place] = paths
            return
        each = path_conductance(
            layout.rows_first(activation), layout.rows_first(slope), request.num_samples, request.quadrature
        )
        measured[place] = sum_to_units(each, layout.units_behind_rows)

    hand_over_gradients(value, activations, take, keep_graph=keep_graph)
    for side_by_side in small.values():
        paths, slopes = (torch.cat(each, 1) for each in zip(*side_by_side.values(), strict=True))
        together = path_conductance(paths, slopes, request.num_samples, request.quadrature)
        widths = [path.shape[1] for path, _ in side_by_side.values()]
        measured.update(zip(side_by_side, torch.split(together, widths, 1), strict=True))
    return measured
