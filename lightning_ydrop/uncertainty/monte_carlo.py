"""The average prediction of a network over its dropout masks."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import nn

from lightning_ydrop.checks import check_module
from lightning_ydrop.errors import describe
from lightning_ydrop.layers import ConductanceDropout
from lightning_ydrop.models.calls import Inputs
from lightning_ydrop.uncertainty.averaging import subject_of
from lightning_ydrop.uncertainty.masks import check_drops, stochastic_modules
from lightning_ydrop.uncertainty.outputs import Noise
from lightning_ydrop.uncertainty.results import MonteCarlo, MonteCarloMultilabel, MonteCarloRegression
from lightning_ydrop.uncertainty.settings import checked_settings
from lightning_ydrop.uncertainty.streams import check_generator, warn_of_equal_ranks
from lightning_ydrop.uncertainty.tasks import AnyResult, TaskName


@overload
def monte_carlo(
    model: nn.Module,
    inputs: Inputs,
    num_samples: int = 100,
    *,
    task: Literal["classification"] = "classification",
    return_samples: bool = False,
    shared_masks: bool = False,
    generator: torch.Generator | None = None,
    class_dim: int = 1,
    batch_dim: int = 0,
    max_rows: int | None = 4096,
    forward: Callable[..., Any] | None = None,
    progress_bar: bool = True,
    functional: bool = False,
) -> MonteCarlo: ...


@overload
def monte_carlo(
    model: nn.Module,
    inputs: Inputs,
    num_samples: int = 100,
    *,
    task: Literal["multilabel"],
    return_samples: bool = False,
    shared_masks: bool = False,
    generator: torch.Generator | None = None,
    batch_dim: int = 0,
    max_rows: int | None = 4096,
    forward: Callable[..., Any] | None = None,
    progress_bar: bool = True,
    functional: bool = False,
) -> MonteCarloMultilabel: ...


@overload
def monte_carlo(
    model: nn.Module,
    inputs: Inputs,
    num_samples: int = 100,
    *,
    task: Literal["regression"],
    noise: Noise | None = None,
    return_samples: bool = False,
    shared_masks: bool = False,
    generator: torch.Generator | None = None,
    class_dim: int = 1,
    batch_dim: int = 0,
    max_rows: int | None = 4096,
    forward: Callable[..., Any] | None = None,
    progress_bar: bool = True,
    functional: bool = False,
) -> MonteCarloRegression: ...


def monte_carlo(
    model: nn.Module,
    inputs: Inputs,
    num_samples: int = 100,
    *,
    task: TaskName = "classification",
    noise: Noise | None = None,
    return_samples: bool = False,
    shared_masks: bool = False,
    generator: torch.Generator | None = None,
    class_dim: int = 1,
    batch_dim: int = 0,
    max_rows: int | None = 4096,
    forward: Callable[..., Any] | None = None,
    progress_bar: bool = True,
    functional: bool = False,
) -> AnyResult:
    """Average a network's prediction over dropout masks (Monte Carlo dropout, Gal, Ghahramani, ICML 2016).

    The model is in evaluation mode, except for what drops: BatchNorm uses its running statistics and keeps them. A
    ConductanceDropout that has been driven drops at the running mean of its probabilities. A call of F.dropout in a
    forward method drops only where it follows a dropout layer, as attention does that reads the rate of the layer
    beside it, or with `functional=True`. The model is given back as it was.

    The first mask passes through the model alone. Then as many masks pass at once as `max_rows` allows, and half as
    many whenever a GPU has no memory for them. Where all rows share something that is drawn, such as the mask of a
    weight or the rate of a Jumpout, one mask passes at a time: the first two passes show that. Masks come from torch's
    random stream, so they depend on how many pass at once. Those that a layer draws with Python or NumPy follow from
    torch's stream too.

    Args:
        model: A model whose output is logits (B, C, *) of classes, logits of labels such as (B, L), or numbers.
        inputs: What its forward takes: a tensor, a tuple for positional arguments, or a mapping for keyword arguments.
            Tensors that have a row for each sample, as the first one has, are repeated for each mask. An input that all
            samples share, such as a mask (T, T), may happen to have as many rows: pass max_rows=1 then, or with
            `shared_masks` a `forward` that holds this input.
        num_samples: Number of masks, at least 1.
        task: "classification": a softmax over classes. "multilabel": a sigmoid for each entry of the output, so a
            single logit is a binary classifier. "regression": the output is numbers.
        noise: For regression, what the model predicts besides the mean: None, the "variance" of the target, or its
            "log_variance". The output is then a pair (mean, noise) of the same shape, a mapping with `mean` and
            `variance` or `log_variance`, or one tensor that holds the means first and the noise after them in
            `class_dim`.
        return_samples: Whether the result holds what each mask gives. It takes `num_samples` times the memory of an
            output in float32, on the device of the model: 4 MB for 100 masks, 1,000 samples and 10 classes. Without
            them the memory does not grow with the number of masks.
        shared_masks: Whether all samples of the batch get the same masks, so that each mask is one network for all of
            them. Then each sample passes alone, with many masks at once: that takes B passes or more, so pass large
            batches only with many masks. What a layer computes from the batch, as Jumpout does the share of active
            units, it computes from the single sample.
        generator: Where the masks come from. The same state of it gives the same masks, and torch's own random streams
            stay as they are. It moves on by one number. None: torch's random streams.
        class_dim: Dimension of the classes in the output, -1 for logits (B, *, C); for regression, that of means and
            noise in a single tensor.
        batch_dim: Dimension of the samples in inputs and output: 1 for models of (T, B, F), such as recurrent layers
            without `batch_first`. In tensors that have not as many entries there, the first dimension is meant. Results
            have the samples first.
        max_rows: At most this many rows pass through the model at once, but never fewer than the batch has, or than
            one with `shared_masks`. None: all.
        forward: Another method of the model, to be called instead of it.
        progress_bar: Whether a progress bar shows once it takes more than five seconds.
        functional: Whether calls of F.dropout and its kin, and of F.scaled_dot_product_attention, drop too, though the
            model is in evaluation mode: those that drop in training mode, at their rates there, as one pass in
            training mode shows, which is undone. Calls under `if self.training` are not reached, which a warning says.
            Compiled parts run without compilation.

    Returns:
        The average of the predictions and its uncertainty: a MonteCarlo, MonteCarloMultilabel or MonteCarloRegression.

    Raises:
        ConfigurationError: If nothing in the model drops, or an argument does not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
        >>> x = torch.randn(5, 4)
        >>> average = monte_carlo(model, x, num_samples=20)
        >>> average.probabilities.shape, average.mutual_information.shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> average = monte_carlo(model, x, num_samples=20, task="regression", noise="log_variance")
        >>> average.mean.shape, average.variance.shape
        (torch.Size([5, 1]), torch.Size([5, 1]))

    """
    check_module("monte_carlo", model)
    settings = checked_settings(
        "monte_carlo",
        num_samples=num_samples,
        task=task,
        noise=noise,
        return_samples=return_samples,
        shared_masks=shared_masks,
        class_dim=class_dim,
        batch_dim=batch_dim,
        max_rows=max_rows,
        progress_bar=progress_bar,
        functional=functional,
    )
    check_generator("monte_carlo", generator)
    if not settings.functional:
        check_drops("monte_carlo", model)
    warn_of_vanilla_rates("monte_carlo", model)
    if generator is None:
        warn_of_equal_ranks(
            "monte_carlo", "Pass generator=torch.Generator().manual_seed(...) with another seed on each."
        )
    return settings.task.result(settings.average(subject_of(model, inputs, forward, settings.batch_dim), generator))


def warn_of_vanilla_rates(owner: str, model: nn.Module) -> None:
    """Warn where layers made for Y-Drop's probabilities have none, such as after loading weights only."""
    layers = [module for module in stochastic_modules(model) if isinstance(module, ConductanceDropout)]
    if any(len(layer.mean_drop_prob) == 0 for layer in layers):
        warnings.warn(
            f"{owner} was given {describe(model)}, in which each ConductanceDropout drops at its p. If Y-Drop has "
            "trained it, its probabilities are in the Trainer's checkpoint, not among the weights: "
            "DropoutDistillation(model, checkpoint=...) takes them from there, and its `teacher` has them.",
            stacklevel=3,
        )
