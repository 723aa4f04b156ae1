"""Predictions in what a model returned: logits of classes or labels, means and variances."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.models.calls import dim_of_rows, read_output, read_rows

Noise = Literal["variance", "log_variance"]


def precise(tensor: Tensor) -> Tensor:
    """Give a tensor in float32, or in float64 if it is in that already."""
    return tensor if tensor.element_size() >= 8 else tensor.float()


@dataclass(frozen=True)
class Dims:
    """Where samples and classes are in what a model returns.

    Attributes:
        classes: Dimension of the classes, or of means and noise; None where all entries are alike.
        samples: Dimension of the samples. The first one also serves, as in the last state of a recurrent layer.

    """

    classes: int | None = None
    samples: int = 0

    @property
    def alike(self) -> "Dims":
        """Where rows are in outputs without a dimension of classes."""
        return Dims(None, self.samples)

    def of_rows(self, tensor: Tensor, num_rows: int) -> int:
        """Find the dimension of the rows, which is never that of the classes.

        Raises:
            ConfigurationError: If one dimension is said to be both.

        """
        ndim = tensor.ndim
        if self.classes is None or not -ndim <= self.classes < ndim or self.classes % ndim != self.samples:
            return dim_of_rows(tensor, num_rows, self.samples) or 0
        if ndim > 2 and self.samples > 0:
            raise ConfigurationError(
                f"The model's forward returned {describe(tensor)}, with class_dim={self.classes} and "
                f"batch_dim={self.samples}.",
                "Classes and samples are different dimensions of the output.",
                "Name that of the classes, such as class_dim=-1 for logits (T, B, C).",
            )
        return 0

    def rows_first(self, output: Any, num_rows: int) -> Tensor:
        """Find the one tensor that counts in an output, with its rows first.

        Raises:
            ConfigurationError: If it has not as many rows.

        """
        return read_rows(output, num_rows, self.of_rows(read_output(output), num_rows))

    def of_classes(self, tensor: Tensor, num_rows: int) -> int:
        """Say where the dimension of the classes is once the rows are first."""
        assert self.classes is not None
        classes = self.classes % tensor.ndim
        return classes + 1 if classes < self.of_rows(tensor, num_rows) else classes

    def back(self, values: Tensor, form: Tensor, num_rows: int) -> Tensor:
        """Move the rows, which are first, to where they are in an output, and give them its dtype."""
        return values.movedim(0, self.of_rows(form, num_rows)).to(form.dtype)


OF_CLASSES, ALIKE = Dims(1), Dims()


def logits_of(output: Any, num_rows: int, dims: Dims) -> Tensor:
    """Find the logits of classes in what a model returned.

    Args:
        output: What it returned.
        num_rows: The number of rows that went into it.
        dims: Where rows and classes are in the logits.

    Returns:
        Shape (num_rows, C, *), float32 or float64.

    Raises:
        ConfigurationError: If there are none of this shape, or fewer than two classes.

    """
    found, logits = read_output(output), dims.rows_first(output, num_rows)
    fits = dims.classes is not None and 0 < abs(dims.classes) < found.ndim
    class_dim = dims.of_classes(found, num_rows) if fits else 0
    if class_dim == 0 or logits.shape[class_dim] < 2:
        raise ConfigurationError(
            f"The model's forward returned {describe(found)} for {num_rows} rows, with class_dim={dims.classes}.",
            "Logits have, besides that of the rows, a dimension of two classes or more.",
            "Return logits of shape (B, C, *), or name the dimension of the classes with class_dim. For a single logit "
            'pass task="multilabel".',
        )
    return precise(logits.movedim(class_dim, 1))


def mean_and_noise(output: Any, num_rows: int, noise: Noise, dims: Dims) -> tuple[Tensor, Tensor]:
    """Find the mean, and the variance or its logarithm, in what a model returned.

    Args:
        output: A pair of tensors, a mapping with `mean` and the noise under its name, or a tensor whose first half is
            the mean.
        num_rows: The number of rows that went into the model.
        noise: What the second of the two is.
        dims: Where rows are, and in a single tensor the two halves.

    Returns:
        The mean and the variance, of the same shape (num_rows, *), float32 or float64.

    Raises:
        ConfigurationError: If there are no two tensors of one shape, or a variance is negative.

    """
    pair: list[Any] = []
    class_dim, where = dims.classes or 0, dims.alike
    if isinstance(output, Mapping):
        pair = [output.get("mean"), output.get(noise)]
    elif isinstance(output, (tuple, list)):
        pair = list(output)
    elif isinstance(output, Tensor) and 0 < abs(class_dim) < output.ndim and output.shape[class_dim] % 2 == 0:
        where = dims
        pair = list(output.chunk(2, class_dim))
    is_pair = len(pair) == 2 and all(isinstance(each, Tensor) and each.is_floating_point() for each in pair)
    if not is_pair or pair[0].shape != pair[1].shape or pair[0].ndim == 0:
        raise ConfigurationError(
            f"The model's forward returned {describe(output)}, with noise={noise!r}.",
            f"It returns a pair (mean, {noise}) of the same shape, a mapping with 'mean' and {noise!r}, or one tensor "
            f"whose dimension class_dim={class_dim} holds the means first and as many entries of {noise} after them.",
            "Return the two from forward, or leave noise out if the model predicts no variance.",
        )
    mean, spread = (precise(where.rows_first(each, num_rows)) for each in pair)
    variance = spread.exp() if noise == "log_variance" else spread
    if noise == "variance" and bool((variance < 0).any()):
        raise ConfigurationError(
            f"The model's forward returned {describe(output)}, in which a variance is negative.",
            'With noise="variance" the second tensor holds variances, at least 0.',
            'Return torch.nn.functional.softplus(...) of it, or pass noise="log_variance" if it holds logarithms.',
        )
    return mean, variance
