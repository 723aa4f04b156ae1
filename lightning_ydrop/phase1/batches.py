"""Inputs and targets: read from a batch, checked, and paired with their baselines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ydrop.errors import ConfigurationError, describe, is_real
from lightning_ydrop.phase1.objectives import Target

Inputs = Tensor | Sequence[Tensor]
Baseline = float | Tensor | Sequence[float | Tensor]


def read_batch(batch: Any) -> tuple[tuple[Tensor, ...], Target]:
    """Read a batch `(x, y)`, where `x` is a tensor or several.

    Returns:
        The inputs and the target.

    Raises:
        ConfigurationError: If the batch has another form.

    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        inputs = (batch[0],) if isinstance(batch[0], Tensor) else batch[0]
        if isinstance(inputs, (tuple, list)) and inputs and all(isinstance(item, Tensor) for item in inputs):
            return tuple(inputs), batch[1]
    raise ConfigurationError(
        f"The batch is {describe(batch)}.",
        "Y-Drop reads batches of the form (x, y): the input tensor, or a tuple of them, and the target tensor.",
        "Return such pairs from the dataset or from collate_fn.",
    )


def as_inputs(inputs: Inputs) -> tuple[Tensor, ...]:
    """Check that inputs can be walked to from a baseline.

    Returns:
        The inputs as a tuple.

    Raises:
        ConfigurationError: If one is no floating tensor, or they differ in their number of samples.

    """
    listed = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not listed or not all(isinstance(item, Tensor) for item in listed):
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "Inputs are a tensor or a non-empty tuple of tensors, in the order in which forward takes them.",
            "Pass `x`, or `(x1, x2)` for a model that is called as model(x1, x2).",
        )
    for item in listed:
        if not item.is_floating_point():
            raise ConfigurationError(
                f"The inputs hold {describe(item)}.",
                "Phase 1 walks a straight line from the baseline to the inputs, so they are floating tensors: "
                "between integers there is nothing to walk on.",
                "Convert pixels with x.float() / 255; for tokens let the model take their embeddings.",
            )
    if any(item.ndim == 0 for item in listed) or len({len(item) for item in listed}) != 1 or len(listed[0]) == 0:
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "All inputs have the same number of samples, at least one, in their first dimension.",
            "Give every input the batch as its first dimension.",
        )
    return listed


def check_baseline(owner: str, baseline: Baseline) -> None:
    """Refuse what cannot be a baseline for any input.

    Raises:
        ConfigurationError: If it is neither a finite number nor a tensor, nor a tuple of these.

    """
    for item in baseline if isinstance(baseline, Sequence) else (baseline,):
        if not isinstance(item, Tensor) and not is_real(item):
            raise ConfigurationError(
                f"{owner}(baseline={describe(baseline)}) was given.",
                "A baseline is a finite number, a tensor, or a tuple of one of these for each input.",
                "Pass, for example, baseline=0.0.",
            )


def start_points(inputs: tuple[Tensor, ...], baseline: Baseline) -> tuple[Tensor, ...]:
    """Bring baselines to the shape of their inputs, on the inputs' device and in their dtype.

    Args:
        inputs: Tensors (B, *).
        baseline: One for all inputs, or a tuple of one for each: a number, or a tensor of shape (*) or (1, *), shared
            by all samples, or (B, *), one for each sample.

    Returns:
        For each input a start of shape (1, *), or (B, *) for all where one is not shared.

    Raises:
        ConfigurationError: If a baseline does not fit to its input.

    """
    listed = tuple(baseline) if isinstance(baseline, Sequence) else (baseline,) * len(inputs)
    if len(listed) != len(inputs):
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for {len(inputs)} input(s).",
            "A tuple of baselines has one for each input.",
            "Pass as many baselines as inputs, or a single number for all of them.",
        )
    starts = [_start(item, start) for item, start in zip(inputs, listed, strict=True)]
    rows = max(len(start) for start in starts)
    return tuple(start.expand(rows, *start.shape[1:]) for start in starts)


def take_rows(values: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    """Take the same samples of every tensor."""
    return tuple(value.index_select(0, rows) for value in values)


def _start(inputs: Tensor, baseline: float | Tensor) -> Tensor:
    if not isinstance(baseline, Tensor):
        return inputs.new_full((1, *inputs.shape[1:]), baseline)
    start = baseline.unsqueeze(0) if baseline.ndim == inputs.ndim - 1 else baseline
    if start.shape[1:] != inputs.shape[1:] or start.shape[:1] not in (torch.Size([1]), inputs.shape[:1]):
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for the input {describe(inputs)}.",
            "A baseline is a number, or a tensor of the shape of one sample or of the whole input.",
            f"Pass a tensor of shape {tuple(inputs.shape[1:])} or {tuple(inputs.shape)}, or 0.0.",
        )
    return start.detach().to(inputs)
