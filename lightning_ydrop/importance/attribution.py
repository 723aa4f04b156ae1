"""The conductance of many layers in one forward and one backward pass."""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import check_choice, check_count, check_unit_dim
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.attribution import QUADRATURES, Quadrature, path_conductance, sum_to_units
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.importance.arrangement import Baseline, check_baseline, ordinary
from lightning_ydrop.importance.objectives import Objective, TargetLogit, check_objective
from lightning_ydrop.importance.recording import Tape, borrowed, recording
from lightning_ydrop.importance.request import Request, request_of, settled
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.surroundings import has_features_last
from lightning_ydrop.models.batches import logging_muted
from lightning_ydrop.models.calls import Inputs, Target, signature_of
from lightning_ydrop.models.state import named_modules

LayerChoice = str | type[nn.Module]
MaxRows = int | Literal["batch"] | None

# Elements of an activation: to copy so many takes less time than to start the operations for each by itself.
SMALL = 2**13


@torch.inference_mode(False)  # in which gradients can be taken, also while a Trainer validates
def layer_conductance(
    model: nn.Module,
    inputs: Inputs,
    target: Target | int = None,
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = None,
    baseline: Baseline = 0.0,
    n_steps: int = 50,
    quadrature: Quadrature = "right",
    objective: Objective = TargetLogit(),
    interpolate_at: str | None = None,
    forward: Callable[..., Any] | None = None,
    unit_dim: int | None = None,
    max_rows: MaxRows = None,
) -> dict[str, Tensor]:
    """Measure how much each unit of any layers contributes to the output (Eq. 2, arXiv 2409.09088).

    The model is measured in evaluation mode and given back as it was. All layers share one forward and one backward
    pass over the path of all samples: `n_steps * B + 1` rows where every sample's path starts at one and the same
    point, `(n_steps + 1) * B` rows otherwise. The start is the same where `baseline` is, unless something is carried
    along the path that differs with the sample, or the gradient at the start counts ("left", "trapezoid") and differs
    with the sample's target.

    Args:
        model: Any torch model.
        inputs: What its forward takes: a tensor (B, *), a tuple of arguments, or a mapping of arguments by name.
            Floating tensors are walked to from the baseline, all others carried along.
        target: Class index (B,) or one for all samples, soft labels (B, C), dense labels (B, H, W), or None for the
            sum of the outputs.
        layers: The modules whose outputs are measured: names, as in `model.named_modules()`, or types, one or several.
            None takes every `ConductanceDropout`.
        baseline: Where the paths start: a number, a tensor of the shape of one sample or of the whole input, or a
            list of one for each floating input, None for one that stays as it is.
        n_steps: S, the number of steps on each path, at least 1. The error against the integral of Eq. 1 falls with S.
        quadrature: Where on each step the gradient is taken: its "right" end (the paper), its "left" end (Captum), or
            "trapezoid", the mean of both, which converges fastest.
        objective: F, what is differentiated.
        interpolate_at: Name of a module, such as an embedding, at whose output the paths end instead of at the inputs.
            It takes one more forward pass of the samples.
        forward: What is called instead of `model`, in the way in which `forward` of a model is called.
        unit_dim: Dimension of the units in the outputs of layers that do not say: a `ConductanceDropout` has its own.
            By default the last of linear layers, embeddings, of patches too, LayerNorm, RMSNorm and Transformer layers,
            and 1 of all others, such as convolutions and the LayerNorm2d between them; so an activation of (B, T, U)
            takes unit_dim=-1.
        max_rows: At most so many rows, at least 2, pass through the model at once. None takes all in one pass; a
            number splits the samples, and where that does not do each path, into as many passes as needed, which give
            the same. "batch" takes as many as there are samples: it needs no more memory than training.

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
    check_baseline("layer_conductance", baseline)
    check_objective("layer_conductance", objective)
    check_layout("layer_conductance", unit_dim, max_rows)
    called = model if forward is None else forward
    chosen = select_layers("layer_conductance", model, layers)
    for_all = target if isinstance(target, int) else None
    phase1 = request_of(
        model,
        called,
        signature_of(model, called),
        chosen,
        unit_dims_of(chosen, unit_dim),
        inputs,
        None if for_all is not None else ordinary(target) if isinstance(target, Tensor) else target,
        baseline=baseline,
        interpolate_at=interpolate_at,
        objective=objective,
        n_steps=n_steps,
        quadrature=quadrature,
        generator=torch.Generator(),
    )
    if for_all is not None:
        phase1 = replace(phase1, target=torch.full((phase1.num_samples,), for_all, device=phase1.device))
    at_once = max(2, phase1.num_samples) if max_rows == "batch" else max_rows
    with logging_muted(model):
        phase1 = settled(replace(phase1, max_rows=at_once), interpolate_at, baseline)
        scores = conductance(replace(phase1, objective=_Checked(objective, phase1.target)))
    check_called("layer_conductance", chosen, scores)
    return scores


def check_called(owner: str, chosen: Iterable[str], called: Container[str]) -> None:
    """Refuse layers that the model's forward does not call.

    Raises:
        ConfigurationError: If it leaves out any.

    """
    if missed := [name for name in chosen if name not in called]:
        raise ConfigurationError(
            f"{owner}(layers=...) chose {', '.join(map(repr, missed))}.",
            "A layer's units are what it puts out when the model's forward calls it.",
            "Leave these layers out, or call them in forward.",
        )


def unit_dims_of(layers: Mapping[str, nn.Module], unit_dim: int | None) -> dict[str, int]:
    """Say which dimension of each layer's output holds its units, as `layer_conductance` does.

    Args:
        layers: The layers by name.
        unit_dim: Of all that have none of their own; by default it goes by their kind.

    """
    return {name: _unit_dim(layer, unit_dim) for name, layer in layers.items()}


def _unit_dim(layer: nn.Module, given: int | None) -> int:
    if isinstance(layer, ConductanceDropout):
        return layer.unit_dim
    if given is not None:
        return given
    return -1 if has_features_last(layer) else 1


def check_layout(owner: str, unit_dim: int | None, max_rows: MaxRows) -> None:
    """Refuse what cannot be the dimension of units, or a number of rows.

    Raises:
        ConfigurationError: If it cannot.

    """
    if unit_dim is not None:
        check_unit_dim(owner, unit_dim)
    if max_rows not in (None, "batch"):
        check_count(owner, "max_rows", max_rows, minimum=2, example=1024)


class _Checked(Objective):
    """An objective that checks the caller's target, which the rows of the path hold many times over."""

    def __init__(self, objective: Objective, target: Target) -> None:
        self.objective = objective
        self.target = target

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        with torch.no_grad():
            self.objective.check(output, self.target)
        return self.objective(output, target)


