"""What accuracy tells while units are removed."""

from collections.abc import Sequence

from torch import Tensor

from lightning_ydrop.checks import check_fraction
from lightning_ydrop.errors import ConfigurationError, describe


def removal_threshold(accuracy: Tensor, fractions: Sequence[float], loss: float = 0.01) -> float:
    """Give the largest fraction of units that can be removed before accuracy falls (Fig. 3, arXiv 2409.09088).

    Args:
        accuracy: In [0, 1], one for each fraction, shape (F,).
        fractions: The fractions of units that were removed, ascending from 0, where nothing was.
        loss: By how much accuracy may fall below that of the whole network, in [0, 1].

    Returns:
        The last fraction before accuracy first falls further than that.

    Raises:
        ConfigurationError: If `loss` is outside [0, 1], or there is not one accuracy for each fraction.

    Example:
        >>> import torch
        >>> removal_threshold(torch.tensor([0.95, 0.95, 0.945, 0.8]), fractions=(0.0, 0.25, 0.5, 0.75))
        0.5

    """
    loss = check_fraction("removal_threshold", "loss", loss, example=0.01)
    if accuracy.shape != (len(fractions),) or len(fractions) == 0:
        raise ConfigurationError(
            f"removal_threshold({describe(accuracy)}, fractions={describe(fractions)}) was given.",
            "There is one accuracy for each fraction, and at least one fraction.",
            "Average over repeats first, for example with accuracy.mean(0).",
        )
    has_fallen = accuracy[0] - accuracy > loss + 1e-9  # the allowance is for rounding of differences
    return float(fractions[int(has_fallen.int().argmax()) - 1 if has_fallen.any() else -1])
