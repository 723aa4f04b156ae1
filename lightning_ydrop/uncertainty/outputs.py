"""Predictions in what a model returned: logits of classes or labels, means and variances."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.calls import read_rows

Noise = Literal["variance", "log_variance"]


def precise(tensor: Tensor) -> Tensor:
    """Give a tensor in float32, or in float64 if it is in that already."""
    return tensor if tensor.element_size() >= 8 else tensor.float()


def logits_of(output: Any, num_rows: int, class_dim: int) -> Tensor:
    """Find the logits of classes in what a model returned.

    Args:
        output: What it returned.
        num_rows: The number of rows that went into it.
        class_dim: Dimension of the classes in the logits.

    Returns:
        Shape (num_rows, C, *), float32 or float64.

    Raises:
        ConfigurationError: If there are none of this shape, or fewer than two classes.

    """
    logits = read_rows(output, num_rows)
    if not 0 < abs(class_dim) < logits.ndim or logits.shape[class_dim] < 2:
        raise ConfigurationError(
            f"The model's forward returned {describe(logits)} for {num_rows} rows, with class_dim={class_dim}.",
            "Logits have, besides that of the rows, a dimension of two classes or more.",
            "Return logits of shape (B, C, *), or name the dimension of the classes with class_dim. For a single logit "
            'pass task="multilabel".',
        )
    return precise(logits.movedim(class_dim, 1))


def mean_and_noise(output: Any, num_rows: int, noise: Noise, class_dim: int) -> tuple[Tensor, Tensor]:
    """Find the mean, and the variance or its logarithm, in what a model returned.

    Args:
        output: A pair of tensors, a mapping with `mean` and the noise under its name, or a tensor whose first half is
            the mean.
        num_rows: The number of rows that went into the model.
        noise: What the second of the two is.
        class_dim: Dimension of the halves of a single tensor.

    Returns:
        The mean and the variance, of the same shape (num_rows, *), float32 or float64.

    Raises:
        ConfigurationError: If there are no two tensors of one shape, or a variance is negative.

    """
    pair: list[Any] = []
    if isinstance(output, Mapping):
        pair = [output.get("mean"), output.get(noise)]
    elif isinstance(output, (tuple, list)):
        pair = list(output)
    elif isinstance(output, Tensor) and 0 < abs(class_dim) < output.ndim and output.shape[class_dim] % 2 == 0:
        pair = list(output.chunk(2, class_dim))
    is_pair = len(pair) == 2 and all(isinstance(each, Tensor) and each.is_floating_point() for each in pair)
    if not is_pair or pair[0].shape != pair[1].shape or pair[0].ndim == 0:
        raise ConfigurationError(
            f"The model's forward returned {describe(output)}, with noise={noise!r}.",
            f"It returns a pair (mean, {noise}) of the same shape, a mapping with 'mean' and {noise!r}, or one tensor "
            f"whose dimension class_dim={class_dim} holds the means first and as many entries of {noise} after them.",
            "Return the two from forward, or leave noise out if the model predicts no variance.",
        )
    mean, spread = (precise(read_rows(each, num_rows)) for each in pair)
    variance = spread.exp() if noise == "log_variance" else spread
    if noise == "variance" and bool((variance < 0).any()):
        raise ConfigurationError(
            f"The model's forward returned {describe(output)}, in which a variance is negative.",
            'With noise="variance" the second tensor holds variances, at least 0.',
            'Return torch.nn.functional.softplus(...) of it, or pass noise="log_variance" if it holds logarithms.',
        )
    return mean, variance
