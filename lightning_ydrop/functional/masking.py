"""Dropping units: the vanilla way of one rate for all, and with a probability for each unit."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
