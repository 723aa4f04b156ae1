"""The forward passes that a dry run makes to learn something of a model, one for each question."""

import random
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.functional.path import path_points
from lightning_ydrop.importance.arrangement import Batch, Role
from lightning_ydrop.importance.interpolation import noting_what_ran
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.readings import possible_roles
from lightning_ydrop.importance.recording import recording
from lightning_ydrop.importance.request import Request, bare_request, completed
from lightning_ydrop.importance.selection import count_units
from lightning_ydrop.importance.subject import Plan, Subject, needs_graph
from lightning_ydrop.importance.surroundings import Surroundings
from lightning_ydrop.importance.targets import check_target
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.calls import read_output
from lightning_ydrop.models.checkpointing import (
    SavedMemory,
    affordable_rows,
    bytes_of,
    may_checkpoint,
    seeing_checkpoints,
)
from lightning_ydrop.models.relus import seeing_relus


@dataclass(frozen=True)
class Look:
    """What a forward pass of the whole batch in evaluation mode has shown.

    Attributes:
        request: What was measured.
        batch: The batch.
        plan: What has been decided so far.
        output: The model's output, with the batch first.
        num_units: Of each layer that ran, by name.
        left: Why layers are not driven, by name.
        surroundings: Which modules ran before each layer.
        recorded: The bytes of what the layers put out.
        checkpointed: Modules that ran in activation checkpoints.
        records: Whether passes record a graph.
        not_after: Layers, by name, that had run when the module whose outputs the paths run through had.

    """

    request: Request
    batch: Batch
    plan: Plan
    output: Tensor
    num_units: dict[str, int]
    left: dict[str, str]
    surroundings: Surroundings
    recorded: int
    checkpointed: list[nn.Module]
    records: bool
    not_after: frozenset[str] = frozenset()

    def read_as(self, roles: tuple[Role, ...]) -> "Look":
        """Read the same arguments in another way."""
        batch, plan = self.batch.read_as(roles), replace(self.plan, roles=roles)
        return replace(self, batch=batch, request=replace(self.request, forward=batch.call), plan=plan)


def look_at(subject: Subject, path: PathSettings, batch: Batch) -> Look:
    """Pass the whole batch through the model once, as training does, and check what comes out of it and its layers."""
    plan = Plan(roles=batch.call.roles)
    # Where training saves memory by checkpoints, a graph of the whole batch without them may be too large.
    records = not may_checkpoint(subject.model)
    try:
        plan = replace(plan, rows_first=rows_first(subject, path, batch, records))
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
    plan = replace(plan, rows_first=rows_first(subject, path, batch))
    with suppress(RuntimeError):
        return _look_with(subject, path, batch, plan, True)
    return _look_with(subject, path, batch, replace(plan, constant_parameters=False), True)


def rows_first(subject: Subject, path: PathSettings, batch: Batch, records: bool = True) -> frozenset[str]:
    """Name the layers that put out rows first, though `batch_dim` says another dimension, and by "" the output if so.

    Where a dimension has as many entries as there are rows, that may be a coincidence. One row more tells.

    Args:
        subject: The model.
        path: The settings.
        batch: The samples.
        records: Whether a graph is recorded, which some forwards need.

    """
    request = bare_request(subject, batch, path, torch.Generator(), learning=True)
    dims = {name: request.dim_of_rows(name) for name in ("", *subject.layers)}
    if not any(dims.values()):
        return frozenset()
    first: set[str] = set()
    for count in (max(2, batch.size), max(2, batch.size) + 1):
        outputs = _outputs_of(request, batch, torch.arange(count).remainder(batch.size), records)
        is_clear = True
        for name, tensors in outputs.items():
            at_dim, at_first = (
                [each.ndim > dim and each.shape[dim] == count for each in tensors] for dim in (dims[name], 0)
            )
            if dims[name] and all(at_first) and not any(at_dim):
                first.add(name)
            is_clear = is_clear and not (dims[name] and any(at_first) and any(at_dim))
        if is_clear:
            break
    return frozenset(first)


