"""The average prediction of a network over its dropout masks, and how far other predictions are from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lightning_ydrop.distillation.masks import draws_once_for_a_batch, dropping, stochastic_modules
from lightning_ydrop.errors import ConfigurationError, check_count, describe
from lightning_ydrop.phase1.context import signature_of
from lightning_ydrop.phase1.inputs import Inputs, arguments_of
from lightning_ydrop.phase1.objectives import read_output


@dataclass(frozen=True)
class MonteCarlo:
    """What a network says on average over its masks.

    Attributes:
        probabilities: Of the classes, float32, shape (B, C, *).
        num_samples: Over how many masks.

    """

    probabilities: Tensor
    num_samples: int

    @property
    def entropy(self) -> Tensor:
        """Predictive entropy in nats, shape (B, *): how uncertain the average prediction is."""
        entropy: Tensor = torch.special.entr(self.probabilities).sum(1)
        return entropy


def monte_carlo(
    model: nn.Module,
    inputs: Inputs,
    num_samples: int = 100,
    *,
    max_rows: int = 4096,
    forward: Callable[..., Any] | None = None,
) -> MonteCarlo:
    """Average a classifier's prediction over dropout masks.

    The model is in evaluation mode, but for what drops: BatchNorm uses its running statistics and keeps them. A
    ConductanceDropout that has been driven drops at the running mean of its probabilities. As many masks as `max_rows`
    lets pass through the model at once; one at a time where something in it draws once for a whole batch, as Jumpout
    does with its rate. The model is given back as it was.

    Args:
        model: A model whose output is logits (B, C, *).
        inputs: What its forward takes: a tensor, a tuple for positional arguments, or a mapping for keyword arguments.
            Tensors in it that have a row for each sample are repeated for each mask.
        num_samples: How many masks, at least 1.
        max_rows: At most so many rows pass through the model at once, but never fewer than the batch has.
        forward: Another method of the model, to be called instead of it.

    Returns:
        The average of the softmax outputs.

    Raises:
        ConfigurationError: If nothing in the model drops, or an argument does not fit to it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        >>> found = monte_carlo(model, torch.randn(5, 4), num_samples=20)
        >>> found.probabilities.shape, found.entropy.shape
        (torch.Size([5, 3]), torch.Size([5]))

    """
    check_count("monte_carlo", "num_samples", num_samples, minimum=1, example=100)
    check_count("monte_carlo", "max_rows", max_rows, minimum=1, example=4096)
    check_drops("monte_carlo", model)
    with dropping(model):
        probabilities = mean_probabilities(model, inputs, num_samples, max_rows=max_rows, forward=forward)
    return MonteCarlo(probabilities, num_samples)


def mean_probabilities(
    model: nn.Module,
    inputs: Inputs,
    num_masks: int,
    *,
    temperature: float = 1.0,
    max_rows: int | None = None,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Average the softmax of a model's logits, divided by a temperature, over passes of each sample.

    Returns:
        Shape (B, C, *), float32.

    """
    forward = forward or model
    signature = signature_of(model, forward)
    batch_size = _batch_size(inputs)
    at_once = num_masks if max_rows is None else max(1, max_rows // batch_size)
    if any(map(draws_once_for_a_batch, stochastic_modules(model))):
        at_once = 1
    total: Tensor | None = None
    for start in range(0, num_masks, at_once):
        count = min(at_once, num_masks - start)
        positional, keywords = arguments_of(signature, _repeated(inputs, batch_size, count))
        logits = read_output(forward(*positional, **keywords)).float() / temperature
        summed = logits.softmax(1).reshape(count, batch_size, *logits.shape[1:]).sum(0)
        total = summed if total is None else total + summed
    assert total is not None
    return total / num_masks


def check_drops(owner: str, model: nn.Module) -> None:
    """Refuse a model in which nothing drops: all its predictions would be one.

    Raises:
        ConfigurationError: If nothing does.

    """
    if not stochastic_modules(model):
        raise ConfigurationError(
            f"{owner} was given {describe(model)}, which has no layer that drops.",
            "It averages over masks of dropout: nn.Dropout and its kin, ConductanceDropout, Jumpout.",
            "Pass the network that was trained with dropout, with its dropout layers. F.dropout is not seen.",
        )


class MonteCarloDivergence(Metric):
    """The divergence of predictions from Monte Carlo averages, KL(average || prediction) in nats, mean over samples.

    It adds up over batches and ranks, as torchmetrics do. 0 says that one pass gives what the average of many gives; it
    is what dropout distillation minimises.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
        >>> x = torch.randn(5, 4)
        >>> divergence = MonteCarloDivergence()
        >>> divergence.update(model.eval()(x), monte_carlo(model, x, num_samples=1000))
        >>> float(divergence.compute()) < 0.1
        True

    """

    full_state_update = False
    total: Tensor
    num_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, average: MonteCarlo) -> None:
        """Add the predictions (B, C, *) of a batch, as logits, and the averages for the same batch."""
        self.total += F.kl_div(logits.float().log_softmax(1), average.probabilities, reduction="sum")
        self.num_rows += logits[:, 0].numel()

    def compute(self) -> Tensor:
        """Give the mean."""
        return self.total / self.num_rows


def _batch_size(inputs: Inputs) -> int:
    sizes: list[int] = []
    tree_map_only(Tensor, lambda tensor: sizes.append(len(tensor)) if tensor.ndim > 0 else None, inputs)
    if not sizes:
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "They hold at least one tensor with a row for each sample.",
            "Pass a batch of samples.",
        )
    return sizes[0]


def _repeated(inputs: Inputs, batch_size: int, count: int) -> Inputs:
    """Put the rows of a batch below each other so many times; tensors of another size stay as they are."""

    def repeat(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * count) if tensor.ndim > 0 and len(tensor) == batch_size else tensor

    return inputs if count == 1 else tree_map_only(Tensor, repeat, inputs)
