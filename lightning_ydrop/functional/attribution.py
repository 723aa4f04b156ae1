"""The importance of units, from activations and gradients along a path."""

from typing import Literal, get_args

import torch
from torch import Tensor

Quadrature = Literal["right", "left", "trapezoid"]
QUADRATURES: tuple[str, ...] = get_args(Quadrature)


def path_conductance(
    activations: Tensor, gradients: Tensor, num_samples: int, quadrature: Quadrature = "right"
) -> Tensor:
    """Integrate `dF/da * da` along the path: `sum_i dF(x_i)/da * (a(x_i) - a(x_{i-1}))` (Eq. 2, arXiv 2409.09088).

    Args:
        activations: `a`, shape (1 + S*B, *) or (B + S*B, *) in the layout of `path_points`.
        gradients: `dF/da`, of the same shape.
        num_samples: B.
        quadrature: Where on each step the gradient is taken: at its "right" end `x_i`, as in Eq. 2; at its "left" end
            `x_{i-1}`, as Captum does; or the mean of both, "trapezoid", which comes closest to the integral of Eq. 1.

    Returns:
        Shape (B, *), in float32 or, for float64 activations, float64.

    """
    path, slopes = _at_least_float32(activations), _at_least_float32(gradients)
    # S*B rows follow the start, so what is left over after whole groups of B is the one shared row, if there is one.
    start_rows = path.shape[0] % num_samples or num_samples
    if quadrature == "right":
        slopes = slopes[start_rows:]
    elif quadrature == "left":
        slopes = _one_step_back(slopes, start_rows, num_samples)
    else:
        slopes = (slopes[start_rows:] + _one_step_back(slopes, start_rows, num_samples)) / 2
    summands = _increments(path, start_rows, num_samples).mul_(slopes)
    return summands.view(-1, num_samples, *path.shape[1:]).sum(0)


def sum_to_units(values: Tensor, unit_dim: int) -> Tensor:
    """Add up over everything but samples and units: (B, *) -> (B, U)."""
    return values.movedim(unit_dim, 1).flatten(2).sum(2) if values.ndim > 2 else values


def top_share(scores: Tensor, fraction: float = 0.2) -> Tensor:
    """Share of the positive scores' sum that the highest-scored units hold (Fig. 2b, arXiv 2409.09088).

    Args:
        scores: Shape (U,).
        fraction: The share of units taken from the top, rounded to a whole number of at least one unit.

    Returns:
        A scalar in [0, 1] on the device of `scores`; NaN where no score is positive. 0.2 means evenly spread where
        `fraction` is 0.2.

    """
    positive = scores.clamp(min=0).sort(descending=True).values
    count = max(1, round(fraction * len(scores)))
    return positive[:count].sum() / positive.sum()


def gini(scores: Tensor) -> Tensor:
    """Gini coefficient of the positive scores, where the others count as 0.

    Args:
        scores: Shape (U,).

    Returns:
        A scalar on the device of `scores`, from 0 where all units score alike to 1 - 1/U where one unit has it all; NaN
        where no score is positive.

    """
    positive = scores.clamp(min=0).sort().values
    num_units = len(positive)
    # Each sorted score by how many lie below it less how many lie above it: half the sum of all differences.
    weights = torch.arange(1 - num_units, num_units, 2, dtype=positive.dtype, device=positive.device)
    return weights @ positive / (num_units * positive.sum())


def _increments(path: Tensor, start_rows: int, num_samples: int) -> Tensor:
    """Take from each point behind the start the one before it: shape (S*B, *)."""
    if start_rows == num_samples:
        return path[num_samples:] - path[:-num_samples]
    # Into one tensor: to give each sample the start first would be another pass over memory.
    increments = torch.empty_like(path[1:])
    torch.sub(path[1 : 1 + num_samples], path[:1], out=increments[:num_samples])
    torch.sub(path[1 + num_samples :], path[1:-num_samples], out=increments[num_samples:])
    return increments


def _one_step_back(rows: Tensor, start_rows: int, num_samples: int) -> Tensor:
    """Give to each point behind the start the row of the point before it: shape (S*B, *)."""
    if start_rows == num_samples:
        return rows[:-num_samples]
    return torch.cat([rows[:1].expand(num_samples, *rows.shape[1:]), rows[1:-num_samples]])


def _at_least_float32(values: Tensor) -> Tensor:
    """Half precision is for the network; a sum of small differences needs more."""
    return values.float() if values.dtype.itemsize < 4 else values
