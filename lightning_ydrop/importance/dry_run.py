"""The dry run: phase 1 on a first batch, with a look at everything that could be wrong, before anything is trained."""

import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.importance.arrangement import FIXED, Batch, Role, arrange
from lightning_ydrop.importance.baseline import baseline_on
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.recording import recording
from lightning_ydrop.importance.request import (
    Plan,
    Request,
    Subject,
    bare_request,
    needs_graph,
    request_from,
    request_of,
    subject_of,
)
from lightning_ydrop.importance.selection import count_units
from lightning_ydrop.importance.settings import EngineSettings
from lightning_ydrop.importance.surroundings import Surroundings, warn_of_units
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.calls import Inputs, Target
from lightning_ydrop.models.checkpointing import (
    SavedMemory,
    affordable_rows,
    bytes_of,
    may_checkpoint,
    seeing_checkpoints,
)
from lightning_ydrop.models.state import Observations, device_of

GeneratorFor = Callable[[str], torch.Generator]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Findings:
    """What a dry run has found out for all batches.

    Attributes:
        subject: The model, with everything on the training device.
        path: The settings, with the baseline on the training device.
        plan: How to measure each batch.
        left: Why layers are not driven that forward calls, by name.
        in_training_alone: Layers that forward calls in training mode and not in evaluation mode.

    """

    subject: Subject
    path: PathSettings
    plan: Plan
    left: Mapping[str, str] = field(default_factory=dict)
    in_training_alone: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """The training device."""
        return device_of(self.subject.model)


def without_samples(
    model: nn.Module, forward: Callable[..., Any], layers: Mapping[str, ConductanceDropout], path: PathSettings
) -> Findings:
    """Give what is known where this rank has no samples and others have."""
    unit_dims = {name: layer.unit_dim for name, layer in layers.items()}
    return Findings(subject_of(model, forward, layers, unit_dims, path.objective, Observations()), path, Plan())


def dry_run(
    model: nn.Module,
    forward: Callable[..., Any],
    layers: Mapping[str, ConductanceDropout],
    settings: EngineSettings,
    inputs: Inputs,
    target: Target,
    generator_for: GeneratorFor,
) -> Findings:
    """Run phase 1 on a batch, and throw the scores away.

    Args:
        model: The model.
        forward: What is called.
        layers: The layers to drive, by name.
        settings: The engine's.
        inputs: What forward takes.
        target: What F is taken with, or None.
        generator_for: Gives the source of chance for a purpose.

    Raises:
        ConfigurationError: If inputs, target or measure do not fit to the model. What the user's own code raises is
            raised as it is, with a note.

    """
    unit_dims = {name: layer.unit_dim for name, layer in layers.items()}
    subject, path = subject_of(model, forward, layers, unit_dims, settings.path.objective), settings.path
    batch = _arranged(subject, path, inputs, target)
    path = replace(path, baseline=baseline_on(batch.device, path.baseline))
    objective = path.objective.on(batch.device)
    subject = subject_of(model, forward, layers, unit_dims, objective, Observations())
    look = _look(subject, path, batch)
    _compare_rows(look, path)
    plan, scores = _phase_1(settings, subject, path, look.plan, inputs, target, generator_for)
    num_units = _count_scored(settings, layers, look.num_units, scores)
    plan = replace(plan, num_units=num_units, smallest_batch=_smallest_batch(subject, path, plan, batch))
    _warn_of_what_misleads(model, scores)
    _warn_of_baseline(subject, path, plan, batch, scores)
    warn_of_units(layers, look.surroundings)
    missed = layers.keys() - num_units.keys() - look.left.keys()
    if missed or may_checkpoint(model):
        plan, called = _in_training(look, plan)
        return Findings(subject, path, plan, look.left, frozenset(missed & called))
    return Findings(subject, path, plan, look.left)


