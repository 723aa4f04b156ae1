"""Conductance for its own sake, of any layers of any model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from lightning_ydrop.checks import check_count, check_flag, check_unit_dim
from lightning_ydrop.functional.attribution import Quadrature
from lightning_ydrop.importance.arrangement import arrange, ordinary
from lightning_ydrop.importance.baseline import Baseline
from lightning_ydrop.importance.classes import ClassChoice, Classes, check_classes
from lightning_ydrop.importance.conductance import conductance_and_change
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.request import Request, bare_request, completed
from lightning_ydrop.importance.selection import LayerChoice, check_called, select_layers, unit_dims_of
from lightning_ydrop.importance.subject import Plan, needs_graph, subject_of
from lightning_ydrop.importance.targets import check_target
from lightning_ydrop.importance.tasks import Task, objective_of
from lightning_ydrop.importance.trials import rows_first
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.sharing import without_lost_memory
from lightning_ydrop.models.wrappers import unwrapped

MaxRows = int | Literal["batch"] | None
Result = TypeVar("Result")


@overload
def layer_conductance(
    model: nn.Module,
    inputs: Inputs,
    target: Target | int = ...,
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = ...,
    baseline: Baseline = ...,
    n_steps: int = ...,
    quadrature: Quadrature = ...,
    objective: Objective | Task | None = ...,
    interpolate_at: str | None = ...,
    forward: Callable[..., Any] | None = ...,
    unit_dim: int | None = ...,
    max_rows: MaxRows = ...,
    batch_dim: int = ...,
    classes: ClassChoice = ...,
    return_convergence_delta: Literal[False] = ...,
) -> dict[str, Tensor]: ...


@overload
def layer_conductance(
    model: nn.Module,
    inputs: Inputs,
    target: Target | int = ...,
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = ...,
    baseline: Baseline = ...,
    n_steps: int = ...,
    quadrature: Quadrature = ...,
    objective: Objective | Task | None = ...,
    interpolate_at: str | None = ...,
    forward: Callable[..., Any] | None = ...,
    unit_dim: int | None = ...,
    max_rows: MaxRows = ...,
    batch_dim: int = ...,
    classes: ClassChoice = ...,
    return_convergence_delta: Literal[True],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...


def layer_conductance(
    model: nn.Module,
    inputs: Inputs,
    target: Target | int = None,
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = None,
    baseline: Baseline = 0.0,
    n_steps: int = 50,
    quadrature: Quadrature = "right",
    objective: Objective | Task | None = None,
    interpolate_at: str | None = None,
    forward: Callable[..., Any] | None = None,
    unit_dim: int | None = None,
    max_rows: MaxRows = None,
    batch_dim: int = 0,
    classes: ClassChoice = None,
    return_convergence_delta: bool = False,
) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Measure how much each unit of any layers contributes to the output (Eq. 2, arXiv 2409.09088).

    The model is measured in evaluation mode and given back as it was. All layers share one forward and one backward
    pass over the path of all samples: `n_steps * B + 1` rows where all paths start at the same point,
    `(n_steps + 1) * B` rows otherwise. They start at the same point if the `baseline` is the same for all samples,
    except where something is carried along the path, or where the gradient at the start counts ("left", "trapezoid")
    and depends on the sample's target.

    Args:
        model: Any torch model.
        inputs: What its forward takes: a tensor (B, *), a tuple of arguments, or a mapping of arguments by name.
            Paths run from the baseline to floating tensors. All others are carried along: they stay as they are.
        target: Class index (B,) or one for all samples, soft labels (B, C), dense labels (B, H, W), or None for the
            sum of the outputs.
        layers: The modules whose outputs are measured: names, as in `model.named_modules()`, or types, one or several.
            None takes every `ConductanceDropout`.
        baseline: Where the paths start: a number, a tensor of the shape of one sample or of the whole input, or a
            list of one for each floating input, None for one that stays as it is.
        n_steps: S, the number of steps on each path, at least 1. The error against the integral of Eq. 1 falls with S.
        quadrature: Where on each step the gradient is taken: its "right" end (the paper), its "left" end (Captum), or
            "trapezoid", the mean of both, which converges fastest.
        objective: F, what is differentiated: an objective, or the name of a task as for `YDrop`.
        interpolate_at: Name of a module, such as an embedding, at whose output the paths end instead of at the inputs.
            It takes one more forward pass of the samples.
        forward: What is called instead of `model`, in the way in which `forward` of a model is called.
        unit_dim: Dimension of the units in the outputs of layers that do not say: a `ConductanceDropout` has its own.
            By default the last dimension for linear layers, embeddings (of patches too), LayerNorm, RMSNorm and
            Transformer layers, and 1 for all others, such as convolutions and LayerNorm2d. So an activation (B, T, U)
            takes unit_dim=-1.
        max_rows: The largest number of rows that pass through the model at once, at least 2. None takes all in one
            pass. A number splits the samples, and each path too if that is not enough, into as many passes as needed,
            with the same result. "batch" takes as many rows as there are samples: no more memory than training needs.
        batch_dim: The dimension of the samples in inputs, target, output and layers: 1 for models of (T, B, F), such as
            `nn.LSTM` and `nn.Transformer` by default. A tensor with its samples first, such as lengths, may keep them
            there.
        classes: The classes that F is taken for, K of them, each for all samples and all positions of dense outputs, or
            "all" that the output has. They take the place of `target`, and of K calls with target=0, target=1 and so
            on: all share one forward pass, and each takes a backward pass.
        return_convergence_delta: Whether to return what the conductance of each layer is off by, too.

    Returns:
        For each layer, by name, its conductance (B, U), on the device of its output, in float32 or, for float64
        activations, float64. With `classes` (B, K, U), in their order. A layer that is called several times counts as
        the sum of its calls.

        With `return_convergence_delta` a pair: this, and for each layer its deltas (B,), or (B, K). A delta is the sum
        of a layer's conductance over its units, less F(x) - F(x'), the change of F from baseline to input. It takes no
        further pass. At a layer that all paths through the network cross, delta is the error of `n_steps`: pass more
        steps, or quadrature="trapezoid", until it is small beside F(x) - F(x'). At other layers it also holds, with its
        sign turned, what passes beside the layer, such as through a skip connection.

    Raises:
        ConfigurationError: If an argument does not fit the model, or its forward does not call a chosen layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> scores = layer_conductance(model, torch.rand(8, 4), torch.zeros(8, dtype=torch.long), layers=nn.ReLU)
        >>> scores["1"].shape
        torch.Size([8, 3])

        The same for both classes, and how far the sums are from the change of each logit:

        >>> scores, deltas = layer_conductance(
        ...     model, torch.rand(8, 4), classes="all", layers=nn.ReLU, return_convergence_delta=True
        ... )
        >>> scores["1"].shape, deltas["1"].shape
        (torch.Size([8, 2, 3]), torch.Size([8, 2]))

    """
    owner, chosen = "layer_conductance", objective_of("layer_conductance", objective)
    path = PathSettings(owner, n_steps, "all", baseline, quadrature, chosen, interpolate_at, batch_dim)
    check_layout(owner, unit_dim, max_rows)
    with_deltas = check_flag(owner, "return_convergence_delta", return_convergence_delta)
    each = check_classes(owner, classes, target, chosen)
    measure = partial(_of_all_layers, owner=owner, classes=each, with_change=with_deltas)
    scores, change = measured_along(path, model, inputs, target, layers, forward, unit_dim, max_rows, measure, each)
    if change is None:
        return scores
    return scores, {name: values.sum(-1) - change.to(values) for name, values in scores.items()}


