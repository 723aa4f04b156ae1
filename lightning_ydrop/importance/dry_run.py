"""The dry run: phase 1 on a first batch, with a look at everything that could be wrong, before anything is trained."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, NoEffectWarning, describe, listed
from lightning_ydrop.importance.arrangement import Batch, Role
from lightning_ydrop.importance.baseline import baseline_on
from lightning_ydrop.importance.compilable import refusal
from lightning_ydrop.importance.compiled import Compiled, compiled
from lightning_ydrop.importance.conductance import conductance
from lightning_ydrop.importance.equal_scores import warn_of_equal_scores
from lightning_ydrop.importance.findings import Findings, warn_of_shared_masks, warn_of_zero_rates
from lightning_ydrop.importance.measures import scores_by
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.readings import possible_roles
from lightning_ydrop.importance.recording import recording
from lightning_ydrop.importance.request import arranged, num_rows_of, num_samples_of, request_from
from lightning_ydrop.importance.settings import EngineSettings
from lightning_ydrop.importance.subject import Plan, Subject, needs_graph, subject_of
from lightning_ydrop.importance.surroundings import warn_of_units
from lightning_ydrop.importance.tasks import check_task
from lightning_ydrop.importance.trials import Look, in_training, look_at, output_of, request_of_one, smallest_batch
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.calls import Inputs, Target, differ
from lightning_ydrop.models.checkpointing import may_checkpoint
from lightning_ydrop.models.functional_dropout import seeing_dropout_calls
from lightning_ydrop.models.observations import Observations

GeneratorFor = Callable[[str], torch.Generator]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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
    batch = arranged(subject, path, inputs, target)
    path = replace(path, baseline=baseline_on(batch.device, path.baseline))
    objective = path.objective.on(batch.device)
    subject = subject_of(model, forward, layers, unit_dims, objective, Observations())
    with seeing_dropout_calls() as dropout_calls:
        look = look_at(subject, path, batch)
    roles, is_mixing = _roles_by_comparison(look)
    look = look.read_as(roles)
    batch = look.batch
    if not path.task_is_named:
        check_task(look.output, batch.inputs, batch.target)
    plan, scores = _phase_1(settings, subject, path, look.plan, inputs, target, generator_for)
    num_units = _count_scored(settings, layers, look.num_units, scores)
    plan = replace(plan, num_units=num_units, smallest_batch=smallest_batch(subject, path, plan, batch))
    warn_of_equal_scores(model, scores, look.output, path.interpolate_at, look.not_after)
    _warn_of_batch_norms(model)
    _warn_of_baseline(subject, path, plan, batch, scores)
    warn_of_units(layers, look.surroundings)
    warn_of_zero_rates(layers, settings)
    if not is_mixing:  # or else another dimension may be the batch
        warn_of_shared_masks(layers, look.num_units, plan.rows_first, path.batch_dim)
    missed = layers.keys() - num_units.keys() - look.left.keys()
    called: frozenset[str] = frozenset()
    if missed or may_checkpoint(model):
        with seeing_dropout_calls() as more_calls:
            plan, called = in_training(look, plan)
        dropout_calls |= more_calls
    elif any(call.rate is None for call in dropout_calls.values()):  # an attention, which may drop in training mode
        with seeing_dropout_calls() as more_calls:
            in_training(look, plan)
        dropout_calls |= more_calls
    if settings.compile_phase1:
        plan = replace(plan, compiled=_compiled(settings, subject, path, plan, inputs, target, generator_for))
    counts = num_samples_of(path, batch), num_rows_of(path, batch)
    undriven = tuple(str(call) for call in dropout_calls.values() if call.rate)
    return Findings(subject, path, plan, batch.device, look.left, frozenset(missed & called), *counts, undriven)


def _roles_by_comparison(look: Look) -> tuple[tuple[Role, ...], bool]:
    """Pass half of the batch through the model, the last sample first, and compare with what it gave within the batch.

    Phase 1 passes on rows in any order and number. Where samples influence each other, none has a conductance of its
    own. Of several ways to read the arguments, the first one counts in which they don't.

    Returns:
        The roles of the tensors among the arguments, and whether samples were seen to influence each other.

    """
    size, roles = look.batch.size, look.batch.call.roles
    if size < 2:
        return roles, False
    rows = torch.arange(size - 1, (size - 1) // 2, -1)
    within = look.output[rows.to(look.output.device)]
    raised: Exception | None = None
    possible: list[tuple[Role, ...]] = []
    for choice in possible_roles(look.batch):
        try:
            alone = output_of(look.read_as(choice), rows)
        except Exception as error:
            raised = raised or error
            continue
        if not differ(alone, within):
            return choice, False
        possible.append(choice)
    if raised is not None and not possible:
        raise raised
    if not _normalises_by_batch(look.request.model):
        _warn_of_mixing(look, len(rows))
    return possible[0], True


def _warn_of_mixing(look: Look, num_rows: int) -> None:
    batch_dim = look.request.batch_dim
    again = output_of(look, torch.arange(look.batch.size), draws=1)
    if differ(again, look.output):
        return  # by chance, in evaluation too: a comparison says nothing
    other = 1 - batch_dim if batch_dim < 2 else 0
    warnings.warn(
        f"The outputs of {type(look.request.model).__name__} for {num_rows} samples of the first batch change when "
        f"the others are not there: with batch_dim={batch_dim}, samples influence each other, and none has a "
        f"conductance of its own. Where another dimension is the batch, as in models of (T, B, F), pass "
        f"batch_dim={other}. Where it is what the model does, as a normalisation by the batch, scores are those of "
        "rows that mix.",
        UserWarning,
        stacklevel=6,
    )


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
    first_error: Exception | None = None
    while plans:
        plan = plans.pop(0)
        try:
            request = request_from(subject, path, plan, inputs, target, generator_for, learning=True)
            assert request is not None  # no batch is too small by now
            scores: Any = scores_by(settings.measure, request)
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


def _compiled(
    settings: EngineSettings,
    subject: Subject,
    path: PathSettings,
    plan: Plan,
    inputs: Inputs,
    target: Target,
    generator_for: GeneratorFor,
) -> Compiled:
    """Compile phase 1, and compare it with the eager one on other samples."""
    first = request_from(subject, path, plan, inputs, target, generator_for)
    other = request_from(subject, path, plan, inputs, target, lambda purpose: generator_for(f"other {purpose}"))
    assert first is not None  # no batch is too small by now
    assert other is not None
    run = compiled(owner := settings.path.owner, first)
    expected, scores = conductance(other), run(other)
    if scores is None:
        raise refusal(owner, first, f"its {run.changed(other, run.tensors())} is another one in each pass")
    if wrong := [name for name in expected if name not in scores or differ(scores[name], expected[name])]:
        raise refusal(owner, first, f"on other samples the scores of {listed(map(repr, wrong))} would be wrong")
    return run


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


def _warn_of_batch_norms(model: nn.Module) -> None:
    if mixing := _normalises_by_batch(model):
        warnings.warn(
            f"{listed(map(repr, mixing))} {'normalises' if len(mixing) == 1 else 'normalise'} by the batch at hand in "
            "evaluation too, so that in phase 1 the points of all paths mix. "
            "Set track_running_stats=True for scores of each sample by itself.",
            UserWarning,
            stacklevel=5,
        )


def _warn_of_baseline(
    subject: Subject, path: PathSettings, plan: Plan, batch: Batch, scores: Mapping[str, Tensor]
) -> None:
    """Name the baseline where the model has no finite output there, so that no score will ever be finite."""
    if all(bool(values.isfinite().all()) for values in scores.values()):
        return
    request = request_of_one(subject, path, plan, batch.take(torch.tensor([0])))
    with request.borrowed(constant_parameters=True), recording(request.layers, plan.overwritten):
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
