"""The importance of units, from activations and gradients along a path."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ydrop.checks import check_choice, check_count, check_fraction, check_unit_dim

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

    Raises:
        ConfigurationError: If `num_samples` or `quadrature` is out of range.

    Example:
        >>> activations = torch.tensor([[0.0], [1.0], [3.0]])  # one sample, two steps
        >>> gradients = torch.tensor([[5.0], [2.0], [7.0]])
        >>> path_conductance(activations, gradients, num_samples=1)
        tensor([[16.]])

    """
    num_samples = check_count("path_conductance", "num_samples", num_samples, minimum=1, example=12)
    check_choice("path_conductance", "quadrature", quadrature, QUADRATURES)
    path, slopes = at_least_float32(activations), at_least_float32(gradients)
    # The start is followed by S*B rows. What is left after whole groups of B is the one shared row, where it is shared.
    start_rows = path.shape[0] % num_samples or num_samples
    if quadrature == "right":
        slopes = slopes[start_rows:]
    elif quadrature == "left":
        slopes = _one_step_back(slopes, start_rows, num_samples)
    else:
        slopes = (slopes[start_rows:] + _one_step_back(slopes, start_rows, num_samples)) / 2
    summands = _increments(path, start_rows, num_samples).mul_(slopes)
    return summands.view(-1, num_samples, *path.shape[1:]).sum(0)


def sum_to_units(values: Tensor, unit_dim: int = 1) -> Tensor:
    """Add up each sample's values over everything except units: the conductance of a channel is that of its positions.

    Conductance adds up over neurons (Dhamdhere, Sundararajan, Yan, 2018, arXiv 1805.12233).

    Args:
        values: Shape (B, *), with U units along `unit_dim`.
        unit_dim: Dimension of the units: 1 for (B, U) and (B, C, H, W), -1 for (B, T, U); any but 0.

    Returns:
        Shape (B, U), dtype and device of `values`.

    Raises:
        ConfigurationError: If `unit_dim` is 0 or not a whole number.

    Example:
        >>> sum_to_units(torch.ones(2, 3, 4, 4), unit_dim=1).shape
        torch.Size([2, 3])
        >>> sum_to_units(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), unit_dim=-1)
        tensor([[4., 6.]])

    """
    unit_dim = check_unit_dim("sum_to_units", unit_dim)
    return values.movedim(unit_dim, 1).flatten(2).sum(2) if values.ndim > 2 else values


def top_share(scores: Tensor, fraction: float = 0.2) -> Tensor:
    """Give the part of the positive scores' sum that the highest-scored units hold (Fig. 2b, arXiv 2409.09088).

    Args:
        scores: Shape (U,).
        fraction: The fraction of units taken from the top, in [0, 1], rounded to a whole number of at least one unit.

    Returns:
        A scalar in [0, 1], dtype and device of `scores`: `fraction` where all units score alike, 1 where the units at
        the top have it all, and NaN where no score is positive.

    Raises:
        ConfigurationError: If `fraction` is outside [0, 1].

    Example:
        >>> top_share(torch.tensor([4.0, 3.0, 2.0, 1.0, -9.0]), fraction=0.4)
        tensor(0.7000)

    """
    fraction = check_fraction("top_share", "fraction", fraction, example=0.2)
    positive = scores.clamp(min=0).sort(descending=True).values
    count = max(1, round(fraction * len(scores)))
    return positive[:count].sum() / positive.sum()


def gini(scores: Tensor) -> Tensor:
    """Give the Gini coefficient of the positive scores, where all others count as 0 (Gini, 1912).

    It is half the mean difference between two units, divided by the mean.

    Args:
        scores: Shape (U,).

    Returns:
        A scalar, dtype and device of `scores`: 0 where all units score alike, 1 - 1/U where one unit has it all, and
        NaN where no score is positive.

    Example:
        >>> gini(torch.ones(4)), gini(torch.tensor([0.0, 0.0, 0.0, 5.0]))
        (tensor(0.), tensor(0.7500))

    """
    positive = scores.clamp(min=0).sort().values
    num_units = len(positive)
    # The weight of a sorted score: the number of scores below it less the number above it. That adds up to half the
    # sum of all differences.
    weights = torch.arange(1 - num_units, num_units, 2, dtype=positive.dtype, device=positive.device)
    return weights @ positive / (num_units * positive.sum())


def conductance_spread(sums: Tensor, num_samples: int | Tensor, top_fraction: float = 0.2) -> dict[str, Tensor]:
    """Give the mean conductance of each unit, and how it is spread over the units (Fig. 2, arXiv 2409.09088).

    Args:
        sums: Conductance, summed over samples, shape (U,).
        num_samples: Number of samples in the sums: a number or a scalar tensor.
        top_fraction: The fraction of units at the top, in [0, 1].

    Returns:
        A dictionary with dtype and device of `sums`:

        - "mean": the mean conductance of each unit, shape (U,),
        - "top_share": the part of the sum of positive means that the units at the top hold, see `top_share`,
        - "gini": the Gini coefficient of the means, see `gini`,
        - "total": the sum of the means. At a layer that every path crosses it is the mean change of the model's output
          from the baseline to the input.

    Raises:
        ConfigurationError: If `top_fraction` is outside [0, 1].

    Example:
        >>> conductance = torch.tensor([[1.0, 0.0, 1.0, 0.0], [5.0, 0.0, 1.0, 0.0]])
        >>> spread = conductance_spread(conductance.sum(0), len(conductance), top_fraction=0.25)
        >>> spread["mean"], spread["top_share"], spread["total"]
        (tensor([3., 0., 1., 0.]), tensor(0.7500), tensor(4.))

    """
    mean = sums / num_samples
    return {"mean": mean, "top_share": top_share(mean, top_fraction), "gini": gini(mean), "total": mean.sum()}


def _increments(path: Tensor, start_rows: int, num_samples: int) -> Tensor:
    """Subtract from each point after the start the point before it: shape (S*B, *)."""
    if start_rows == num_samples:
        return path[num_samples:] - path[:-num_samples]
    # Both differences go into one tensor. To repeat the start for each sample first would read memory once more.
    increments = torch.empty_like(path[1:])
    start, first, later = torch.split(path, [1, num_samples, len(path) - 1 - num_samples])
    to_first, to_later = torch.split(increments, [num_samples, len(later)])
    torch.sub(first, start, out=to_first)
    torch.sub(later, path[1:-num_samples], out=to_later)
    return increments


def _one_step_back(rows: Tensor, start_rows: int, num_samples: int) -> Tensor:
    """Give each point after the start the row of the point before it: shape (S*B, *)."""
    if start_rows == num_samples:
        return rows[:-num_samples]
    return torch.cat([rows[:1].expand(num_samples, *rows.shape[1:]), rows[1:-num_samples]])


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32: a sum of small differences needs more than half precision."""
    return values.float() if values.dtype.itemsize < 4 else values