def conductance_along(
    path: PathSettings,
    model: nn.Module,
    inputs: Inputs,
    target: Target | int,
    layers: LayerChoice | Sequence[LayerChoice] | None,
    forward: Callable[..., Any] | None,
    unit_dim: int | None,
    max_rows: MaxRows,
) -> dict[str, Tensor]:
    """Measure conductance as `layer_conductance` does, with settings that were checked before."""
    measure = partial(_of_all_layers, owner=path.owner)
    return measured_along(path, model, inputs, target, layers, forward, unit_dim, max_rows, measure)[0]


@torch.inference_mode(False)  # so that gradients can be taken, also while a Trainer validates
def measured_along(
    path: PathSettings,
    model: nn.Module,
    inputs: Inputs,
    target: Target | int,
    layers: LayerChoice | Sequence[LayerChoice] | None,
    forward: Callable[..., Any] | None,
    unit_dim: int | None,
    max_rows: MaxRows,
    measure: Callable[[Request], Result],
    classes: Classes | None = None,
) -> Result:
    """Arrange a batch as `layer_conductance` does, and measure it, with settings that were checked before.

    Args:
        path: How the samples are measured.
        model: As of `layer_conductance`, like the next six.
        inputs: The samples.
        target: What F is taken with.
        layers: The layers.
        forward: What is called.
        unit_dim: The dimension of units.
        max_rows: The largest number of rows in a pass.
        measure: Measures a request. It may be called again if a forward pass turns out to need another treatment.
        classes: The classes that F is taken for instead of the target, for `measure` to know, and here to be checked.

    Raises:
        ConfigurationError: If an argument does not fit the model.

    """
    model, forward = unwrapped(model, forward)
    chosen = select_layers(path.owner, model, layers)
    unit_dims = unit_dims_of(chosen, unit_dim)
    subject = subject_of(model, forward, chosen, unit_dims, path.objective)
    for_all = int(target) if isinstance(target, Integral) else None
    of_batch = None if not subject.objective.takes_target or for_all is not None else target
    batch = arrange(
        forward,
        subject.signature,
        inputs,
        ordinary(of_batch) if isinstance(of_batch, Tensor) else of_batch,  # type: ignore[arg-type]
        baseline=path.baseline,
        interpolate=path.interpolate_at is None,
        batch_dim=path.batch_dim,
        model=subject.model,
    )
    batch = batch.aimed_by(subject.objective)
    if for_all is not None:
        batch = replace(batch, target=torch.full((batch.size,), for_all, device=batch.device))
    subject = replace(subject, objective=subject.objective.on(batch.device))
    at_once = max(2, batch.size) if max_rows == "batch" else max_rows
    plan = Plan(rows_first=without_lost_memory(partial(rows_first, subject, path, batch)))

    def measured(plan: Plan) -> Result:
        request = bare_request(subject, batch, path, torch.Generator(), plan=plan, max_rows=at_once)
        request = completed(request, batch, path)
        return measure(replace(request, objective=_Checked(request, classes)))

    try:
        return without_lost_memory(partial(measured, plan))
    except RuntimeError as error:
        if not needs_graph(error):
            raise
    return without_lost_memory(partial(measured, replace(plan, constant_parameters=False)))


