"""Dropping units: the vanilla way of one rate for all, with a probability for each unit, and Jumpout's."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_ydrop.checks import check_choice, check_rate, is_real
from lightning_ydrop.errors import ConfigurationError, describe

Granularity = Literal["element", "channel"]
# The rate of active units goes no further, however few they are: where all were dropped, none could be rescaled.
MAX_JUMPOUT_RATE = 0.95


def vanilla_dropout(x: Tensor, p: float, unit_dim: int = 1, elementwise: bool = False) -> Tensor:
    """Torch's own dropout of the wanted granularity, random stream included.

    Args:
        x: Activations (B, *).
        p: Drop probability, in [0, 1).
        unit_dim: Dimension of the units.
        elementwise: Draw for each element instead of each sample and unit.

    Returns:
        Shape, dtype and device of `x`: `x * m / (1 - p)` with `m ~ Bernoulli(1 - p)` (Eq. 3, arXiv 2409.09088).

    """
    if elementwise or x.ndim <= 2:
        return F.dropout(x, p)
    # What nn.Dropout1d, 2d and 3d call after checking the number of dimensions: one draw for each entry of dims 0, 1.
    return torch.feature_dropout(x.movedim(unit_dim, 1), p, train=True).movedim(1, unit_dim)


def unit_dropout(
    x: Tensor, drop_prob: Tensor, mean_drop_prob: Tensor, unit_dim: int = 1, elementwise: bool = False
) -> Tensor:
    """Drop each unit with its own probability and rescale with its running mean (sec. 4.1, arXiv 2409.09088).

    Args:
        x: Activations (B, *) with U units along `unit_dim`.
        drop_prob: Shape (U,), float32: the probability that `m` is 0.
        mean_drop_prob: Shape (U,), float32: the running mean that rescales what is kept.
        unit_dim: Dimension of the units.
        elementwise: Draw for each element instead of each sample and unit.

    Returns:
        Shape, dtype and device of `x`: `x * m / (1 - mean_drop_prob)` with `m ~ Bernoulli(1 - drop_prob)`.

    """
    unit_dim = unit_dim % x.ndim
    elementwise = elementwise or x.ndim <= 2
    per_unit = [-1 if dim == unit_dim else 1 for dim in range(x.ndim)]
    drawn = x.shape if elementwise else [size if dim in (0, unit_dim) else 1 for dim, size in enumerate(x.shape)]
    # Drawn in float32 whatever `x` and the default are: in half precision uniform numbers fall on a grid as coarse as
    # the rates.
    keep = torch.rand(drawn, dtype=torch.float32, device=x.device) >= drop_prob.view(per_unit)
    scale = (1 - mean_drop_prob).reciprocal().view(per_unit).to(x.dtype)
    # For the backward pass a mask of x's size is kept in bytes; a smaller one joins the scale, and x is read once.
    return x * keep * scale if elementwise else x * (keep * scale)


def jumpout(
    x: Tensor,
    p_min: float = 0.0,
    sigma: float = 0.1,
    p_max: float = 0.5,
    granularity: Granularity = "element",
    scale_exponent: float = 0.75,
) -> Tensor:
    """Drop active units at a rate that is drawn anew, and is higher where they are fewer (Jumpout, ICML 2019).

    A share `p = min(p_min + |N(0, sigma)|, p_max)` of all units is to be dropped. Dropping a zero changes nothing, so
    that the active ones are dropped at `p / q`, where `q` is the share of elements above 0 in this very tensor: under
    DDP that of the local batch. The rate is capped at 0.95, also where nothing is active.

    Args:
        x: Activations behind a ReLU, (B, *), with channels in dimension 1.
        p_min: Smallest and likeliest share, in [0, 1).
        sigma: Spread of the normal that is halved, at least 0.
        p_max: Largest share, in [0, 1), at least `p_min`.
        granularity: Draw for each "element", or for each sample and "channel".
        scale_exponent: `e` of what rescales: 1 keeps the mean, 0.5 the second moment, and 0.75 lies between.

    Returns:
        Shape, dtype and device of `x`: `x * m * (1 - p / q)**-e` with `m ~ Bernoulli(1 - p / q)`.

    Raises:
        ConfigurationError: If a value is out of range.

    """
    check_jumpout("jumpout", p_min, sigma, p_max, granularity, scale_exponent)
    drawn = (p_min + sigma * torch.randn((), dtype=torch.float32, device=x.device).abs()).clamp(max=p_max)
    # At least one element is counted as active, so that 0 / 0 is no rate.
    active = torch.count_nonzero(x > 0).clamp(min=1)
    rate = (drawn * x.numel() / active).clamp(max=MAX_JUMPOUT_RATE)
    elementwise = granularity == "element" or x.ndim <= 2
    size = x.shape if elementwise else (*x.shape[:2], *[1] * (x.ndim - 2))
    keep = torch.rand(size, dtype=torch.float32, device=x.device) >= rate
    scale = ((1 - rate) ** -scale_exponent).to(x.dtype)
    return x * keep * scale if elementwise else x * (keep * scale)


def check_jumpout(
    owner: str, p_min: float, sigma: float, p_max: float, granularity: Granularity, scale_exponent: float
) -> None:
    """Refuse what is no setting of Jumpout.

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
            "`p_max` caps the rate, so it is at least `p_min`.",
            f"Pass a `p_max` from {p_min} up, or a lower `p_min`.",
        )
    check_choice(owner, "granularity", granularity, ("element", "channel"))
