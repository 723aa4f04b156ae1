"""The straight path from a baseline to the inputs, as the rows of one batch."""

import torch
from torch import Tensor

from lightning_ydrop.checks import check_count


def path_points(start: Tensor, inputs: Tensor, n_steps: int) -> Tensor:
    """Walk from `start` to `inputs` in equal steps: `x_i = x' + (i / n_steps) (x - x')` (Eq. 2, arXiv 2409.09088).

    Args:
        start: The baseline `x'`: shape (1, *) where all samples share it, which then costs one row, or (B, *).
        inputs: The samples `x`, shape (B, *), floating point.
        n_steps: S, the number of steps, at least 1.

    Returns:
        Shape (1 + S*B, *) or (B + S*B, *), dtype and device of `inputs`: the start, then step 1 of every sample, then
        step 2 of every sample, and so on. The last B rows are `inputs` exactly.

    Raises:
        ConfigurationError: If `n_steps` is not a whole number of at least 1.

    Example:
        >>> path_points(torch.zeros(1, 1), torch.tensor([[4.0], [8.0]]), n_steps=2).flatten()
        tensor([0., 2., 4., 4., 8.])

    """
    n_steps = check_count("path_points", "n_steps", n_steps, minimum=1, example=5)
    weights = torch.linspace(1 / n_steps, 1, n_steps, dtype=inputs.dtype, device=inputs.device)
    weights = weights.view(-1, *[1] * inputs.ndim)
    steps = torch.lerp(start, inputs, weights)  # (S, B, *)
    return torch.cat([start, steps.flatten(0, 1)])
