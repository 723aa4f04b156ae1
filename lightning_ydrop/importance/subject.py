"""What is measured: a model with its layers, and what a dry run has decided about it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.importance.arrangement import Role
from lightning_ydrop.importance.objectives import Objective
from lightning_ydrop.models.calls import signature_of
from lightning_ydrop.models.holdings import modules_held
from lightning_ydrop.models.observations import Observations


@dataclass(frozen=True)
class Subject:
    """A model whose units are scored.

    Attributes:
        model: The model.
        forward: What is called, the model or a function that calls it.
        signature: How `forward` is called. To find it takes longer than a small network's forward pass.
        layers: The layers to score, by name.
        unit_dims: For each of them the dimension of the units in its output.
        objective: F, with all that it holds on the training device.
        guarded: The model, and whatever else a call runs or may change.
        observations: What passes were seen to change; None guards everything.

    """

    model: nn.Module
    forward: Callable[..., Any]
    signature: inspect.Signature
    layers: Mapping[str, nn.Module]
    unit_dims: Mapping[str, int]
    objective: Objective
    guarded: tuple[object, ...]
    observations: Observations | None = None


def subject_of(
    model: nn.Module,
    forward: Callable[..., Any],
    layers: Mapping[str, nn.Module],
    unit_dims: Mapping[str, int],
    objective: Objective,
    observations: Observations | None = None,
) -> Subject:
    """Collect what can be known of a model before it is called."""
    beside: list[object] = [] if forward is model else [forward, *modules_held(forward)]
    guarded = (model, *(each for each in beside if each is not model), *objective.modules())
    signature = signature_of(model, forward)
    return Subject(model, forward, signature, layers, unit_dims, objective, guarded, observations)


@dataclass(frozen=True)
class Plan:
    """What the dry run has decided for all batches. The default is that of a single measurement.

    Attributes:
        roles: Of the tensors among the arguments.
        num_units: Of each layer that is scored, by name.
        overwritten: Layers, by name, whose outputs in-place operations write over.
        constant_parameters: Whether no gradient is recorded for parameters. Some forwards need one.
        checkpointed: Modules to be run in activation checkpoints, which the model sets in training mode alone.
        relus: Those that take what a layer put out, and nothing else.
        memory: Rows that may pass at once, as a fraction of those of the batch: less than 1 where training saves
            memory in a way that phase 1 can't, such as activation checkpointing in training mode alone.
        smallest_batch: Batches with fewer samples are passed over.
        rows_first: Layers, by name, whose outputs have their rows first although `batch_dim` is another dimension, such
            as a layer of last states in a model of (T, B, F); the empty name stands for the model's output.
        output: The output of a whole batch without its values, on the meta device.
        counts_unusable: Whether the objective counts entries of the target that name nothing in the output.
        compiled: Phase 1 compiled, where asked for: gives the conductance of requests like the first, None of others.

    """

    roles: tuple[Role, ...] | None = None
    num_units: Mapping[str, int] = field(default_factory=dict)
    overwritten: frozenset[str] = frozenset()
    constant_parameters: bool = True
    checkpointed: tuple[nn.Module, ...] = ()
    relus: tuple[nn.Module, ...] = ()
    memory: float = 1.0
    smallest_batch: int = 1
    rows_first: frozenset[str] = frozenset()
    output: Tensor = torch.empty(0, device="meta")  # noqa: RUF009, which nobody can change
    counts_unusable: bool = False
    compiled: Callable[[Any], dict[str, Tensor] | None] | None = None


def needs_graph(error: Exception) -> bool:
    """Tell whether a forward failed because it takes a gradient, such as of its parameters, and none was recorded."""
    return (
        isinstance(error, (RuntimeError, AssertionError))
        and "grad" in str(error).lower()
        and not isinstance(error, torch.OutOfMemoryError)
    )
