"""What may be wrong with the way in which a first batch was read, where nobody has said how to read it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.adapters import TARGET_NAMES, Adapter, AutomaticAdapter, fields_of
from lightning_ydrop.models.batches import own_method


def check_labels_are_read(
    model: nn.Module, adapter: Adapter, batch: Any, inputs: Any, target: Any, batch_dim: int = 0
) -> None:
    """Refuse a batch with a known input and labels of an unknown name. Call it where the objective takes labels.

    Args:
        model: The model, which may read batches itself.
        adapter: It reads them otherwise.
        batch: A mapping, dataclass or named tuple, or any other batch, which is let through.
        inputs: What was read as the inputs.
        target: What was read as the target.
        batch_dim: The dimension of the samples.

    Raises:
        ConfigurationError: If there is no target, and another entry has a row for each sample.

    """
    named = fields_of(batch) if _is_read_automatically(model, adapter) else None
    if named is None or named.keys() & TARGET_NAMES or not isinstance(inputs, Tensor) or inputs.ndim <= batch_dim:
        return
    num_samples = inputs.shape[batch_dim]
    others = [
        name
        for name, value in named.items()
        if isinstance(value, Tensor)
        and value is not inputs
        and any(value.ndim > dim and value.shape[dim] == num_samples for dim in {0, batch_dim})
    ]
    if target is not None or not others:
        return
    (name,) = (name for name, value in named.items() if value is inputs)
    guess = next((other for other in others if not named[other].is_floating_point()), others[0])
    raise ConfigurationError(
        f"The batch is {describe(batch)}, in which Y-Drop knows the input {name!r} and no target.",
        f"A target is called {', '.join(TARGET_NAMES)}. Without one, phase 1 would measure the sum of all outputs.",
        f'Name the labels, for example adapter=KeyAdapter(inputs="{name}", target="{guess}"). Where there are none, '
        "pass objective=OutputSum().",
    )


@contextmanager
def naming_other_labels(model: nn.Module, adapter: Adapter, batch: Any, target: Any) -> Iterator[None]:
    """Add to what is refused of a target, the second item of a tuple, that a later item may be the labels.

    Args:
        model: The model, which may read batches itself.
        adapter: It reads them otherwise.
        batch: Any batch.
        target: What was read as the target.

    """
    try:
        yield
    except ConfigurationError as error:
        places = [
            place
            for place, item in enumerate(batch[2:] if _second_is(batch, target) else (), 2)
            if isinstance(item, Tensor) and item.shape[:1] == target.shape[:1]
        ]
        if not places or "target" not in error.args[0] or not _is_read_automatically(model, adapter):
            raise
        given, allowed, remedy = error.args
        raise ConfigurationError(
            f"{given} The batch is {describe(batch)}.",
            f"{allowed} Of a tuple, Y-Drop takes the second item for the target.",
            f"If item {places[-1]} of the batch holds the labels, pass adapter=IndexAdapter(inputs=0, "
            f"target={places[-1]}). {remedy}",
        ) from error


def check_other_labels(
    model: nn.Module, adapter: Adapter, batch: Any, target: Any, may_be_labels: Callable[[Tensor], bool]
) -> None:
    """Warn where a later item of a tuple could be the target as well as the second one, which is taken.

    Args:
        model: The model, which may read batches itself.
        adapter: It reads them otherwise.
        batch: Any batch.
        target: What was read as the target.
        may_be_labels: Tells whether integers in the shape of the target name classes of the output.

    Raises:
        ConfigurationError: If the second item holds 0 and 1 alone, as a mask does, and the later one more.

    """
    if not (_is_read_automatically(model, adapter) and _second_is(batch, target)):
        return
    for place, item in enumerate(batch[2:], 2):
        if _are_labels_alike(item, target) and may_be_labels(item):
            if _holds_bits(target) and not _holds_bits(item):
                raise ConfigurationError(
                    f"The batch is {describe(batch)}, and Y-Drop takes the second item for the target.",
                    f"That holds 0 and 1 alone, as a mask does. Item {place} names more classes of the output.",
                    f"Pass adapter=IndexAdapter(inputs=0, target={place}) if that is the target, otherwise "
                    "target=1. Where forward takes the mask too, pass inputs=[0, 1].",
                )
            warnings.warn(
                f"The batch is {describe(batch)}: Y-Drop takes item 1, the second, for the labels, and item {place} "
                "could be the labels too. "
                f"Say which: adapter=IndexAdapter(inputs=0, target=1), or target={place}.",
                UserWarning,
                stacklevel=4,
            )
            return


def _second_is(batch: Any, target: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) > 1 and isinstance(target, Tensor) and batch[1] is target


def _holds_bits(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _are_labels_alike(one: Any, other: Tensor) -> bool:
    """Tell whether two values are integers of one shape, whatever their dtype."""
    return (
        isinstance(one, Tensor)
        and one.shape == other.shape
        and not any(each.is_floating_point() or each.is_complex() or each.dtype == torch.bool for each in (one, other))
    )


def _is_read_automatically(model: nn.Module, adapter: Adapter) -> bool:
    return isinstance(adapter, AutomaticAdapter) and own_method(model, "ydrop_inputs") is None