def _arranged(subject: Subject, path: PathSettings, inputs: Inputs, target: Target) -> Batch:
    return arrange(
        subject.forward,
        subject.signature,
        inputs,
        target if subject.objective.takes_target else None,
        baseline=path.baseline,
        interpolate=path.interpolate_at is None,
        batch_dim=path.batch_dim,
    )


@dataclass(frozen=True)
class _Look:
    """What a forward pass of the whole batch in evaluation mode has shown."""

    request: Request
    batch: Batch
    plan: Plan
    output: Tensor
    num_units: dict[str, int]
    left: dict[str, str]
    surroundings: Surroundings
    recorded: int
    checkpointed: list[nn.Module]


def _look(subject: Subject, path: PathSettings, batch: Batch) -> _Look:
    """Pass the whole batch through the model once, as training does, and check what comes out of it and its layers."""
    plan = Plan(roles=batch.call.roles)
    # Where training saves memory by checkpoints, a graph of the whole batch without them may be too large.
    records = not may_checkpoint(subject.model)
    try:
        return _look_with(subject, path, batch, plan, records)
    except NotImplementedError as error:
        raise ConfigurationError(
            f"{type(subject.model).__name__} has no forward.",
            "Phase 1 calls the model with the inputs, to see its outputs.",
            "Write `forward`, or `ydrop_forward` in a LightningModule whose forward does something else.",
        ) from error
    except RuntimeError as error:
        if not needs_graph(error):
            raise
    with suppress(RuntimeError):
        return _look_with(subject, path, batch, plan, True)
    return _look_with(subject, path, batch, replace(plan, constant_parameters=False), True)


def _look_with(subject: Subject, path: PathSettings, batch: Batch, plan: Plan, records: bool) -> _Look:
    # Copies of the rows, since a forward may write to its inputs.
    rows = batch.take(torch.arange(batch.size))
    request = bare_request(subject, rows, path, torch.Generator(), plan=plan, learning=True)
    surroundings = Surroundings(subject.model.modules(), subject.layers)
    with (
        request.borrowed(constant_parameters=True),
        surroundings.watched(),
        seeing_checkpoints(subject.model) as checkpointed,
        recording(subject.layers, frozenset()) as tape,
        torch.set_grad_enabled(records),
    ):
        output = request.output(request.inputs, request.carried)
        request.objective.check(output, batch.target)
        recorded = bytes_of(*(activation for calls in tape.values() for activation in calls))
    num_units: dict[str, int] = {}
    left: dict[str, str] = {}
    rows_in = max(2, batch.size)
    for name, calls in tape.items():
        layer = subject.layers[name]
        assert isinstance(layer, ConductanceDropout)
        if any(layer.is_unbatched(call) for call in calls):
            left[name] = (
                f"torch takes {describe(calls[0])} for a single sample, of which {layer.replaced[0]!r} drops whole rows"
            )
            continue
        num_units[name] = count_units(name, layer, calls, layer.unit_dim, rows=rows_in, batch_dim=path.batch_dim)
        layer.prepare(num_units[name], calls[0].device)
    output = output.detach()
    plan = replace(plan, overwritten=frozenset(tape.overwritten), output=torch.empty_like(output, device="meta"))
    return _Look(request, batch, plan, output, num_units, left, surroundings, recorded, list(checkpointed))


