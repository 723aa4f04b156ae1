"""Where the paths start."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ydrop.checks import is_real
from lightning_ydrop.errors import ConfigurationError, describe

Baseline = float | Tensor | None | Sequence[float | Tensor | None]
Tensors = tuple[Tensor, ...]


def check_baseline(owner: str, baseline: Any) -> Baseline:
    """Refuse what cannot be a baseline for any input.

    Returns:
        A tensor, a number of Python's, or a list or tuple of these and None.

    Raises:
        ConfigurationError: If it is neither a finite number nor a finite tensor, nor a sequence of these and None.

    """
    listed = isinstance(baseline, Sequence) and not isinstance(baseline, str)
    items = list(baseline) if listed else [baseline]
    for item in items or ["empty"]:
        fits = bool(item.isfinite().all()) if isinstance(item, Tensor) else is_real(item) or (listed and item is None)
        if not fits:
            raise ConfigurationError(
                f"{owner}(baseline={describe(baseline)}) was given.",
                "A baseline is a finite number or tensor, or a list of one of these for each floating input, with None "
                "for an input that stays as it is.",
                "Pass, for example, baseline=0.0.",
            )
    plain = tuple(item if item is None or isinstance(item, Tensor) else float(item) for item in items)
    if not listed:
        return plain[0]
    return plain if isinstance(baseline, tuple) else list(plain)


def baseline_on(device: torch.device, baseline: Baseline) -> Baseline:
    """Move the tensors of a baseline to a device once, so that no step has to."""
    if isinstance(baseline, Tensor):
        return baseline.detach().to(device)
    if isinstance(baseline, Sequence):
        return [item.detach().to(device) if isinstance(item, Tensor) else item for item in baseline]
    return baseline


def start_points(interpolated: Tensors, baseline: Baseline, batch_dim: int = 0) -> Tensors:
    """Give baselines the shape, device and dtype of the tensors that paths end at.

    Args:
        interpolated: Tensors (B, *).
        baseline: One for all, or a sequence of one for each: a number, or a tensor of shape (*) or (1, *), shared
            by all samples, or (B, *), one for each sample. None stands for what no path runs through.
        batch_dim: The dimension of the samples in the baseline, where it has one.

    Returns:
        For each a start of shape (1, *), or (B, *) for all where one is not shared.

    Raises:
        ConfigurationError: If a baseline does not fit.

    """
    if isinstance(baseline, Sequence):
        listed = [item for item in baseline if item is not None]
    else:
        listed = [baseline] * len(interpolated)  # type: ignore[list-item]
    if len(listed) != len(interpolated) or not interpolated:
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for paths to {len(interpolated)} tensor(s).",
            "A list of baselines has one for each tensor that paths end at, not all of them None.",
            "Pass as many baselines as inputs, or a single number for all of them.",
        )
    starts = [_start(item, start, batch_dim) for item, start in zip(interpolated, listed, strict=True)]
    rows = max(len(start) for start in starts)
    return tuple(start if len(start) == rows else start.expand(rows, *start.shape[1:]) for start in starts)


def _start(interpolated: Tensor, baseline: Any, batch_dim: int) -> Tensor:
    if not isinstance(baseline, Tensor):
        return interpolated.new_full((1, *interpolated.shape[1:]), baseline)
    if baseline.ndim == interpolated.ndim - 1:
        start = baseline.unsqueeze(0)
    else:
        start = baseline.movedim(batch_dim, 0) if baseline.ndim > batch_dim else baseline
    if start.shape[1:] != interpolated.shape[1:] or start.shape[:1] not in (torch.Size([1]), interpolated.shape[:1]):
        raise ConfigurationError(
            f"baseline={describe(baseline)} was given for the input {describe(interpolated)}.",
            "A baseline is a number, or a tensor of the shape of one sample or of the whole input.",
            f"Pass a tensor of shape {tuple(interpolated.shape[1:])} or {tuple(interpolated.shape)}, or 0.0.",
        )
    return start.detach().to(interpolated)
