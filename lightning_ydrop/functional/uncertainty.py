"""How uncertain predictions are, and how far they are from an average over masks."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_ydrop.checks import check_choice
from lightning_ydrop.errors import ConfigurationError

Reduction = Literal["mean", "sum", "none"]


def predictive_entropy(probabilities: Tensor) -> Tensor:
    """Give the entropy of predictions in nats: `-sum_c p_c log p_c` (Shannon, 1948).

    Args:
        probabilities: Of the classes, shape (B, C, *).

    Returns:
        Shape (B, *), dtype and device of `probabilities`: 0 where one class is certain, log C where all are as likely.

    Example:
        >>> predictive_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])

    """
    entropy: Tensor = torch.special.entr(probabilities).sum(1)
    return entropy


def bernoulli_entropy(probabilities: Tensor) -> Tensor:
    """Give the entropy of yes-or-no predictions in nats: `-p log p - (1 - p) log(1 - p)` (Shannon, 1948).

    Args:
        probabilities: That each label applies, any shape.

    Returns:
        Shape, dtype and device of `probabilities`: 0 where the answer is certain, log 2 at 0.5.

    Example:
        >>> bernoulli_entropy(torch.tensor([0.5, 1.0]))
        tensor([0.6931, 0.0000])

    """
    entropy: Tensor = torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return entropy


def monte_carlo_divergence(logits: Tensor, probabilities: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Give the divergence of predictions from averages over masks: `KL(average || prediction)` in nats.

    Dropout distillation minimises it (Rota Bulo, Porzi, Kontschieder, ICML 2016). A class whose average is 0 adds
    nothing, even where its logit is -inf.

    Args:
        logits: Predictions, shape (B, C, *).
        probabilities: The averages for the same samples, of the same shape.
        reduction: "mean" over samples and positions, their "sum", or "none".

    Returns:
        A scalar, or for "none" shape (B, *), in float32 or, for float64, float64: 0 where predictions are the averages.

    Raises:
        ConfigurationError: If the shapes differ, or `reduction` is not one of the three.

    Example:
        >>> average = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
        >>> monte_carlo_divergence(torch.zeros(2, 2), average, reduction="none")
        tensor([0.0000, 0.3681])

    """
    check_choice("monte_carlo_divergence", "reduction", reduction, get_args(Reduction))
    if logits.shape != probabilities.shape:
        raise ConfigurationError(
            f"Logits of the shape {tuple(logits.shape)} were given for averages of {tuple(probabilities.shape)}.",
            "A prediction has the shape of the average that it is compared with, (B, C, *).",
            "Pass the predictions for the same samples, with the classes in dimension 1.",
        )
    precise = logits if logits.dtype == torch.float64 else logits.float()
    # Where a class is impossible for both, 0 times log 0 would be NaN.
    terms = torch.where(
        probabilities > 0,
        torch.xlogy(probabilities, probabilities) - probabilities * precise.log_softmax(1),
        0.0,
    )
    divergence = terms.sum(1)
    if reduction == "none":
        return divergence
    return divergence.mean() if reduction == "mean" else divergence.sum()
