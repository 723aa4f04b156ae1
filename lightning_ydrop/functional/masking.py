"""Dropout as functions: one rate for all units, a probability for each unit, and Jumpout."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ydrop.checks import check_choice, check_rate, is_real
from lightning_ydrop.errors import ConfigurationError, describe

# Everything here but `jumpout` is written in what TorchScript compiles, so that models with our layers can be scripted.
Granularity = Literal["element", "channel"]
# The highest rate of active units. If all of them were dropped, none would be left to rescale.
MAX_JUMPOUT_RATE = 0.95


def vanilla_dropout(x: Tensor, p: float, unit_dim: int = 1, elementwise: bool = False, batch_dim: int = 0) -> Tensor:
    """Drop all units at one rate, exactly as torch does (Eq. 3, arXiv 2409.09088).

    The same seed gives the same result as `F.dropout`, where a mask is drawn for each element, or as `F.dropout1d`,
    `2d` and `3d`, where it is drawn for each sample and unit.

    Args:
        x: Activations, (B, *) or with the samples in `batch_dim`.
        p: Drop probability, in [0, 1). 0 drops nothing.
        unit_dim: Dimension of the units.
        elementwise: Draw for each element. Otherwise draw for each sample and unit. On two dimensions both are the
            same.
        batch_dim: Dimension of the samples.

    Returns:
        `x * m / (1 - p)` with `m ~ Bernoulli(1 - p)`, with the shape, dtype and device of `x`.

    """
    if elementwise or x.ndim <= 2:
        return F.dropout(x, p)
    # feature_dropout draws once for each entry of dimensions 0 and 1. nn.Dropout1d, 2d and 3d call it too.
    if batch_dim == 0:
        return torch.feature_dropout(x.movedim(unit_dim, 1), p, train=True).movedim(1, unit_dim)
    here, there = [batch_dim, unit_dim], [0, 1]
    return torch.feature_dropout(x.movedim(here, there), p, train=True).movedim(there, here)


def channel_dropout(x: Tensor, p: float, num_spatial_dims: int) -> Tensor:
    """Call torch's own dropout of channels, which also takes inputs without a batch dimension.

    Args:
        x: Activations (B, C, *).
        p: Drop probability, in [0, 1).
        num_spatial_dims: 1 for `F.dropout1d`, 2 for `F.dropout2d` and 3 for `F.dropout3d`.

    Returns:
        Shape, dtype and device of `x`.

    """
    if num_spatial_dims == 1:
        return F.dropout1d(x, p)
    if num_spatial_dims == 2:
        return F.dropout2d(x, p)
    return F.dropout3d(x, p)


def is_unbatched(num_dims: int, num_spatial_dims: int) -> bool:
    """Tell whether torch's dropout of channels takes an input for a single sample without a batch dimension.

    It then drops entries of dimension 0. `F.dropout2d` never does: it takes three dimensions for (B, C, L).

    Args:
        num_dims: Number of dimensions of the input.
        num_spatial_dims: As in `channel_dropout`.

    """
    return num_spatial_dims != 2 and num_dims != num_spatial_dims + 2


def unit_dropout(
    x: Tensor,
    drop_prob: Tensor,
    mean_drop_prob: Tensor,
    unit_dim: int = 1,
    elementwise: bool = False,
    batch_dim: int = 0,
) -> Tensor:
    """Drop each unit with its own probability and rescale with its running mean (sec. 4.1, arXiv 2409.09088).

    Args:
        x: Activations with U units in `unit_dim`: (B, *), or with the samples in `batch_dim`.
        drop_prob: Probability that a unit is dropped, float32, shape (U,).
        mean_drop_prob: Running mean that rescales the units that are kept, float32, shape (U,).
        unit_dim: Dimension of the units.
        elementwise: Draw for each element. Otherwise draw for each sample and unit. On two dimensions both are the
            same.
        batch_dim: Dimension of the samples.

    Returns:
        `x * m / (1 - mean_drop_prob)` with `m ~ Bernoulli(1 - drop_prob)`, with the shape, dtype and device of `x`.

    """
    unit_dim, batch_dim = unit_dim % x.ndim, batch_dim % x.ndim
    elementwise = elementwise or x.ndim <= 2
    per_unit = [-1 if dim == unit_dim else 1 for dim in range(x.ndim)]
    drawn_dims = [batch_dim, unit_dim]
    drawn = x.shape if elementwise else [size if dim in drawn_dims else 1 for dim, size in enumerate(x.shape)]
    # Draw in float32, whatever the dtype of `x` and the default dtype are. Uniform numbers in half precision are as
    # coarse as the rates.
    keep = torch.rand(drawn, dtype=torch.float32, device=x.device) >= drop_prob.view(per_unit)
    scale = (1 - mean_drop_prob).reciprocal().view(per_unit).to(x.dtype)
    # The backward pass keeps a mask of the size of `x` as bytes. A smaller mask is multiplied with the scale first, so
    # that `x` is read once.
    return x * keep * scale if elementwise else x * (keep * scale)


def jumpout(
    x: Tensor,
    p_min: float = 0.0,
    sigma: float = 0.1,
    p_max: float = 0.5,
    granularity: Granularity = "element",
    scale_exponent: float = 0.75,
) -> Tensor:
    """Drop active units at a random rate, which is higher when fewer units are active (Jumpout, ICML 2019).

    Each call draws the share of all units to drop, `p = min(p_min + |N(0, sigma)|, p_max)`. Dropping a zero changes
    nothing, so active units are dropped at the rate `p / q`, where `q` is the share of elements above 0 in `x`. Under
    DDP this is the share in the local batch. The rate is at most 0.95, also when nothing is active.

    Args:
        x: Activations after a ReLU, (B, *), with channels in dimension 1.
        p_min: Smallest and likeliest share, in [0, 1).
        sigma: Standard deviation of the normal distribution, at least 0.
        p_max: Largest share, in [0, 1), at least `p_min`.
        granularity: Draw for each "element", or for each sample and "channel".
        scale_exponent: Exponent `e` of the rescaling: 1 keeps the mean, 0.5 the second moment. 0.75 is in between.

    Returns:
        `x * m * (1 - p / q)**-e` with `m ~ Bernoulli(1 - p / q)`, with the shape, dtype and device of `x`.

    Raises:
        ConfigurationError: If a value is out of range.

    """
    check_jumpout("jumpout", p_min, sigma, p_max, granularity, scale_exponent)
    return active_dropout(x, p_min, sigma, p_max, granularity == "element", scale_exponent)


def active_dropout(
    x: Tensor,
    p_min: float,
    sigma: float,
    p_max: float,
    elementwise: bool,
    scale_exponent: float,
    max_rate: float = MAX_JUMPOUT_RATE,
    shared_masks: bool = False,
) -> Tensor:
    """Do what `jumpout` does, without checking the settings.

    `max_rate` caps the rate of active units. With `shared_masks` all samples have one mask.
    """
    drawn = (p_min + sigma * torch.randn([], dtype=torch.float32, device=x.device).abs()).clamp(max=p_max)
    # Count at least one active element, to avoid 0 / 0.
    active = torch.count_nonzero(x > 0).clamp(min=1)
    rate = (drawn * x.numel() / active).clamp(max=max_rate)
    elementwise = elementwise or x.ndim <= 2
    size = x.shape if elementwise else [length if dim < 2 else 1 for dim, length in enumerate(x.shape)]
    if shared_masks:
        size = [1 if dim == 0 else length for dim, length in enumerate(size)]
    keep = torch.rand(size, dtype=torch.float32, device=x.device) >= rate
    scale = ((1 - rate) ** -scale_exponent).to(x.dtype)
    return x * keep * scale if elementwise else x * (keep * scale)


def check_jumpout(
    owner: str, p_min: float, sigma: float, p_max: float, granularity: Granularity, scale_exponent: float
) -> None:
    """Refuse settings that Jumpout does not allow.

    Raises:
        ConfigurationError: If a value is out of range.

    """
    check_rate(owner, "p_min", p_min)
    check_rate(owner, "p_max", p_max)
    for name, value, example in (("sigma", sigma, 0.1), ("scale_exponent", scale_exponent, 0.75)):
        if not (is_real(value) and value >= 0.0):
            raise ConfigurationError(
                f"{owner}({name}={describe(value)}) was given.",
                f"`{name}` is a finite number of at least 0.",
                f"Pass, for example, {name}={example}.",
            )
    if p_max < p_min:
        raise ConfigurationError(
            f"{owner}(p_min={p_min}, p_max={p_max}) was given.",
            "`p_max` is the largest share, so it is at least `p_min`.",
            f"Pass a `p_max` of at least {p_min}, or a lower `p_min`.",
        )
    check_choice(owner, "granularity", granularity, ("element", "channel"))