def check_layout(owner: str, unit_dim: int | None, max_rows: MaxRows) -> None:
    """Refuse a `unit_dim` that is no dimension of units, and a `max_rows` that is no number of rows.

    Raises:
        ConfigurationError: If one of the two is refused.

    """
    if unit_dim is not None:
        check_unit_dim(owner, unit_dim)
    if max_rows not in (None, "batch"):
        check_count(owner, "max_rows", max_rows, minimum=2, example=1024)


def _of_all_layers(
    request: Request, owner: str, classes: Classes | None = None, with_change: bool = False
) -> tuple[dict[str, Tensor], Tensor | None]:
    scores, change = conductance_and_change(request, classes, with_change=with_change)
    check_called(owner, request.layers, scores)
    return scores, change


class _Checked(Objective):
    """An objective that checks the caller's target once, in the first pass: the host waits for a device to see it."""

    def __init__(self, request: Request, classes: Classes | None) -> None:
        self.objective = request.objective
        self.target = request.target
        self.classes = classes
        self.batch_dim = request.dim_of_rows("")
        self.is_checked = False

    def __call__(self, output: Tensor, target: Target) -> Tensor:
        if not self.is_checked:
            with torch.no_grad():
                shown = output if self.target is None else output[: len(self.target)]  # of points on all paths
                if self.classes is not None:
                    self.classes.check(shown, self.objective)
                for each in [self.target] if self.classes is None else self.classes.extremes(shown):
                    check_target(self.objective, shown, each, self.batch_dim)
            self.is_checked = True
        return self.objective(output, target)

    def __repr__(self) -> str:
        return repr(self.objective)
