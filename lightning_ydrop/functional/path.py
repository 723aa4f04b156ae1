"""The straight path from a baseline to the inputs, as the rows of one batch."""

import torch
from torch import Tensor


def path_points(start: Tensor, inputs: Tensor, n_steps: int) -> Tensor:
    """Walk from `start` to `inputs` in equal steps: `x_i = x' + (i / n_steps) (x - x')` (Eq. 2, arXiv 2409.09088).

    Args:
        start: The baseline `x'`: shape (1, *) where all samples share it, which then costs one row, or (B, *).
        inputs: The samples `x`, shape (B, *), floating point.
        n_steps: S, the number of steps, at least 1.

    Returns:
        Shape (1 + S*B, *) or (B + S*B, *), dtype and device of `inputs`: the start, then step 1 of every sample, then
        step 2 of every sample, and so on. The last B rows are `inputs` exactly.

    """
    weights = torch.linspace(1 / n_steps, 1, n_steps, dtype=inputs.dtype, device=inputs.device)
    weights = weights.view(-1, *[1] * inputs.ndim)
    steps = torch.lerp(start, inputs, weights)  # (S, B, *)
    return torch.cat([start, steps.flatten(0, 1)])
