"""The average prediction of a network over its dropout masks, and how far other predictions are from it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_ydrop.checks import check_count, check_module
from lightning_ydrop.errors import ConfigurationError, describe
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.layers.kinds import draws_for_each_sample
from lightning_ydrop.models.calls import Inputs, arguments_of, read_output, read_rows, signature_of
from lightning_ydrop.models.state import has_compiled_parts
from lightning_ydrop.uncertainty.masks import (
    dropping,
    finding_shared_masks,
    stochastic_modules,
)


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
    class_dim: int = 1,
    max_rows: int | None = 4096,
    forward: Callable[..., Any] | None = None,
) -> MonteCarlo:
    """Average a classifier's prediction over dropout masks.

    The model is in evaluation mode, but for what drops: BatchNorm uses its running statistics and keeps them. A
    ConductanceDropout that has been driven drops at the running mean of its probabilities. F.dropout in a forward is
    not seen, but where it drops attention weights at the rate of a layer that stands beside it.

    As many masks as `max_rows` lets pass through the model at once, and half as many whenever a GPU has no memory for
    them; one at a time where something in it may draw once for a whole batch, as Jumpout does with its rate, and
    whatever else is no dropout of torch's or ours, and where a layer drops what has no row for each sample, such as a
    weight. The model is given back as it was. Masks come from torch's random stream, so that they depend on how many
    pass at once.

    Args:
        model: A model whose output is logits (B, C, *).
        inputs: What its forward takes: a tensor, a tuple for positional arguments, or a mapping for keyword arguments.
            Tensors in it that have a row for each sample, as the first has, are repeated for each mask. One that all
            samples share, such as a mask (T, T), may have as many rows by chance: pass max_rows=1 then.
        num_samples: How many masks, at least 1.
        class_dim: Dimension of the classes in the output, -1 for logits (B, *, C).
        max_rows: At most so many rows pass through the model at once, but never fewer than the batch has. None: all.
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
    check_module("monte_carlo", model)
    check_count("monte_carlo", "num_samples", num_samples, minimum=1, example=100)
    if max_rows is not None:
        check_count("monte_carlo", "max_rows", max_rows, minimum=1, example=4096)
    check_drops("monte_carlo", model)
    warn_of_vanilla_rates("monte_carlo", model)
    probabilities = mean_probabilities(
        model, inputs, num_samples, class_dim=class_dim, max_rows=max_rows, forward=forward
    )
    return MonteCarlo(probabilities, num_samples)


def mean_probabilities(
    model: nn.Module,
    inputs: Inputs,
    num_masks: int,
    *,
    temperature: float = 1.0,
    class_dim: int = 1,
    max_rows: int | None = None,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Average the softmax of a model's logits, divided by a temperature, over masks: see `monte_carlo`.

    Returns:
        Shape (B, C, *), float32.

    """
    forward = forward or model
    positional, keywords = arguments_of(signature_of(model, forward), inputs)
    batch_size = _batch_size(inputs, (positional, keywords))
    at_once = num_masks if max_rows is None else max(1, max_rows // batch_size)
    total: Tensor | None = None
    with dropping(model) as dropped:
        if not all(map(draws_for_each_sample, dropped)):
            at_once = 1
        # Not into compiled parts, which would be compiled with the hooks of this look in them.
        looked_at = dropped if at_once > 1 and not has_compiled_parts(model) else []
        left = num_masks
        while left > 0:
            count = min(at_once, left)
            try:
                with finding_shared_masks(looked_at if count > 1 else [], count * batch_size) as shared:
                    output = forward(
                        *_repeated(list(positional), batch_size, count), **_repeated(keywords, batch_size, count)
                    )
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                at_once = count // 2
                continue
            if shared:
                at_once = 1
                continue
            logits = logits_of(output, count * batch_size, class_dim) / temperature
            summed = logits.softmax(1).reshape(count, batch_size, *logits.shape[1:]).sum(0)
            total = summed if total is None else total + summed
            left -= count
    assert total is not None
    return total / num_masks


def logits_of(output: Any, rows: int, class_dim: int) -> Tensor:
    """Find the logits in what a model returned.

    Args:
        output: What it returned.
        rows: How many went into it.
        class_dim: Dimension of the classes in them.

    Returns:
        Shape (rows, C, *), float32.

    Raises:
        ConfigurationError: If there are none of this shape, or fewer than two classes.

    """
    logits = read_rows(output, rows)
    if not 0 < abs(class_dim) < logits.ndim or logits.shape[class_dim] < 2:
        raise ConfigurationError(
            f"The model's forward returned {describe(logits)} for {rows} rows, with class_dim={class_dim}.",
            "Logits have, besides that of the rows, a dimension of two classes or more.",
            "Return logits of shape (B, C, *), or name the dimension of the classes with class_dim; of a single logit "
            "make two, 0 and itself.",
        )
    return logits.movedim(class_dim, 1).float()


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


def warn_of_vanilla_rates(owner: str, model: nn.Module) -> None:
    """Warn where layers are made for Y-Drop's rates and have none, as when weights alone are loaded."""
    layers = [module for module in stochastic_modules(model) if isinstance(module, ConductanceDropout)]
    if any(len(layer.mean_drop_prob) == 0 for layer in layers):
        warnings.warn(
            f"{owner} was given {describe(model)}, in which each ConductanceDropout drops at its p. Where Y-Drop has "
            "trained it, its probabilities are in the Trainer's checkpoint, but not among the weights: "
            "DropoutDistillation(model, checkpoint=...) takes them from there, and its `teacher` has them.",
            stacklevel=3,
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
    higher_is_better = False
    total: Tensor
    num_rows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("num_rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Any, average: MonteCarlo) -> None:
        """Add a batch.

        Args:
            logits: Predictions, shape (B, C, *), or an output that holds them.
            average: What `monte_carlo` found for the same samples.

        Raises:
            ConfigurationError: If the two have different shapes.

        """
        likely, logits = average.probabilities, read_output(logits)
        if logits.shape != likely.shape:
            raise ConfigurationError(
                f"Logits of the shape {tuple(logits.shape)} were given for averages of {tuple(likely.shape)}.",
                "A prediction has the shape of the average that it is compared with, (B, C, *).",
                "Pass the predictions for the same samples, with the classes in dimension 1.",
            )
        predicted = logits.float().log_softmax(1)
        # Also where a class is impossible for both, log 0 = -inf: it adds nothing.
        terms = torch.where(likely > 0, torch.xlogy(likely, likely) - likely * predicted, 0.0)
        self.total += terms.sum()
        self.num_rows += logits[:, 0].numel()

    def compute(self) -> Tensor:
        """Give the mean."""
        return self.total / self.num_rows


def _batch_size(inputs: Inputs, arguments: Any) -> int:
    tensors: list[Tensor] = []
    apply_to_collection(arguments, Tensor, tensors.append)
    sizes = [len(tensor) for tensor in tensors if tensor.ndim > 0]
    if not sizes or sizes[0] == 0:
        raise ConfigurationError(
            f"The inputs are {describe(inputs)}.",
            "They hold at least one tensor with a row for each sample, the first of them, and at least one sample.",
            "Pass a batch of samples.",
        )
    return sizes[0]


def _repeated(arguments: Any, batch_size: int, count: int) -> Any:
    """Put the rows of a batch below each other so many times; tensors of another size stay as they are."""

    def repeat(tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * count) if tensor.ndim > 0 and len(tensor) == batch_size else tensor

    return arguments if count == 1 else apply_to_collection(arguments, Tensor, repeat)
