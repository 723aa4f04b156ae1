"""What a dry run has found out, and what it says of it."""

import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_ydrop.errors import ConfigurationError, NoEffectWarning
from lightning_ydrop.importance.path import PathSettings
from lightning_ydrop.importance.settings import EngineSettings
from lightning_ydrop.importance.subject import Plan, Subject, subject_of
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.modules import device_of
from lightning_ydrop.models.observations import Observations


@dataclass(frozen=True)
class Findings:
    """What a dry run has found out for all batches.

    Attributes:
        subject: The model, with everything on the training device.
        path: The settings, with the baseline on the training device.
        plan: How to measure each batch.
        device: The training device.
        left: Why layers are not driven that forward calls, by name.
        in_training_alone: Layers that forward calls in training mode and not in evaluation mode.
        num_samples: How many samples of the first batch phase 1 measures.
        num_rows: How many rows it passes through the model for them.
        functional: Calls of functional dropout that forward makes, each with its rate, file and line.

    """

    subject: Subject
    path: PathSettings
    plan: Plan
    device: torch.device
    left: Mapping[str, str] = field(default_factory=dict)
    in_training_alone: frozenset[str] = frozenset()
    num_samples: int = 0
    num_rows: int = 0
    functional: tuple[str, ...] = ()


def without_samples(
    model: nn.Module, forward: Callable[..., Any], layers: Mapping[str, ConductanceDropout], path: PathSettings
) -> Findings:
    """Give what is known where this rank has no samples and others have."""
    unit_dims = {name: layer.unit_dim for name, layer in layers.items()}
    return Findings(
        subject_of(model, forward, layers, unit_dims, path.objective, Observations()), path, Plan(), device_of(model)
    )


def warn_of_layers_left(findings: Findings, layers: Iterable[str], num_units: Mapping[str, int]) -> None:
    """Say once which layers stay vanilla dropout, and why."""
    missed = [name for name in layers if name not in num_units and name not in findings.left]
    if in_training := [name for name in missed if name in findings.in_training_alone]:
        warnings.warn(
            f"Y-Drop has no score for {', '.join(map(repr, in_training))}: {_in_training_alone(len(in_training))}",
            NoEffectWarning,
            stacklevel=4,
        )
    if not_called := [name for name in missed if name not in findings.in_training_alone]:
        them = "it" if len(not_called) == 1 else "them"
        warnings.warn(
            f"Y-Drop has no score for {', '.join(map(repr, not_called))}: the model's forward did not call {them}. "
            f"Only layers that forward calls are driven; {'this stays' if them == 'it' else 'these stay'} ordinary "
            f"dropout. Call {them} in forward, or use nn.Dropout.",
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


def warn_of_zero_rates(layers: Mapping[str, ConductanceDropout], settings: EngineSettings) -> None:
    """Warn where no layer drops anything, since the rates follow a p of 0."""
    if all(settings.buckets_of(layer.p).high.max == 0 for layer in layers.values()):
        warnings.warn(
            f"Y-Drop drops nothing: {', '.join(map(repr, layers))} have p=0, which their rates follow. "
            "Raise p, or pass buckets=Buckets() for the paper's rates whatever p is.",
            NoEffectWarning,
            stacklevel=5,
        )


def warn_of_shared_masks(
    layers: Mapping[str, ConductanceDropout], called: Iterable[str], rows_first: Container[str], batch_dim: int
) -> None:
    """Warn of layers that draw one mask for all samples, since their `batch_dim` is another than the model's.

    Args:
        layers: The layers, by name.
        called: Names of those that forward calls.
        rows_first: Names of those whose outputs have the samples first.
        batch_dim: Where the others have them, unless they say so themselves.

    """
    for name in called:
        layer = layers[name]
        dim = 0 if name in rows_first else layer.batch_dim or batch_dim
        own = layer.elementwise or layer.shared_masks or layer.replaced
        if dim != layer.batch_dim and not own:
            warnings.warn(
                f"The layer {name!r} (batch_dim={layer.batch_dim}) would draw one mask for all samples, which are "
                f"dimension {dim} of what it puts out. "
                f"Pass ConductanceDropout(batch_dim={dim}), for a mask of each sample's own.",
                UserWarning,
                stacklevel=5,
            )


def _in_training_alone(count: int) -> str:
    them, they_return, these_stay = (
        ("it", "it returns its", "This layer stays")
        if count == 1
        else ("them", "they return their", "These layers stay")
    )
    return (
        f"the model's forward calls {them} in training mode alone, and phase 1 runs in evaluation mode. "
        f"{these_stay} ordinary dropout. "
        f"Call {them} in evaluation mode too, where {they_return} input: without `if self.training`."
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