def _compare_rows(look: _Look, path: PathSettings) -> None:
    """Pass half of the batch through the model, the last sample first, and compare with what it gave within the batch.

    Phase 1 passes on rows in any order and number. Where samples influence each other, none has a conductance of its
    own.
    """
    size = look.batch.size
    if size < 2:
        return
    rows = torch.arange(size - 1, (size - 1) // 2, -1)
    alone = _output_of(look, rows)
    within = look.output[rows.to(look.output.device)]
    if _differs(alone, within) and not _normalises_by_batch(look.request.model):
        again = _output_of(look, torch.arange(size), draws=1)
        if _differs(again, look.output):
            return  # by chance, in evaluation too: a comparison says nothing
        other = 1 - path.batch_dim if path.batch_dim < 2 else 0
        warnings.warn(
            f"The outputs of {type(look.request.model).__name__} for {len(rows)} samples of the first batch change "
            f"when the others are not there: with batch_dim={path.batch_dim}, samples influence each other, and none "
            "has a conductance of its own. "
            f"Where another dimension is the batch, as in models of (T, B, F), pass batch_dim={other}. "
            "Where it is what the model does, as a normalisation by the batch, scores are those of rows that mix.",
            UserWarning,
            stacklevel=5,
        )


def _output_of(look: _Look, rows: Tensor, draws: int = 0) -> Tensor:
    """Pass some samples through the model, after a number of draws from the random streams."""
    batch, request = look.batch.take(rows), look.request
    with request.borrowed(constant_parameters=True):
        for _ in range(draws):
            random.random()
            for device in {torch.device("cpu"), request.device}:
                torch.rand((), device=device)
        return request.output(batch.inputs, batch.carried).detach()


def _differs(one: Tensor, other: Tensor) -> bool:
    """Tell whether outputs differ by more than the order of additions explains."""
    if one.shape != other.shape:
        return True
    precision = one.dtype
    if torch.is_autocast_enabled(one.device.type):
        precision = torch.get_autocast_dtype(one.device.type)
    tolerance = max(0.01, 16 * torch.finfo(precision).eps)
    one, other = one.double(), other.double()
    both = one.isfinite() & other.isfinite()
    scale = other.where(both, 0.0).abs().max()
    return bool(((one - other).where(both, 0.0).abs() > tolerance * scale).any())


def _normalises_by_batch(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and not module.track_running_stats
    ]


def _phase_1(
    settings: EngineSettings,
    subject: Subject,
    path: PathSettings,
    plan: Plan,
    inputs: Inputs,
    target: Target,
    generator_for: GeneratorFor,
) -> tuple[Plan, dict[str, Tensor]]:
    """Score the units as every step will, in the first of some plans that the model works with."""
    plans = [plan]
    if plan.roles is not None and (fixed := _without_square(plan.roles, subject, path, inputs, target)) != plan.roles:
        plans.append(replace(plan, roles=fixed))
    first_error: Exception | None = None
    while plans:
        plan = plans.pop(0)
        try:
            request = request_from(subject, path, plan, inputs, target, generator_for, learning=True)
            assert request is not None  # no batch is too small by now
            scores: Any = settings.measure.score(request)
        except Exception as error:
            if plan.constant_parameters and needs_graph(error):
                plans.insert(0, replace(plan, constant_parameters=False))
            first_error = first_error or error
            continue
        if not isinstance(scores, dict):
            raise ConfigurationError(
                f"{settings.measure!r} gave {describe(scores)}.",
                "A measure gives a dictionary of scores, by the name of the layer.",
                "Return {name: scores} from Measure.score.",
            )
        return plan, scores
    assert first_error is not None
    raise first_error


def _without_square(
    roles: tuple[Role, ...], subject: Subject, path: PathSettings, inputs: Inputs, target: Target
) -> tuple[Role, ...]:
    """Take tensors for fixed that have as many entries as there are samples in several dimensions, as a mask (T, T)."""
    batch = _arranged(subject, path, inputs, target)
    carried = iter(batch.carried)
    square = [role.kind == "carried" and list(next(carried).shape[:3]).count(batch.size) > 1 for role in roles]
    return tuple(FIXED if fixed else role for role, fixed in zip(roles, square, strict=True))


def _count_scored(
    settings: EngineSettings,
    layers: Mapping[str, ConductanceDropout],
    num_units: Mapping[str, int],
    scores: Mapping[str, Any],
) -> dict[str, int]:
    """Count the units of each layer that has scores, after a look at their shape."""
    scored: dict[str, int] = {}
    for name, values in scores.items():
        fits = isinstance(values, Tensor) and values.is_floating_point() and values.ndim == 2 and len(values) > 0
        expected = num_units.get(name)
        if fits and name in layers and expected is None:  # where it is a matter of chance what runs
            expected = values.shape[1]
            layers[name].prepare(expected, values.device)
        if not fits or values.shape[1] != expected:
            raise ConfigurationError(
                f"{settings.measure!r} scored {name!r} with {describe(values)}.",
                f"A measure gives each layer floating (N, U) scores; {name!r} has {expected} units.",
                "Sum over positions in Measure.score, or set the layer's `unit_dim`.",
            )
        scored[name] = values.shape[1]
    return scored


def _smallest_batch(subject: Subject, path: PathSettings, plan: Plan, batch: Batch) -> int:
    """Try phase 1 on a single sample, as a last batch may have no more, and say how small a batch may be."""
    if batch.size == 1:
        return 1
    one = batch.take(torch.tensor([batch.size - 1]))
    try:
        request = _request_of_one(subject, path, plan, one)
        with request.borrowed(constant_parameters=True):
            points = tuple(
                path_points(start, item, path.n_steps)
                for start, item in zip(request.starts, request.inputs, strict=True)
            )
            carried, target = (
                tuple(torch.cat([rows] * len(points[0])) for rows in tensors)
                for tensors in (request.carried, () if request.target is None else (request.target,))
            )
            request.value(points, carried, target[0] if target else None)
    except Exception as error:
        warnings.warn(
            f"Phase 1 raised {type(error).__name__} for a batch of a single sample: {error} "
            f"Batches with fewer samples than the first, which has {batch.size}, are passed over: probabilities stay "
            "what they are. "
            "Drop them with DataLoader(drop_last=True), or let forward take any number of rows.",
            UserWarning,
            stacklevel=5,
        )
        return batch.size
    return 1


def _request_of_one(subject: Subject, path: PathSettings, plan: Plan, one: Batch) -> Request:
    """Make a request of a batch with a single sample."""
    return request_of(subject, one, path, torch.Generator(), plan=plan, max_rows=path.n_steps + 1, learning=True)


def _warn_of_what_misleads(model: nn.Module, scores: Mapping[str, Tensor]) -> None:
    means = {name: values.mean(0) for name, values in scores.items() if values.shape[1] > 1}
    if alike := [name for name, mean in means.items() if mean.std() == 0]:
        warnings.warn(
            f"All units of {', '.join(map(repr, alike))} have the same score in the first batch: units that do not "
            "differ are ranked by their position, or where the score is 0 their probabilities stay what they are. "
            "The objective may not depend on these layers, the labels of these samples may not count, or the "
            "layers run under torch.no_grad() or in activation checkpoints without use_reentrant=False. "
            "See what `layer_conductance` gives for them, or choose another objective.",
            NoEffectWarning,
            stacklevel=5,
        )
    if mixing := _normalises_by_batch(model):
        warnings.warn(
            f"{', '.join(map(repr, mixing))} normalise by the batch at hand in evaluation too, so that in phase 1 "
            "the points of all paths mix. Set track_running_stats=True for scores of each sample by itself.",
            UserWarning,
            stacklevel=5,
        )


def _warn_of_baseline(
    subject: Subject, path: PathSettings, plan: Plan, batch: Batch, scores: Mapping[str, Tensor]
) -> None:
    """Name the baseline where the model has no finite output there, so that no score will ever be finite."""
    if all(bool(values.isfinite().all()) for values in scores.values()):
        return
    request = _request_of_one(subject, path, plan, batch.take(torch.tensor([0])))
    with request.borrowed(constant_parameters=True):
        at_start, at_end = (
            bool(request.value(points, request.carried, request.target).isfinite().all())
            for points in (request.starts, request.inputs)
        )
    if at_end and not at_start:
        warnings.warn(
            f"The output of {type(subject.model).__name__} is not finite at the baseline, {describe(path.baseline)}, "
            "where every path starts. So no score is finite, and probabilities stay at initial_drop_prob. "
            "A forward that divides by the size of its input, or takes a logarithm, has no value at 0. "
            "Pass a baseline where it has one, such as baseline=0.1.",
            NoEffectWarning,
            stacklevel=5,
        )


def _in_training(look: _Look, plan: Plan) -> tuple[Plan, frozenset[str]]:
    """Pass the whole batch through the model in training mode, and undo that, to see what it does there alone.

    A forward that takes more in training mode, such as targets, shows nothing.

    Returns:
        The plan, with the checkpoints that training sets, and the layers that run.

    """
    request, saved = look.request, SavedMemory(look.request.model)
    rows = look.batch.take(torch.arange(look.batch.size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with (
                request.borrowed(evaluate=False),
                seeing_checkpoints(request.model) as checkpointed,
                recording(request.layers) as tape,
                saved.counted(),
            ):
                request.output(rows.inputs, rows.carried)
        except Exception:
            return plan, frozenset()
    more = tuple(module for module in checkpointed if module not in look.checkpointed)
    memory = affordable_rows(saved.size, _saved_in_evaluation(look), look.recorded, more)
    return replace(plan, checkpointed=more, memory=memory), frozenset(tape)


def _saved_in_evaluation(look: _Look) -> int:
    """Count what a pass of the whole batch in evaluation mode would keep, by one of a few rows."""
    request, saved = look.request, SavedMemory(look.request.model)
    few = min(2, look.batch.size)
    rows = look.batch.take(torch.arange(few))
    with request.borrowed(constant_parameters=True), recording(request.layers), saved.counted():
        request.output(rows.inputs, rows.carried)
    return saved.size * look.batch.size // few


def warn_of_layers_left(findings: Findings, layers: Iterable[str], num_units: Mapping[str, int]) -> None:
    """Say once which layers stay vanilla dropout, and why."""
    missed = [name for name in layers if name not in num_units and name not in findings.left]
    if in_training := [name for name in missed if name in findings.in_training_alone]:
        warnings.warn(
            f"Y-Drop has no score for {', '.join(map(repr, in_training))}: {_IN_TRAINING_ALONE}",
            NoEffectWarning,
            stacklevel=4,
        )
    if not_called := [name for name in missed if name not in findings.in_training_alone]:
        warnings.warn(
            f"Y-Drop has no score for {', '.join(map(repr, not_called))}: the model's forward did not call them. "
            "Only layers that forward calls are driven; these stay vanilla dropout. "
            "Call them in forward, or make them nn.Dropout.",
            NoEffectWarning,
            stacklevel=4,
        )
    for name, reason in findings.left.items():
        warnings.warn(
            f"Y-Drop does not drive {name!r}: {reason}. It stays what it is. "
            "Give it a batch of samples, or leave it out of the conversion with `exclude`.",
            NoEffectWarning,
            stacklevel=4,
        )


_IN_TRAINING_ALONE = (
    "the model's forward calls them in training mode alone, and phase 1 runs in evaluation mode. "
    "These layers stay vanilla dropout. "
    "Call them in evaluation mode too, where they return their input: without `if self.training`."
)


def check_scored(
    model: nn.Module, layers: Mapping[str, nn.Module], findings: Findings, num_units: Mapping[str, int]
) -> None:
    """Refuse a model of which no layer is scored on any rank.

    Raises:
        ConfigurationError: If it is so.

    """
    if num_units:
        return
    in_training = findings.in_training_alone
    raise ConfigurationError(
        f"Phase 1 of {type(model).__name__} scores none of {', '.join(map(repr, layers))}.",
        "Y-Drop drives layers that forward calls"
        + (
            f" in evaluation mode, in which phase 1 runs. It calls {', '.join(map(repr, sorted(in_training)))} in "
            "training mode alone."
            if in_training
            else "."
        ),
        "Call them in evaluation mode too, where they return their input: without `if self.training`."
        if in_training
        else "Call them in forward, or write `ydrop_forward` in the LightningModule.",
    )