def select_layers(
    owner: str, model: nn.Module, layers: LayerChoice | Sequence[LayerChoice] | None
) -> dict[str, nn.Module]:
    """Find modules by name or type, or every `ConductanceDropout`.

    Returns:
        The modules by name, in the order of `model.named_modules()`, each once. What compilation adds to names is
        taken out.

    Raises:
        ConfigurationError: If a name or type is not in the model; it speaks of `owner`, what the user called.

    """
    modules = named_modules(model)
    if layers is None:
        driven = {name: module for name, module in modules.items() if isinstance(module, ConductanceDropout)}
        if not driven:
            raise ConfigurationError(
                f"{owner} was called without `layers`, and {type(model).__name__} holds no ConductanceDropout.",
                "Those are the layers that are measured by default.",
                "Pass the names or types of others, such as layers=nn.Linear.",
            )
        return dict(driven)
    choices = list(layers) if isinstance(layers, (list, tuple)) else [layers]
    found: set[str] = set()
    for choice in choices or [layers]:
        if isinstance(choice, str):
            matches = {choice} & modules.keys()
        elif isinstance(choice, type):
            matches = {name for name, module in modules.items() if isinstance(module, choice)}
        else:
            matches = set()
        if not matches:
            given = choice.__name__ if isinstance(choice, type) else describe(choice)
            raise ConfigurationError(
                f"{owner}(layers={given}) was given.",
                f"Layers are names or types of modules of {type(model).__name__}: {', '.join(filter(None, modules))}.",
                "Pass one of these names, or the type of one.",
            )
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def conductance(phase1: Request) -> dict[str, Tensor]:
    """Measure conductance, as `layer_conductance`, of what was checked before.

    It never looks at a value, so that on a GPU the host does not wait.

    Args:
        phase1: The model, its layers, and the samples.

    Returns:
        For each layer that the forward pass called, by name, (B, U).

    """
    differs = phase1.carried or (phase1.quadrature != "right" and phase1.target is not None)
    if differs:
        # What the start leads to is another thing for each sample: no row serves two.
        starts = tuple(start.expand_as(item) for start, item in zip(phase1.starts, phase1.inputs, strict=True))
        phase1 = replace(phase1, starts=starts)
    with (
        borrowed(phase1.model, phase1.device, constant_parameters=True),
        recording(phase1.layers, phase1.copied) as tape,
    ):
        return _in_parts(phase1, tape)