def _outputs_of(request: Request, batch: Batch, rows: Tensor, records: bool) -> dict[str, list[Tensor]]:
    """Give what layers put out for some rows, and by "" the model, in the first reading of the arguments that works."""
    first_error: Exception | None = None
    for roles in possible_roles(batch):
        taken = batch.read_as(roles).take(rows)
        try:
            with request.borrowed(), recording(request.layers) as tape, torch.set_grad_enabled(records):
                return {"": [read_output(taken.call(taken.inputs, taken.carried))], **tape}
        except Exception as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _look_with(subject: Subject, path: PathSettings, batch: Batch, plan: Plan, records: bool) -> Look:
    # Copies of the rows, since a forward may write to its inputs.
    rows = batch.take(torch.arange(batch.size))
    request = bare_request(subject, rows, path, torch.Generator(), plan=plan, learning=True)
    surroundings = Surroundings(subject.model.modules(), subject.layers)
    with (
        request.borrowed(constant_parameters=True),
        surroundings.watched(),
        seeing_checkpoints(subject.model) as checkpointed,
        recording(subject.layers, frozenset()) as tape,
        seeing_relus(subject.model, tape) as relus,
        noting_what_ran(subject.model, path.interpolate_at, tape) as not_after,
        torch.set_grad_enabled(records),
    ):
        output = request.output(request.inputs, request.carried)
        with torch.no_grad():
            check_target(request.objective, output, batch.target, request.dim_of_rows(""))
            counts = request.objective.count_unusable(output, batch.target) is not None
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
        num_units[name] = count_units(
            name, layer, calls, layer.unit_dim, rows=rows_in, batch_dim=request.dim_of_rows(name)
        )
        layer.prepare(num_units[name], calls[0].device)
    output = output.detach()
    plan = replace(plan, overwritten=frozenset(tape.overwritten), output=torch.empty_like(output, device="meta"))
    plan = replace(plan, counts_unusable=counts, relus=tuple(relus))
    return Look(
        *(request, batch, plan, output, num_units, left, surroundings, recorded, list(checkpointed), records),
        not_after=frozenset(not_after),
    )


def output_of(look: Look, rows: Tensor, draws: int = 0) -> Tensor:
    """Pass some samples through the model, after a number of draws from the random streams."""
    batch, request = look.batch.take(rows), look.request
    with (
        request.borrowed(constant_parameters=True),
        recording(request.layers, frozenset()),  # a forward may take gradients with respect to what phase 1 records
        torch.set_grad_enabled(look.records),
    ):
        for _ in range(draws):
            random.random()
            for device in {torch.device("cpu"), request.device}:
                torch.rand((), device=device)
        return request.output(batch.inputs, batch.carried).detach()


def smallest_batch(subject: Subject, path: PathSettings, plan: Plan, batch: Batch) -> int:
    """Try phase 1 on a single sample, as a last batch may have no more, and say how small a batch may be."""
    if batch.size == 1:
        return 1
    one = batch.take(torch.tensor([batch.size - 1]))
    try:
        request = request_of_one(subject, path, plan, one)
        with request.borrowed(constant_parameters=True), recording(request.layers, plan.overwritten):
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


def request_of_one(subject: Subject, path: PathSettings, plan: Plan, one: Batch) -> Request:
    """Make a request of a batch with a single sample."""
    max_rows = path.n_steps + 1
    request = bare_request(subject, one, path, torch.Generator(), plan=plan, max_rows=max_rows, learning=True)
    return completed(request, one, path)


def in_training(look: Look, plan: Plan) -> tuple[Plan, frozenset[str]]:
    """Pass the whole batch through the model in training mode, and undo that, to see what it does there alone.

    A forward that takes more in training mode, such as targets, shows nothing.

    Returns:
        The plan, with the checkpoints that training sets, and the layers that run.

    """
    look = replace(look, request=replace(look.request, plan=plan))
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
    plain = _saved_in_evaluation(look)
    plan, kept = replace(plan, checkpointed=more), saved.size
    if checkpointed.has_parts:  # each keeps its inputs, where training keeps those of the whole alone
        kept = _saved_in_evaluation(replace(look, request=replace(request, plan=plan)))
    memory = affordable_rows(saved.size, plain, kept, look.recorded, len(more), len(look.checkpointed))
    return replace(plan, memory=memory), frozenset(tape)


def _saved_in_evaluation(look: Look) -> int:
    """Count what a pass of the whole batch in evaluation mode would keep, by one of a few rows."""
    request, saved = look.request, SavedMemory(look.request.model)
    few = min(2, look.batch.size)
    rows = look.batch.take(torch.arange(few))
    with request.borrowed(constant_parameters=True), recording(request.layers), saved.counted():
        request.output(rows.inputs, rows.carried)
    return saved.size * look.batch.size // few