def _in_parts(phase1: Request, tape: Tape) -> dict[str, Tensor]:
    """Measure conductance in as many passes as it takes with `max_rows`."""
    num_samples, num_starts, n_steps = phase1.num_samples, len(phase1.starts[0]), phase1.n_steps
    if phase1.max_rows is None or num_starts + n_steps * num_samples <= phase1.max_rows:
        return _one_pass(phase1, tape)
    if num_samples > 1:
        at_once = (phase1.max_rows - 1) // n_steps if num_starts == 1 else phase1.max_rows // (n_steps + 1)
        passes = math.ceil(num_samples / max(1, at_once))
        samples = torch.arange(num_samples, device=phase1.device)
        parts = [_in_parts(phase1.take(part), tape) for part in samples.tensor_split(passes)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    # Part of a straight path is a straight path, and the sum over its steps is the sum over the steps of its parts.
    steps = n_steps // 2
    middle = tuple(
        torch.lerp(start, item, steps / n_steps) for start, item in zip(phase1.starts, phase1.inputs, strict=True)
    )
    near = _in_parts(replace(phase1, inputs=middle, n_steps=steps), tape)
    far = _in_parts(replace(phase1, starts=middle, n_steps=n_steps - steps), tape)
    return {name: near[name] + far[name] for name in near}


def _one_pass(phase1: Request, tape: Tape) -> dict[str, Tensor]:
    """Measure conductance in one forward and one backward pass."""
    num_starts, n_steps = len(phase1.starts[0]), phase1.n_steps
    points = tuple(path_points(start, item, n_steps) for start, item in zip(phase1.starts, phase1.inputs, strict=True))
    carried = tuple(_along_the_path(rows, num_starts, n_steps) for rows in phase1.carried)
    target = None if phase1.target is None else _along_the_path(phase1.target, num_starts, n_steps)
    tape.clear()
    value = phase1.value(points, carried, target)
    if overwritten := tape.overwritten:
        # Once more, with copies of their outputs, and from now on always so.
        phase1.copied.update(overwritten)
        tape.clear()
        del value  # or both graphs would be in memory
        value = phase1.value(points, carried, target)
    for name, calls in tape.items():
        count_units(name, phase1.layers[name], calls, phase1.unit_dims[name], rows=len(points[0]))
    # Listed before the backward pass, in which activation checkpoints call their layers once more.
    recorded = [(name, activation) for name, calls in tape.items() for activation in calls]
    activations = [activation for _, activation in recorded]
    gradients = _gradients(value, activations)
    scores: dict[str, Tensor] = {}
    measured = _path_conductances(activations, gradients, phase1.num_samples, phase1.quadrature)
    for (name, _), each in zip(recorded, measured, strict=True):
        units = sum_to_units(each, phase1.unit_dims[name])
        scores[name] = scores[name] + units if name in scores else units
    return scores


def _path_conductances(
    activations: list[Tensor], gradients: list[Tensor], num_samples: int, quadrature: Quadrature
) -> list[Tensor]:
    """Give the conductance (B, *) of each activation: of small ones (rows, U) side by side, as if they were one.

    To copy these takes less time than to start the operations for each of them.
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
    """Give a row to each point: to those of the start, then to all samples' for each step."""
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


def count_units(name: str, layer: nn.Module, outputs: Sequence[Tensor], unit_dim: int, *, rows: int) -> int:
    """Count the units of a layer, after checking that its outputs have a dimension of units behind one of all rows.

    Args:
        name: The layer's name.
        layer: The layer.
        outputs: What it put out, one for each time that it was called.
        unit_dim: The dimension of its units.
        rows: How many rows went into the model.

    Returns:
        U.

    Raises:
        ConfigurationError: If an output has no such dimensions, or they have units in different number.

    """
    for output in outputs:
        if output.ndim < 2 or len(output) != rows or not 0 < abs(unit_dim) < output.ndim:
            raise ConfigurationError(
                f"The layer {name!r} ({type(layer).__name__}, unit_dim={unit_dim}) put out {describe(output)} "
                f"for {rows} rows.",
                "Its first dimension holds the rows of the batch, and `unit_dim` is another of its dimensions.",
                "Choose the `unit_dim` of the features or channels and keep the batch first, or leave this layer out: "
                "as nn.Dropout it stays what it is.",
            )
    widths = list(dict.fromkeys(output.shape[unit_dim] for output in outputs))
    if len(widths) > 1:
        raise ConfigurationError(
            f"The layer {name!r} ({type(layer).__name__}, unit_dim={unit_dim}) was called several times, and put out "
            f"{' and '.join(map(str, widths))} units.",
            "The units of a layer are the same in all its calls.",
            "Make a layer for each place where it is called, or leave this one out: as nn.Dropout it stays what it is.",
        )
    return widths[0]
